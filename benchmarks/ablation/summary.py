"""Paired differences to cross-entropy with 95 % intervals: a CSV, a table and a figure."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.ablation.methods import METHODS
from benchmarks.markdown import insert_table
from cwbr_fused.diagnostics import pair_error_rate

README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(__file__).parents[1] / "results"
BASELINES = ("ce", "ce pk")
CONFUSION = ("CWBR", "pull")
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
README_METHODS = {
    "ce": "cross-entropy",
    "ce again": "cross-entropy, another start",
    "ce pk": "cross-entropy, P x K batches",
    "published": "published form",
    "repaired": "published form, repaired",
    "pair bank": "bank of pairs",
    "random push": "CWBR, random partners",
    "pull": "CWBR without push",
    "CWBR": "**CWBR**",
}
FIGURE_METHODS = {
    "ce again": "another start",
    "ce pk": "P x K batches",
    "pull": "pull only",
    "CWBR": "CWBR",
}
ACCURACY, PAIRS = "test accuracy", "error on confusing pairs"


class Job(NamedTuple):
    """One training run."""

    setting: str
    method: str
    seed: int

    def path(self, folder: Path) -> Path:
        return folder / (re.sub(r"\W+", "-", "-".join(map(str, self))) + ".npz")


class Row(NamedTuple):
    """One metric of one method in one setting, in percent, over `seeds` paired runs."""

    setting: str
    method: str
    metric: str
    seeds: int
    mean: float
    sd: float
    baseline: str
    difference: float
    low: float
    high: float


Results = dict[Job, Any]


def load(folder: Path, settings: Iterable[str], seeds: Iterable[int]) -> Results:
    jobs = [Job(s, m, seed) for s in settings for m in METHODS for seed in seeds]
    return {job: np.load(job.path(folder)) for job in jobs if job.path(folder).exists()}


def metrics(result: Any, pairs: Any) -> dict[str, float]:
    """In percent; the error of `pairs`, which another run picked on the validation fonts."""
    predictions, targets = (torch.from_numpy(result[k]).long() for k in ("predictions", "targets"))
    error = pair_error_rate(predictions, targets, torch.from_numpy(pairs).long()).nanmean()
    probes = {f"probe of layer {i}": float(p) for i, p in enumerate(result["probes"], 1)}
    accuracy = float((predictions == targets).double().mean())
    values = {
        "validation accuracy": float(result["val_accuracy"]),
        ACCURACY: accuracy,
        PAIRS: float(error),
        **probes,
    }
    return {name: 100 * value for name, value in values.items()}


def rows(results: Results) -> list[Row]:
    """Every metric beside that of the cross-entropy whose sampler did better on validation.

    Then the recommended form beside its own pull alone: what the confusion adds.
    """
    found = []
    for setting in dict.fromkeys(job.setting for job in results):
        values = {}
        for job, result in results.items():
            reference = results.get(Job(setting, "ce", job.seed))
            if job.setting == setting and reference is not None:
                values[job.method, job.seed] = metrics(result, reference["pairs"])
        baseline = _better_baseline(values)
        for method, baseline in (*((m, baseline) for m in METHODS), CONFUSION):
            seeds = [s for m, s in values if m == method and (baseline, s) in values]
            for metric in values[method, seeds[0]] if seeds else ():
                own = np.array([values[method, s][metric] for s in seeds])
                gap = own - np.array([values[baseline, s][metric] for s in seeds])
                mean, half = float(gap.mean()), _half_width(gap)
                found.append(
                    Row(
                        *(setting, method, metric, len(own), float(own.mean()), _sd(own)),
                        *(baseline, mean, mean - half, mean + half),
                    )
                )
    return found


def _better_baseline(values: dict[tuple[str, int], dict[str, float]]) -> str:
    """Chosen on validation, over the seeds that both have; "ce" where only that was run."""
    both = [s for m, s in values if m == "ce pk" and ("ce", s) in values]
    if not both:
        return "ce"
    accuracy = {b: sum(values[b, s]["validation accuracy"] for s in both) for b in BASELINES}
    return max(BASELINES, key=lambda b: accuracy[b])


def _sd(values: Any) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else float("nan")


def _half_width(values: Any) -> float:
    """Of the 95 % interval of the mean; NaN for one value."""
    freedom = len(values) - 1
    return T_QUANTILE[freedom - 1] * _sd(values) / len(values) ** 0.5 if freedom else float("nan")


def table(found: list[Row]) -> str:
    """Markdown: per setting and method the mean of each metric and its paired difference."""
    lines = []
    for setting in dict.fromkeys(row.setting for row in found):
        own = [row for row in found if row.setting == setting and row.baseline in BASELINES]
        added = [row for row in found if row.setting == setting and row not in own]
        names = list(dict.fromkeys(row.metric for row in own))
        head = ["method", "seeds", *names]
        lines += [f"**{setting}**, differences to {own[0].baseline}", ""]
        lines += [" | ".join(["", *head, ""]).strip(), "|---" * len(head) + "|"]
        for method in dict.fromkeys(row.method for row in own):
            lines.append(_line(method, [row for row in own if row.method == method]))
        if added:
            lines.append(_line("CWBR against pull", added))
        lines.append("")
    lines += [f"- {name}: {method.what}." for name, method in METHODS.items()]
    return "\n".join(lines) + "\n"


def _line(title: str, cells: list[Row]) -> str:
    values = [title, str(cells[0].seeds), *map(_cell, cells)]
    return " | ".join(["", *values, ""]).strip()


def _cell(row: Row) -> str:
    if row.method == row.baseline:
        return f"{row.mean:.1f}"
    interval = "" if np.isnan(row.low) else f" [{row.low:+.1f}, {row.high:+.1f}]"
    return f"{row.mean:.1f}: {row.difference:+.1f}{interval}"


def readme_table(found: list[Row]) -> str:
    """Test accuracy by method and setting, with the paired gain over cross-entropy."""
    own = [row for row in found if row.baseline in BASELINES and row.metric == ACCURACY]
    settings = list(dict.fromkeys(row.setting for row in own))
    lines = [
        " | ".join(["| test accuracy, %", *settings, ""]).strip(),
        "|---" * (len(settings) + 1) + "|",
    ]
    for method, title in README_METHODS.items():
        cells = {row.setting: row for row in own if row.method == method}
        if cells:
            values = [_short(cells.get(setting)) for setting in settings]
            lines.append(" | ".join(["", title, *values, ""]).strip())
    return "\n".join(lines) + "\n"


def _short(row: Row | None) -> str:
    if row is None:
        return ""
    if row.method == row.baseline:
        return f"{row.mean:.1f}"
    half = "" if np.isnan(row.low) else f" ± {(row.high - row.low) / 2:.1f}"
    return f"{row.mean:.1f} ({row.difference:+.1f}{half})"


def draw(found: list[Row], path: Path) -> None:
    """The differences of test accuracy, pairs and probes as points with intervals.

    Of what has three seeds; random partners, far off the scale, are in the table.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    found = [row for row in found if row.baseline in BASELINES and row.seeds >= 3]
    settings = list(dict.fromkeys(row.setting for row in found))
    names = [m for m in dict.fromkeys(row.metric for row in found) if "valid" not in m]
    figure, axes = plt.subplots(
        *(len(settings), len(names)),
        figsize=(2.1 * len(names) + 1.5, 1.05 * len(settings) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9)
    for line, setting in zip(axes, settings, strict=True):
        for axis, name in zip(line, names, strict=True):
            _draw_one(axis, [r for r in found if (r.setting, r.metric) == (setting, name)])
            if axis is not line[0]:
                axis.set_yticklabels([])
        line[0].set_ylabel(setting.replace(", ", "\n"), fontsize=9)
    figure.supxlabel("percentage points against cross-entropy, paired, 95 % intervals", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_one(axis: Any, cells: list[Row]) -> None:
    shown = [row for row in cells if row.method in FIGURE_METHODS and row.method != row.baseline]
    for place, row in enumerate(shown):
        color = "C3" if row.method == "CWBR" else "C7"
        axis.plot([row.low, row.high], [place, place], color=color, linewidth=2)
        axis.plot(row.difference, place, "o", color=color, markersize=5)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(shown)), [FIGURE_METHODS[row.method] for row in shown])
    axis.set_ylim(len(shown) - 0.4, -0.6)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def summarise(results: Results) -> None:
    """Writes ablation.csv, .md and .png and prints the table."""
    found = rows(results)
    with (RESULTS / "ablation.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows([f"{x:.3f}" if isinstance(x, float) else x for x in row] for row in found)
    text = table(found)
    (RESULTS / "ablation.md").write_text(text)
    print(text)
    draw(found, RESULTS / "ablation.png")
    README.write_text(insert_table(README.read_text(), "ablation", readme_table(found)))
