"""The ablation pairs its runs, runs every method, and counts what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.ablation import cost, settings, summary, training
from benchmarks.ablation.methods import METHODS
from benchmarks.ablation.summary import Job

SETTING = "resnet, 5 images"
MANY_CLASSES = "resnet, 1000 classes"


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three steps on small batches."""
    for name in (SETTING, MANY_CLASSES):
        brief = dataclasses.replace(
            settings.SETTINGS[name], steps=3, batch_size=16, images_per_class=2
        )
        monkeypatch.setitem(settings.SETTINGS, name, brief)
    monkeypatch.setattr(training, "EVALUATION_BATCH", 64)
    load = np.load

    def few(path: Path) -> Any:
        arrays = dict(load(path))
        for part in ("val", "test"):
            for key in (f"x{part}", f"y{part}"):
                arrays[key] = arrays[key][:300]
        return _Context(arrays)

    monkeypatch.setattr(settings.np, "load", few)


class _Context(dict[str, Any]):
    def __enter__(self) -> _Context:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize(
    ("setting", "method"), [*((SETTING, method) for method in METHODS), (MANY_CLASSES, "CWBR")]
)
def test_every_method_trains_and_is_measured(setting: str, method: str) -> None:
    threads = torch.get_num_threads()
    try:
        result = training.run(setting, method, 0)
    finally:
        torch.set_num_threads(threads)
    assert result["predictions"].shape == (300,)
    assert result["pairs"].shape == (20, 2)
    assert ((result["probes"] >= 0) & (result["probes"] <= 1)).all()


def test_batches_depend_on_the_seed_alone() -> None:
    brief = dataclasses.replace(settings.SETTINGS[SETTING], steps=4)
    one, same, other = (list(settings.Glyphs(brief, s).batches("shuffle")) for s in (1, 1, 2))
    for (x, y), (x_same, y_same), (x_other, _) in zip(one, same, other, strict=True):
        assert torch.equal(x, x_same)
        assert torch.equal(y, y_same)
        assert not torch.equal(x, x_other)


def test_shuffled_batches_show_every_image_once_before_any_again() -> None:
    brief = dataclasses.replace(settings.SETTINGS[SETTING], steps=8, batch_size=125)
    data = settings.Glyphs(brief, 0)
    counts = torch.cat([y for _, y in data.batches("shuffle")]).bincount(minlength=200)
    assert counts.eq(5).all()


def test_every_class_is_in_every_part_as_often_and_no_image_twice() -> None:
    with np.load(settings.GLYPHS_1000.path) as arrays:
        images = np.concatenate([arrays[f"x{part}"] for part in settings.PARTS])
        for part in settings.PARTS:
            counts = np.bincount(arrays[f"y{part}"], minlength=settings.GLYPHS_1000.classes)
            assert counts.tolist() == [counts[0]] * settings.GLYPHS_1000.classes
        assert len(set(arrays["chars"])) == settings.GLYPHS_1000.classes
    assert images.max() == 15
    # No blank among them, and no box for a character that a font lacks.
    assert len({image.tobytes() for image in images}) == len(images)


def result(accuracy: float, val: float, pairs: Any = ((0, 1),)) -> dict[str, Any]:
    """Of 100 samples of class 0 and 100 of class 1, taken for each other at the error rate."""
    targets = np.repeat([0, 1], 100)
    wrong = np.arange(200) % 100 >= 100 * accuracy
    return {
        "predictions": np.where(wrong, 1 - targets, targets).astype(np.int16),
        "targets": targets.astype(np.int16),
        "pairs": np.array(pairs, dtype=np.int16),
        "probes": np.array([accuracy / 2]),
        "val_accuracy": np.array(val),
    }


def test_differences_are_paired_and_against_the_better_baseline() -> None:
    runs = {
        "ce": ([0.80, 0.90], 0.7),
        "ce pk": ([0.84, 0.92], 0.8),
        "CWBR": ([0.86, 0.96], 0.9),
    }
    results = {
        Job(SETTING, method, seed): result(accuracy, val)
        for method, (accuracies, val) in runs.items()
        for seed, accuracy in enumerate(accuracies)
    }
    found = {(row.method, row.metric): row for row in summary.rows(results)}
    row = found["CWBR", summary.ACCURACY]
    assert row.baseline == "ce pk"
    assert row.difference == pytest.approx(3)
    # Differences 2 and 4: standard deviation sqrt(2), t of one degree of freedom 12.706.
    assert row.high - row.low == pytest.approx(2 * 12.706)
    assert found["CWBR", summary.PAIRS].difference == pytest.approx(-3)
    assert found["CWBR", "probe of layer 1"].difference == pytest.approx(1.5)


def test_pairs_are_those_of_the_cross_entropy_run() -> None:
    results = {
        Job(SETTING, "ce", 0): result(0.8, 0.7, pairs=((0, 1),)),
        Job(SETTING, "CWBR", 0): result(0.9, 0.7, pairs=((2, 3),)),
    }
    found = {(row.method, row.metric): row for row in summary.rows(results)}
    assert found["CWBR", summary.PAIRS].mean == pytest.approx(10)


def test_the_recommended_form_is_also_compared_with_its_pull() -> None:
    results = {
        Job(SETTING, method, 0): result(accuracy, 0.7)
        for method, accuracy in (("ce", 0.8), ("pull", 0.88), ("CWBR", 0.9))
    }
    found = {(row.method, row.baseline, row.metric): row for row in summary.rows(results)}
    assert found["CWBR", "pull", summary.ACCURACY].difference == pytest.approx(2)
    assert found["CWBR", "ce", summary.ACCURACY].difference == pytest.approx(10)
    assert "CWBR against pull | 1 | " in summary.table(summary.rows(results))


def test_cost_of_a_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "WARM_UP", 1)
    monkeypatch.setattr(cost, "STEPS", 3)
    threads = torch.get_num_threads()
    try:
        seconds, ratio = cost.measure(SETTING)
    finally:
        torch.set_num_threads(threads)
    assert seconds > 0
    assert ratio > 0.5


def test_table_and_figure_show_what_there_is(tmp_path: Path) -> None:
    results = {
        Job(SETTING, method, seed): result(0.8 + 0.01 * seed, 0.7)
        for method in ("ce", "CWBR")
        for seed in range(3)
    }
    found = summary.rows(results)
    text = summary.table(found)
    assert "| CWBR | 3 |" in text
    assert "ce pk |" not in text
    assert "| **CWBR** | 81.0 (+0.0 ± 0.0) |" in summary.readme_table(found)
    summary.draw(found, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 1000
