"""The ablation pairs its runs, runs every method on every base, and counts what it says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ablation import bases, cost, data, settings, summary, training
from benchmarks.ablation.bases import BASES
from benchmarks.ablation.methods import METHODS
from benchmarks.ablation.summary import Job

CHARACTERS, TYPEFACES = "characters, 5 images", "typefaces"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three steps on small batches of a few images."""
    for name in (CHARACTERS, TYPEFACES):
        whole = settings.SETTINGS[name]
        brief = dataclasses.replace(
            whole, data=partial(whole.data, per_class=2), classes=20, steps=3, batch_size=16
        )
        monkeypatch.setitem(settings.SETTINGS, name, brief)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("base", "method"),
    [
        *(("cross-entropy", method) for method in METHODS),
        *((base, "CWBR") for base in BASES),
    ],
)
def test_every_method_and_every_base_trains_and_is_measured(base: str, method: str) -> None:
    result = training.run(Job(TYPEFACES, base, method, 0))
    assert all(0 <= result[part] <= 100 for part in data.PARTS)


@pytest.mark.usefixtures("short")
def test_every_method_starts_from_the_same_weights_and_ends_at_others() -> None:
    def trained(method: str) -> tuple[torch.Tensor, torch.Tensor]:
        run = training.Run(Job(CHARACTERS, "cross-entropy", method, 0))
        before = run.network.stem[0].weight.clone()
        run.train()
        return before, run.network.stem[0].weight

    starts, ends = zip(*map(trained, METHODS), strict=True)
    assert all(torch.equal(start, starts[0]) for start in starts)
    alone = list(METHODS).index("alone")
    changed = [m for m, end in zip(METHODS, ends, strict=True) if not torch.equal(end, ends[alone])]
    assert set(changed) >= {"CWBR", "published", *(m for m, e in METHODS.items() if e.rival)}


def test_batches_depend_on_the_seed_alone_and_every_image_is_moved_for_itself() -> None:
    images = settings.SETTINGS[CHARACTERS].data
    one, same, other = (list(images(200, seed).batches(4, 128)) for seed in (1, 1, 2))
    for (x, y), (x_same, y_same), (x_other, _) in zip(one, same, other, strict=True):
        assert torch.equal(x, x_same)
        assert torch.equal(y, y_same)
        assert not torch.equal(x, x_other)
    image = torch.zeros(2, 1, 32, 32)
    image[:, :, 12:20, 12:20] = 1
    limits = settings.CHARACTERS._replace(noise=0)
    moved = data.augmented(image, 0.0, limits, torch.Generator().manual_seed(0))
    assert not torch.equal(moved[0], moved[1])
    still = data.Augmentation(*[0.0] * 6)
    kept = data.augmented(image, 0.0, still, torch.Generator().manual_seed(0))
    torch.testing.assert_close(kept, image, atol=1e-5, rtol=0)


def test_shuffled_batches_show_every_image_once_before_any_again() -> None:
    batches = settings.SETTINGS[CHARACTERS].data(200, 0).batches(8, 125)
    counts = torch.cat([y for _, y in batches]).bincount(minlength=200)
    assert counts.eq(5).all()


@pytest.mark.parametrize(
    ("source", "names"), [(settings.GLYPHS_1000, "chars"), (settings.TYPEFACES, "faces")]
)
def test_every_class_is_in_every_part_as_often(source: data.Source, names: str) -> None:
    with np.load(source.path) as arrays:
        images = [arrays[f"x{part}"] for part in data.PARTS]
        for part in data.PARTS:
            counts = np.bincount(arrays[f"y{part}"], minlength=source.classes)
            assert counts.tolist() == [counts[0]] * source.classes
        assert len(set(arrays[names])) == source.classes
    assert max(part.max() for part in images) == 15
    blank = [int((part.reshape(len(part), -1).max(1) == 0).sum()) for part in images]
    assert blank == [0, 0, 0]


def test_the_margin_makes_the_own_class_harder_and_leaves_the_others() -> None:
    base = BASES["ArcFace"]
    logits, targets = 16 * torch.tensor([[0.9, 0.1, -0.2]]), torch.tensor([0])
    harder = bases._with_margin(logits, targets, base)
    assert harder[0, 0] == pytest.approx(16 * np.cos(np.arccos(0.9) + 0.2), rel=1e-5)
    assert torch.equal(harder[0, 1:], logits[0, 1:])


def result(test: float, val: float = 50.0) -> dict[str, Any]:
    return {"train": 90.0, "val": val, "test": test, "seconds": 1.0}


def test_gains_are_paired_by_seed_on_the_same_base() -> None:
    results = {
        Job(TYPEFACES, base, method, seed): result(accuracy)
        for base, method, accuracies in (
            ("ArcFace", "alone", (80, 90)),
            ("ArcFace", "CWBR", (82, 94)),
            ("ArcFace", "pull", (81, 91)),
            ("cross-entropy", "alone", (50, 50)),
        )
        for seed, accuracy in enumerate(accuracies)
    }
    found = {(row.base, row.method, row.against): row for row in summary.rows(results)}
    row = found["ArcFace", "CWBR", "alone"]
    # Differences 2 and 4: standard deviation sqrt(2), t of one degree of freedom 12.706.
    assert (row.seeds, row.gain, row.half) == pytest.approx((2, 3, 12.706), abs=1e-3)
    assert found["ArcFace", "CWBR", "pull"].gain == pytest.approx(2)
    assert ("cross-entropy", "CWBR", "alone") not in found


