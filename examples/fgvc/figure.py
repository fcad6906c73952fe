"""The pictures of a run: what happened in training, and what the model confuses."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fgvc.data import Images
from fgvc.evaluation import SCORES, Evaluation
from fgvc.log import by_layer
from fgvc.results import Metric, Result, Results, metrics

SHOWN_PAIRS, EXAMPLES = 8, 3


def new_figure(width: float, height: float) -> Any:
    """A matplotlib figure; None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def write_figure(results: Results, path: Path) -> bool:
    """The table as a picture, with the course of the first seed; False without matplotlib."""
    figure = new_figure(14, 8)
    if figure is None:
        return False
    (accuracy, scores, errors), (distance, probes, time) = figure.subplots(2, 3)
    lines = {line.name: line for line in metrics(results)}
    error_line = next(name for name in lines if name.startswith("error rate"))
    _draw_accuracy(accuracy, [runs[0] for runs in results.values()])
    _draw_distances(distance, [runs[0] for runs in results.values()])
    titles = dict(zip(SCORES.values(), ("top-1", "top-5", "mean of\nclasses"), strict=True))
    _draw_groups(scores, {titles[n]: lines[n] for n in titles}, list(results), "test accuracy, %")
    names = [name for name in lines if name.startswith("linear probe")]
    layers = {name.rpartition(", ")[2]: lines[name] for name in names}
    _draw_groups(probes, layers, list(results), "linear probe accuracy, test, %")
    _draw_groups(errors, {"": lines[error_line]}, list(results), f"{error_line}, %")
    share = {"": lines["regularizer's share of the time"]}
    _draw_groups(time, share, list(results), "regularizer's share of the training time, %")
    handles, labels = scores.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    figure.savefig(path, dpi=110)
    return True


def _draw_accuracy(axes: Any, runs: Sequence[Result]) -> None:
    for k, run in enumerate(runs):
        logged = [row for row in run.history if "loss" in row]
        checked = [row for row in run.history if "val top-1" in row]
        axes.plot(
            [row["step"] for row in logged],
            [100 * row["accuracy"] for row in logged],
            color=f"C{k}",
            alpha=0.4,
            label="training batches" if k == 0 else None,
        )
        axes.plot(
            [row["step"] for row in checked],
            [100 * row["val top-1"] for row in checked],
            "o-",
            color=f"C{k}",
            label="validation" if k == 0 else None,
        )
    axes.set(title="accuracy during training, %", xlabel="step")
    axes.legend(fontsize=8)


def _draw_distances(axes: Any, runs: Sequence[Result]) -> None:
    """The distance that the log has, smoothed: each is of one batch."""
    for k, run in enumerate(runs):
        logged = [row for row in run.history if "loss" in row]
        steps = [row["step"] for row in logged]
        for style, layer in enumerate(run.evaluation.distances):
            values = _smooth([by_layer(row, "distance")[layer] for row in logged])
            line = ("-", "--", ":", "-.")[style % 4]
            axes.plot(steps, values, line, color=f"C{k}", label=layer if k == 0 else None)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(title="distance of confused classes, per dimension", xlabel="step")
    axes.legend(fontsize=8)


def _smooth(values: Sequence[float], keep: float = 0.7) -> list[float]:
    """A moving average that starts without a bias and leaves NaN out."""
    total = weight = 0.0
    smooth = []
    for value in values:
        if value == value:
            total, weight = keep * total + value, keep * weight + 1
        smooth.append(total / weight if weight else float("nan"))
    return smooth


def _draw_groups(
    axes: Any, groups: Mapping[str, Metric], methods: Sequence[str], title: str
) -> None:
    """Bars of the means over seeds, the methods side by side; dots are the single seeds."""
    width = 0.8 / len(methods)
    for k, name in enumerate(methods):
        places = [x + (k + 0.5) * width for x in range(len(groups))]
        values = [metric.values[k] for metric in groups.values()]
        means = [statistics.fmean(v) for v in values]
        bars = axes.bar(places, means, 0.9 * width, color=f"C{k}", label=name)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        if len(values[0]) > 1:
            for place, seeds in zip(places, values, strict=True):
                axes.plot([place] * len(seeds), seeds, "k.", markersize=4)
    axes.margins(y=0.15)
    axes.set_xticks([x + 0.4 for x in range(len(groups))], list(groups))
    axes.set_title(title)


def write_pairs(evaluation: Evaluation, images: Images, path: Path) -> bool:
    """The most confused pairs in pictures: images of both classes, and some that were taken for
    the other one; False without matplotlib."""
    pairs = evaluation.pairs[:SHOWN_PAIRS].tolist()
    figure = new_figure(10, 1.5 * len(pairs) + 0.5)
    if figure is None:
        return False
    names, font = images.class_names, _font_for("".join(images.class_names))
    if font is None:
        names = [f"class {k}" for k in range(len(names))]
    grid = figure.subplots(len(pairs), 3 * EXAMPLES, squeeze=False)
    for row, (i, j), confusion in zip(grid, pairs, evaluation.confusion.tolist(), strict=False):
        swapped = _taken_for(evaluation, i, j) + _taken_for(evaluation, j, i)
        shown = (
            (names[i], _examples(evaluation, i)),
            (names[j], _examples(evaluation, j)),
            (f"taken for the other ({confusion:.0%})", swapped),
        )
        for k, (title, indices) in enumerate(shown):
            cells = row[k * EXAMPLES : (k + 1) * EXAMPLES]
            family = ["sans-serif"] if title.isascii() else font
            cells[0].set_title(title, fontsize=9, loc="left", fontfamily=family)
            for axes, index in zip(cells, [*indices, *[None] * EXAMPLES], strict=False):
                axes.set_axis_off()
                if index is not None:
                    axes.imshow(images.picture("test", index), cmap="gray")
    figure.savefig(path, dpi=110)
    return True


def _examples(evaluation: Evaluation, target: int) -> list[int]:
    return _places(evaluation, (evaluation.targets == target) & evaluation.correct) or _places(
        evaluation, evaluation.targets == target
    )


def _taken_for(evaluation: Evaluation, target: int, prediction: int) -> list[int]:
    wrong = (evaluation.targets == target) & (evaluation.predictions == prediction)
    return _places(evaluation, wrong)


def _places(evaluation: Evaluation, chosen: Tensor) -> list[int]:
    indices: list[int] = evaluation.indices[torch.nonzero(chosen).squeeze(1)].tolist()
    return indices[:EXAMPLES]


def _font_for(text: str) -> str | None:
    """An installed font family that has all of the text's characters, if there is one."""
    from matplotlib import font_manager

    for entry in font_manager.fontManager.ttflist:
        # "Last Resort" has a sign for every script in place of its characters.
        if "Last Resort" not in entry.name:
            characters = font_manager.get_font(entry.fname).get_charmap()
            if all(ord(char) in characters for char in text):
                return entry.name
    return None
