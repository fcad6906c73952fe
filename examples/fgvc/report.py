"""The result of a run: a table with footnotes in plain words, a CSV file, a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cwbr_fused.diagnostics import pair_error_rate
from fgvc.evaluation import Evaluation
from fgvc.log import Row

SILENT = 0.01  # of the cross-entropy
NO_OVERLAP = 1e-6  # mean rho of the confused pairs


class Result(NamedTuple):
    """One trained method."""

    evaluation: Evaluation
    history: list[Row]
    training_seconds: float
    regularizer_seconds: float


class Metric(NamedTuple):
    """A line of the table: one value for each method."""

    name: str
    unit: str
    values: list[float]


Results = Mapping[str, Result]


def metrics(results: Results) -> list[Metric]:
    """Every line of the table. The confusing pairs are the first method's, for all methods."""
    runs = list(results.values())
    pairs = runs[0].evaluation.pairs
    lines = [
        Metric("test accuracy", "%", [_percent(r.evaluation.correct) for r in runs]),
        Metric(
            f"error rate, {len(pairs)} confusing pairs",
            "%",
            [
                100 * float(pair_error_rate(e.predictions, e.targets, pairs).nanmean())
                for e in (r.evaluation for r in runs)
            ],
        ),
    ]
    for layer in runs[0].evaluation.overlaps:
        values = [r.evaluation.overlaps[layer] for r in runs]
        lines.append(Metric(f"mean overlap rho, {layer}", "", values))
    for layer in runs[0].evaluation.probes:
        values = [100 * r.evaluation.probes[layer] for r in runs]
        lines.append(Metric(f"linear probe accuracy, {layer}", "%", values))
    seconds = [r.regularizer_seconds for r in runs]
    shares = [100 * r.regularizer_seconds / r.training_seconds for r in runs]
    return [
        *lines,
        Metric("training time", "s", [r.training_seconds for r in runs]),
        Metric("of it in the regularizer", "s", seconds),
        Metric("regularizer's share of the time", "%", shares),
    ]


def _percent(correct: Any) -> float:
    return 100 * float(correct.double().mean())


def _cell(value: float, unit: str) -> str:
    digits = f"{value:.2f}" if unit else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def _difference(value: float, unit: str) -> str:
    digits = f"{value:+.2f}" if unit else f"{value:+.3g}"
    return f"{digits} {'points' if unit == '%' else unit}".strip()


def table(results: Results) -> str:
    """One column for each method, and its difference to the first."""
    names = list(results)
    rows = [["", *names, *(f"{name} - {names[0]}" for name in names[1:])]]
    for name, unit, values in metrics(results):
        cells = [_cell(v, unit) for v in values]
        cells += [_difference(v - values[0], unit) for v in values[1:]]
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:], rule])


def footnotes(results: Results, class_names: Sequence[str], top_m: int) -> list[str]:
    """What the numbers mean and, from the numbers, what the regularizer did."""
    names, runs = list(results), list(results.values())
    first = runs[0].evaluation
    shown = ", ".join(
        f"{class_names[i]}/{class_names[j]} {c:.0%}"
        for (i, j), c in zip(first.pairs[:5].tolist(), first.confusion[:5].tolist(), strict=True)
    )
    notes = [
        f"All of it is measured on the test part, but the confusing pairs are the "
        f"{len(first.pairs)} that {names[0]} confuses most on the validation part (most: {shown}, "
        "in softmax mass). Their error rate is the share of images of either class that is taken "
        "for the other.",
        f"Overlap: mean rho = exp(-D) of the {top_m} pairs a model confuses most. Probe: ridge "
        "regression on the frozen layer. Time in the regularizer: forward and backward, measured "
        "alone at every logged step.",
    ]
    for name, run in results.items():
        notes += _silence(name, run)
    for name, run in list(results.items())[1:]:
        notes.append(_verdict(name, names[0], run.evaluation, first))
    if len(runs) > 1:
        notes.append(
            "One seed each: repeat with other values of --seed before believing a small difference."
        )
    return notes


def _silence(name: str, run: Result) -> list[str]:
    """Where the regularizer, or its overlap in a layer, came to nothing."""
    rows = [row for row in run.history if row.get("scale", 0) != 0]
    if not rows:
        return []
    notes = []
    parts = [abs(row["regularizer"] * row["scale"]) / row["cross_entropy"] for row in rows]
    silent = sum(part < SILENT for part in parts) / len(rows)
    if silent > 0:
        notes.append(
            f"{name} was all but silent in {silent:.0%} of the logged steps: times its scale, its "
            f"value was below {SILENT:.0%} of the cross-entropy."
        )
    vanished = {
        layer: sum(row[f"rho {layer}"] < NO_OVERLAP for row in rows) / len(rows)
        for layer in run.evaluation.overlaps
    }
    shares = [f"{layer} in {share:.0%}" for layer, share in vanished.items() if share > 0]
    if shares:
        notes.append(
            f"{name} had next to no overlap to reduce (mean rho of the batch's confused pairs "
            f"below {NO_OVERLAP:g}) in {', '.join(shares)} of the logged steps."
        )
    return notes