def test_the_mean_over_recipes_is_taken_by_seed_where_seeds_are_enough() -> None:
    gains = {"ArcFace": (1, 2, 3), "cross-entropy": (3, 2, 7), "mixup": (100, 100)}
    results = {
        Job(TYPEFACES, base, method, seed): result(80.0 + (gain if method == "CWBR" else 0))
        for base, own in gains.items()
        for seed, gain in enumerate(own)
        for method in ("alone", "CWBR")
    }
    (row,) = [row for row in summary.rows(results) if row.base == summary.MEAN]
    # By seed 2, 2 and 5: standard deviation sqrt(3), t of two degrees of freedom 4.303.
    assert (row.seeds, row.gain, row.half) == pytest.approx((3, 3, 4.303), abs=1e-3)


def test_cost_of_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "WARM_UP", 1)
    monkeypatch.setattr(cost, "STEPS", 3)
    threads = torch.get_num_threads()
    try:
        seconds, ratio = cost.measure(CHARACTERS)
    finally:
        torch.set_num_threads(threads)
    assert seconds > 0
    assert ratio > 0.5


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the summary is written."""
    monkeypatch.setattr(summary, "RESULTS", tmp_path)
    monkeypatch.setattr(summary, "CSV", tmp_path / "ablation.csv")
    monkeypatch.setattr(summary, "README", tmp_path / "README.md")
    summary.README.write_text("# Title\n<!-- ablation:start -->\nold\n<!-- ablation:end -->\nend\n")
    return tmp_path


def test_table_figure_and_readme_show_what_there_is(folder: Path) -> None:
    results = {
        Job(TYPEFACES, "ArcFace", method, seed): result(accuracy + seed)
        for method, accuracy in (("alone", 80.0), ("CWBR", 81.5), ("pull", 80.5))
        for seed in range(3)
    } | {
        Job(TYPEFACES, "mixup", method, 0): result(accuracy)
        for method, accuracy in (("alone", 70.0), ("CWBR", 69.0))
    }
    summary.publish(summary.rows(results))
    table, readme = (folder / "ablation.md").read_text(), summary.README.read_text()
    assert "| ArcFace | CWBR | 3 | 82.5 | +1.5 ± 0.0 | +0.0 |" in table
    assert "| mixup | CWBR | 1 | 69.0 | -1.0 (seeds: 1) | +0.0 |" in table
    assert "| ArcFace + CWBR | 81.0 **+1.5 ± 0.0** |" in readme
    assert readme.index("mixup + CWBR") < readme.index("ArcFace + CWBR") < readme.index("+ pull")
    assert "SupCon" not in readme
    assert "rival" not in readme
    assert "old" not in readme
    assert (folder / "ablation.png").stat().st_size > 1000


def test_validation_chooses_the_best_rival_among_those_with_most_seeds() -> None:
    many, few = range(3), range(1)
    results = {
        Job(TYPEFACES, "cross-entropy", method, seed): result(test, val)
        for method, test, val, seeds in (
            ("alone", 80.0, 50.0, many),
            ("center loss, 0.003", 82.0, 51.0, many),
            ("SupCon, 0.3", 81.0, 52.0, many),
            ("SupCon, 1.0", 99.0, 99.0, few),
            ("CWBR", 99.0, 99.0, many),
        )
        for seed in seeds
    }
    (best,) = summary.best_rivals(summary.rows(results))
    assert (best.method, best.gain) == ("SupCon, 0.3", 1.0)
    assert "| 80.0 +1.0 ± 0.0 (SupCon, 0.3) |" in summary.readme_table(summary.rows(results))


@pytest.mark.usefixtures("folder")
def test_tables_are_made_anew_from_the_csv_alone() -> None:
    results = {
        Job(TYPEFACES, "ArcFace", method, seed): result(accuracy + seed**2)
        for method, accuracy in (("alone", 80.0), ("CWBR", 81.5))
        for seed in range(3)
    }
    summary.record(results)
    assert summary.rows(summary.read()) == summary.rows(results)
    summary.publish(summary.rows(results))
    readme = summary.README.read_text()
    summary.publish(summary.rows(summary.read()))
    assert summary.README.read_text() == readme


@pytest.mark.usefixtures("folder")
def test_the_csv_keeps_every_run_and_takes_the_newer() -> None:
    old, kept = Job(TYPEFACES, "mixup", "alone", 0), Job(CHARACTERS, "ArcFace", "CWBR", 3)
    summary.record({old: result(80.0), kept: result(70.25)})
    summary.record({old: result(81.5)})
    assert summary.read() == {old: result(81.5), kept: result(70.25)}
