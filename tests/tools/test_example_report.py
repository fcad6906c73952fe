"""The parts of the training example: its measures, its schedule, the words of its report."""

from __future__ import annotations

import math

import pytest
import torch
from example_inputs import CLASSES  # noqa: F401 - puts the example on the path
from fgvc.distances import confused_distances
from fgvc.evaluation import Evaluation, Scores
from fgvc.optimization import learning_rate_factor
from fgvc.report import footnotes, table
from fgvc.results import Difference, Result, paired_difference
from torch.nn.functional import one_hot


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert factors[5] == max(factors) == 1
    assert factors[-1] < 0.001
    assert learning_rate_factor(0, 1) == 1

    assert learning_rate_factor(2, 100, warmup=10) == pytest.approx(0.3)
    assert learning_rate_factor(0, 100, warmup=0) == 1


def test_scores_are_those_counted_by_hand() -> None:
    logits = torch.tensor([[9.0, 5, 4, 3, 2, 1, 0], [5, 9, 4, 3, 2, 1, 0], [9, 5, 4, 3, 2, 1, 0]])
    scores = Scores(7, torch.tensor([0, 4, 6]), torch.device("cpu"), together=False)
    scores.update(logits[:1], torch.tensor([0]))
    scores.update(logits[1:], torch.tensor([4, 6]))
    scores.update(logits[:1], torch.tensor([0]))
    found = scores.compute()
    assert found["top-1"] == pytest.approx(2 / 4)
    assert found["top-5"] == pytest.approx(3 / 4)
    # Class 0 is always right, 4 and 6 never; class 1 was only predicted and does not count.
    assert found["class"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("dims", [1, 7, 2000])
@pytest.mark.parametrize("per_class", [2, 30])
def test_distance_says_the_same_at_every_width_and_sample_count(dims: int, per_class: int) -> None:
    """Means 2 deviations apart: 2^2 / 8 per dimension; of equal means 0 on average."""
    targets = torch.arange(10).repeat_interleave(per_class)
    generator = torch.Generator().manual_seed(0)
    apart = torch.arange(dims) * 0 + 2 * (targets % 2)[:, None].float()
    found = []
    for _ in range(1000 // dims + 2):
        noise = torch.randn(len(targets), dims, generator=generator)
        # Each even class is confused with the odd one beside it.
        logits = 9 * (one_hot(targets, 10) + one_hot(targets ^ 1, 10)).float()
        features = {"apart": 3 * (noise + apart), "alike": noise}
        found.append(list(confused_distances(features, logits, targets, 5).values()))
    apart_mean, alike_mean = torch.tensor(found).mean(0).tolist()
    assert apart_mean == pytest.approx(0.5, abs=0.04)
    assert alike_mean == pytest.approx(0, abs=0.04)


def test_distance_is_nan_where_it_cannot_be_measured() -> None:
    features = {"a": torch.randn(4, 3)}
    targets = torch.tensor([0, 0, 1, 1])
    assert math.isnan(confused_distances(features, torch.randn(4, 2), targets, 5)["a"])


def test_paired_difference_is_that_of_students_t() -> None:
    # Differences 1, 2, 3: standard deviation 1, quantile 4.303 for three of them.
    found = paired_difference([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    assert found.mean == pytest.approx(2)
    assert found.half == pytest.approx(4.302653 / math.sqrt(3))
    assert found.sign == 0
    assert paired_difference([5.0, 6.1], [1.0, 2.0]).sign == 1
    assert math.isnan(paired_difference([5.0], [1.0]).half)
    assert Difference(5.0, math.nan).sign == 0


def evaluation(correct: int) -> Evaluation:
    targets = torch.arange(1000) % 2
    predictions = torch.where(torch.arange(1000) < correct, targets, 1 - targets)
    return Evaluation(
        {"top-1": correct / 1000, "top-5": 1.0, "class": correct / 1000},
        predictions,
        targets,
        torch.arange(1000),
        torch.tensor([[0, 1]]),
        torch.tensor([0.2]),
        {"a": 0.5},
        {"a": 0.9},
    )


def result(correct: int, **row: float) -> Result:
    history = [{"step": 1, "cross_entropy": 1.0} | row]
    return Result(evaluation(correct), history, 10.0, 0.5)


@pytest.mark.parametrize(
    ("correct", "words"),
    [
        ([800], "cwbr hurt here: it lost 10.00 ± 1.86 points of top-1 accuracy"),
        ([960], "cwbr helped here: it gained 6.00 ± 1.47 points of top-1 accuracy"),
        ([901], "cwbr made no clear difference here: +0.10 ± 0.20 points of top-1 accuracy"),
        ([960, 961], "cwbr helped here: it gained 6.05 ± 0.64 points of top-1 accuracy"),
        ([901, 921], "cwbr made no clear difference here: +1.10 ± 12.71 points"),
    ],
)
def test_verdict_follows_from_the_numbers(correct: list[int], words: str) -> None:
    results = {"ce": [result(900) for _ in correct], "cwbr": [result(c) for c in correct]}
    notes = " ".join(footnotes(results, ["x", "y"], 64))
    assert words in notes
    assert ("One seed each" in notes) == (len(correct) == 1)
    assert ("by Student's t" in notes) == (len(correct) > 1)
    assert "silent" not in notes
    assert "x/y 20%" in notes
    assert f"{sum(correct) / len(correct) / 10 - 90:+.2f}" in table(results)


def test_silent_regularizer_is_called_so() -> None:
    rows = {"regularizer": 1e-9, "scale": 1e6}
    results = {"ce": [result(900)], "published": [result(900, **rows)]}
    notes = [note for note in footnotes(results, ["x", "y"], 64) if note.startswith("published")]
    assert notes[0].startswith("published was all but silent in 100% of the logged steps")