def _verdict(name: str, base_name: str, run: Evaluation, base: Evaluation) -> str:
    """Paired over the test images: each is right or wrong under both models."""
    gain = 100 * (run.correct.double() - base.correct.double())
    mean = float(gain.mean())
    half = 1.96 * float(gain.std()) / math.sqrt(len(gain))
    amount = f"{abs(mean):.2f} ± {half:.2f} points of test accuracy"
    interval = "95 % interval over the test images"
    if mean + half < 0:
        return f"{name} hurt here: it lost {amount} against {base_name} ({interval})."
    if mean - half > 0:
        return f"{name} helped here: it gained {amount} over {base_name} ({interval})."
    return (
        f"{name} made no clear difference here: {mean:+.2f} ± {half:.2f} points of test accuracy "
        f"against {base_name} ({interval})."
    )


def write_csv(results: Results, path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "unit", *results])
        for name, unit, values in metrics(results):
            writer.writerow([name, unit, *values])


def write_figure(results: Results, path: Path) -> bool:
    """The picture; False, and none, without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    (accuracy, test, error_rate), (overlap, probes, time) = figure.subplots(2, 3)
    by_name = {line.name: line.values for line in metrics(results)}
    pairs_line = next(name for name in by_name if name.startswith("error rate"))
    _draw_training(accuracy, overlap, results)
    _draw_bars(test, "test accuracy", "%", results, by_name["test accuracy"])
    _draw_bars(error_rate, pairs_line, "%", results, by_name[pairs_line])
    _draw_probes(probes, results, by_name)
    spent = by_name["of it in the regularizer"]
    share = by_name["regularizer's share of the time"]
    labels = [f"{s:.2f} s\n{p:.2f} % of training" for s, p in zip(spent, share, strict=True)]
    _draw_bars(time, "time in the regularizer", "s", results, spent, labels)
    figure.savefig(path, dpi=110)
    return True


def _colours(results: Results) -> dict[str, str]:
    return {name: f"C{k}" for k, name in enumerate(results)}


def _draw_training(accuracy: Any, overlap: Any, results: Results) -> None:
    """What the log has of each step."""
    colours = _colours(results)
    for name, run in results.items():
        logged = [row for row in run.history if "loss" in row]
        steps = [row["step"] for row in logged]
        percent = [100 * row["accuracy"] for row in logged]
        accuracy.plot(steps, percent, color=colours[name], alpha=0.5, label=f"{name}, batch")
        checked = [row for row in run.history if "val_accuracy" in row]
        accuracy.plot(
            [row["step"] for row in checked],
            [100 * row["val_accuracy"] for row in checked],
            "o-",
            color=colours[name],
            label=f"{name}, validation",
        )
        for k, layer in enumerate(run.evaluation.overlaps):
            style = ("-", "--", ":", "-.")[k % 4]
            values = [row[f"rho {layer}"] for row in logged]
            overlap.plot(steps, values, style, color=colours[name], label=f"{name}, {layer}")
    accuracy.set(title="accuracy during training", xlabel="step", ylabel="%")
    accuracy.legend(fontsize=8)
    overlap.set(title="mean rho of the batch's confused pairs", xlabel="step")
    overlap.set_yscale("symlog", linthresh=1e-20)
    overlap.legend(fontsize=8, loc="lower left")


def _draw_bars(
    axes: Any,
    title: str,
    unit: str,
    results: Results,
    values: list[float],
    labels: list[str] | None = None,
) -> None:
    """A bar for each method, with its label or its value above it."""
    bars = axes.bar(list(results), values, color=list(_colours(results).values()))
    axes.bar_label(bars, labels, fmt="%.2f")
    axes.margins(y=0.2)
    axes.set(title=title, ylabel=unit)


def _draw_probes(axes: Any, results: Results, by_name: Mapping[str, list[float]]) -> None:
    """Of each layer the accuracy of its linear probe, the methods side by side."""
    layers = list(next(iter(results.values())).evaluation.overlaps)
    width = 0.8 / len(results)
    for k, (name, colour) in enumerate(_colours(results).items()):
        values = [by_name[f"linear probe accuracy, {layer}"][k] for layer in layers]
        places = [x + k * width for x in range(len(layers))]
        bars = axes.bar(places, values, width, align="edge", label=name, color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.margins(y=0.1)
    axes.set_xticks([x + 0.4 for x in range(len(layers))], layers)
    axes.set(title="linear probe accuracy, test", ylabel="%")
    axes.legend(fontsize=8, loc="lower right")
