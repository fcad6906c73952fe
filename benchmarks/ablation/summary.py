"""Paired gains on top of each base with 95 % intervals: a CSV, a table and a figure."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ablation.methods import METHODS
from benchmarks.markdown import insert_table

README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(__file__).parents[1] / "results"
ALONE, OURS = "alone", "CWBR"
# Two-sided 95 % quantiles of Student's t by degrees of freedom.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


class Job(NamedTuple):
    """One training run."""

    setting: str
    base: str
    method: str
    seed: int

    def path(self, folder: Path) -> Path:
        return folder / (re.sub(r"\W+", "-", "-".join(map(str, self))) + ".npz")


class Row(NamedTuple):
    """A method on a base in a setting: test accuracy in %, and its paired gain over `against`."""

    setting: str
    base: str
    method: str
    against: str
    seeds: int
    mean: float
    gain: float
    half: float  # of the 95 % interval of the gain; NaN for one seed
    val_gain: float
    train: float


Results = Mapping[Job, Mapping[str, Any]]


def load(folder: Path, jobs: Iterable[Job]) -> dict[Job, dict[str, float]]:
    """The results of those jobs that have been run."""
    results = {}
    for job in jobs:
        if job.path(folder).exists():
            with np.load(job.path(folder)) as arrays:
                results[job] = {name: float(arrays[name]) for name in arrays}
    return results


def rows(results: Results) -> list[Row]:
    """Every method against its base alone, and the recommended form against its pull alone."""
    cells = dict.fromkeys((job.setting, job.base, job.method) for job in results)
    found = [_row(results, *cell, ALONE) for cell in cells]
    found += [_row(results, *cell, "pull") for cell in cells if cell[2] == OURS]
    return [row for row in found if row is not None]


def _row(results: Results, setting: str, base: str, method: str, against: str) -> Row | None:
    pairs = [
        (result, results[other])
        for job, result in results.items()
        if job[:3] == (setting, base, method)
        and (other := Job(setting, base, against, job.seed)) in results
    ]
    if not pairs:
        return None
    own, train = (np.array([one[part] for one, _ in pairs]) for part in ("test", "train"))
    gain, val = (
        np.array([one[part] - other[part] for one, other in pairs]) for part in ("test", "val")
    )
    return Row(
        *(setting, base, method, against, len(pairs), float(own.mean())),
        *(float(gain.mean()), _half_width(gain), float(val.mean()), float(train.mean())),
    )


def _half_width(values: Any) -> float:
    """Of the 95 % interval of the mean; NaN for one value."""
    freedom = len(values) - 1
    if not freedom:
        return float("nan")
    return T_QUANTILE[freedom - 1] * float(values.std(ddof=1)) / len(values) ** 0.5


def table(found: list[Row]) -> str:
    """Markdown: by setting and base the accuracy alone, and what every method adds to it."""
    lines = []
    for setting in dict.fromkeys(row.setting for row in found):
        own = [row for row in found if row.setting == setting and row.against == ALONE]
        lines += [
            f"**{setting}**",
            "",
            "| base | method | seeds | test, % | gain | on validation |",
        ]
        lines.append("|---" * 6 + "|")
        for row in own:
            gain = "" if row.method == ALONE else f"{row.gain:+.1f}{_interval(row)}"
            val = "" if row.method == ALONE else f"{row.val_gain:+.1f}"
            cells = row.base, row.method, row.seeds, f"{row.mean:.1f}", gain, val
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    lines += [f"- {name}: {method.what}." for name, method in METHODS.items()]
    return "\n".join(lines) + "\n"


def _interval(row: Row) -> str:
    return "" if np.isnan(row.half) else f" ± {row.half:.1f}"


def readme_table(found: list[Row]) -> str:
    """By base: the accuracy alone and what `CWBR` adds, in each setting; then rivals likewise."""
    settings = list(dict.fromkeys(row.setting for row in found))
    cells = {(row.setting, row.base, row.method): row for row in found if row.against == ALONE}
    lines = [
        "| test accuracy, %: alone, and what is added | " + " | ".join(settings) + " |",
        "|---" * (len(settings) + 1) + "|",
    ]
    for base in dict.fromkeys(row.base for row in found):
        values = [_cell(cells, setting, base, OURS) for setting in settings]
        lines.append(f"| {base}, CWBR | " + " | ".join(values) + " |")
        others = dict.fromkeys(row.method for row in found if row.base == base)
        for method in others:
            if method not in (ALONE, OURS):
                values = [_cell(cells, setting, base, method) for setting in settings]
                lines.append(f"| {base}, {method} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _cell(cells: Mapping[tuple[str, str, str], Row], setting: str, base: str, method: str) -> str:
    row = cells.get((setting, base, method))
    if row is None:
        return ""
    gain = f"{row.gain:+.1f}{_interval(row)}"
    return f"{row.mean - row.gain:.1f} {f'**{gain}**' if method == OURS else gain}"


def draw(found: list[Row], path: Path) -> None:
    """What `CWBR` and the rivals add to each base, a panel for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [r for r in found if r.against == ALONE and r.method != ALONE and r.seeds > 1]
    settings = list(dict.fromkeys(row.setting for row in shown))
    names = list(dict.fromkeys((row.base, row.method) for row in shown))
    figure, axes = plt.subplots(
        *(1, len(settings)),
        figsize=(3.2 * len(settings) + 1.6, 0.24 * len(names) + 0.9),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, setting in zip(axes[0], settings, strict=True):
        axis.set_title(setting, fontsize=9)
        for row in shown:
            if row.setting == setting:
                place = names.index((row.base, row.method))
                color = "C3" if row.method == OURS else "C7"
                axis.plot([row.gain - row.half, row.gain + row.half], [place, place], color=color)
                axis.plot(row.gain, place, "o", color=color, markersize=4)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    axes[0][0].set_yticks(range(len(names)), [f"{base}, {method}" for base, method in names])
    axes[0][0].invert_yaxis()
    figure.supxlabel(
        "points of test accuracy added to the base, paired, 95 % intervals", fontsize=9
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


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
