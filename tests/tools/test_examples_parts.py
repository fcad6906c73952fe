"""The parts of the training example: data, sampling, learning rate, the words of its report."""

from __future__ import annotations

from pathlib import Path

import fake_vision
import fgvc.data
import pytest
import torch
from example_inputs import use_few_glyphs
from fgvc.data import Glyphs, ShuffledBatches, first_per_class, make_sampler, spread
from fgvc.evaluation import Evaluation
from fgvc.report import Result, footnotes, table
from fgvc.training import learning_rate_factor


@pytest.fixture(autouse=True)
def few_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_glyphs(tmp_path, monkeypatch)


def test_parts_that_a_folder_lacks_are_split_off_without_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_vision.install(monkeypatch)
    fake_vision.make_folder(Path("flat"), [""], per_class=20)
    fake_vision.make_folder(Path("partial"), ["train", "test"], per_class=20)
    for root, test_size in (("flat", 9), ("partial", 60)):
        images = fgvc.data.Folder(Path(root), 8, None, 0, seed=0)
        seen = {
            part: [tuple(x.flatten().tolist()) for batch, _ in images.plain(part) for x in batch]
            for part in fgvc.data.PARTS
        }
        assert len(seen["val"]) == 9  # 15 % of 20, for each of three classes
        assert len(seen["test"]) == test_size
        assert len(seen["train"]) == 60 - 9 - (9 if root == "flat" else 0)
        together = [image for part in seen.values() for image in part]
        assert len(set(together)) == len(together)


def test_augmentation_of_an_image_depends_on_the_epoch_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_vision.install(monkeypatch)
    fake_vision.make_folder(Path("flat"), [""], per_class=20)
    for images in (fgvc.data.Folder(Path("flat"), 8, None, 0, seed=0), Glyphs(None, seed=0)):
        batches = [[0, 5, 7, 9, 11, 12, 13, 17], [3, 1, 2, 4, 6, 8, 10, 14]]
        both = [x for x, _ in images.train(batches, epoch=1)]
        state = torch.get_rng_state()
        (second,) = (x for x, _ in images.train(batches[1:], epoch=1))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(both[1], second)
        assert not torch.equal(both[1], next(images.train(batches[1:], epoch=2))[0])


def test_glyphs_are_shifted_by_at_most_two_pixels_and_keep_their_targets() -> None:
    glyphs = Glyphs(images_per_class=3, seed=0)
    (images, targets), *_ = glyphs.train([list(range(18))], epoch=0)
    plain, plain_targets = next(glyphs.plain("train"))
    assert torch.equal(targets, plain_targets)
    background = plain.min()
    for image, original in zip(images[:, 0], plain[:, 0], strict=True):
        candidates = [
            torch.roll(original, (dy, dx), (0, 1)) for dy in range(-2, 3) for dx in range(-2, 3)
        ]
        inner = image[2:-2, 2:-2]
        assert any(torch.equal(inner, c[2:-2, 2:-2]) for c in candidates)
        assert image.min() == background


def test_images_per_class_takes_that_many_of_each() -> None:
    targets = torch.tensor([2, 0, 0, 1, 2, 0, 1, 2, 2])
    chosen = first_per_class(targets, 2, seed=0)
    assert targets[chosen].bincount().tolist() == [2, 2, 2]
    assert torch.equal(first_per_class(targets, None, seed=0), torch.arange(9))


def test_spread_covers_both_ends_evenly() -> None:
    assert spread(10, None).tolist() == list(range(10))
    assert spread(10, 50).tolist() == list(range(10))
    assert spread(9, 3).tolist() == [0, 3, 6]


def test_shuffled_epochs_are_full_batches_of_distinct_images() -> None:
    sampler = ShuffledBatches(50, 16, seed=3)
    epochs = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        epochs.append([i for batch in sampler for i in batch])
        assert len(set(epochs[-1])) == len(epochs[-1]) == 48
    assert epochs[0] != epochs[1]
    assert len(make_sampler("pk", torch.arange(40) % 4, 16, 2, 5, seed=0)) == 4


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.2)
    assert factors[5] == max(factors) == 1
    assert factors[-1] < 0.001
    assert learning_rate_factor(0, 1) == 1


def result(correct: int, regularizer: float, scale: float) -> Result:
    targets = torch.arange(1000) % 2
    predictions = torch.where(torch.arange(1000) < correct, targets, 1 - targets)
    evaluation = Evaluation(
        predictions, targets, torch.tensor([[0, 1]]), torch.tensor([0.2]), {"a": 0.5}, {"a": 0.9}
    )
    row = {"step": 1, "cross_entropy": 1.0, "regularizer": regularizer, "scale": scale}
    row["rho a"] = regularizer
    return Result(evaluation, [row], 10.0, 0.5 * (scale > 0))


@pytest.mark.parametrize(
    ("correct", "words"),
    [
        (800, "plain hurt here: it lost 10.00 ± 1.86 points"),
        (960, "plain helped here: it gained 6.00 ± 1.47 points"),
        (901, "plain made no clear difference here: +0.10 ± 0.20 points"),
    ],
)
def test_verdict_follows_from_the_numbers(correct: int, words: str) -> None:
    results = {"ce": result(900, 0, 0), "plain": result(correct, 0.5, 1.0)}
    notes = " ".join(footnotes(results, ["x", "y"], 64))
    assert words in notes
    assert "silent" not in notes
    assert "no overlap" not in notes
    assert "x/y 20%" in notes
    assert f"{(correct - 900) / 10:+.2f} points" in table(results)


@pytest.mark.parametrize(("value", "scale"), [(0.0, 1e6), (1e-9, 1e6)])
def test_silent_regularizer_is_called_so(value: float, scale: float) -> None:
    results = {"ce": result(900, 0, 0), "plain": result(900, value, scale)}
    notes = [note for note in footnotes(results, ["x", "y"], 64) if note.startswith("plain")]
    assert notes[0].startswith("plain was all but silent in 100% of the logged steps")
    assert "(mean rho of the batch's confused pairs below 1e-06) in a in 100%" in notes[1]
