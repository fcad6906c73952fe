"""Paired gains on top of each base with 95 % intervals: a CSV, a table and a figure."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.ablation.bases import BASES
from benchmarks.ablation.methods import METHODS
from benchmarks.ablation.settings import SETTINGS
from benchmarks.markdown import insert_table

README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(__file__).parents[1] / "results"
CSV = RESULTS / "ablation.csv"
ALONE, OURS, MEAN = "alone", "CWBR", "mean of the recipes"
# The interval of two says nothing that a reader can use.
LEAST_SEEDS = 3
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
    """Every method against its base alone; the recommended form also against its pull alone.

    Where two bases or more have enough seeds, the base `MEAN` is the mean over them, by seed.
    """
    cells = dict.fromkeys((job.setting, job.base, job.method) for job in results)
    found = [_row(results, *cell, ALONE) for cell in cells]
    settings = dict.fromkeys(job.setting for job in results)
    found += [_row(_mean_base(results, name), name, MEAN, OURS, ALONE) for name in settings]
    found += [_row(results, *cell, "pull") for cell in cells if cell[2] == OURS]
    return [row for row in found if row is not None]


def _mean_base(results: Results, setting: str) -> Results:
    """The runs of a base that is the mean of those with enough seeds, for the seeds they share."""
    seeds: dict[str, set[int]] = {}
    for job in results:
        pair = [Job(setting, job.base, method, job.seed) for method in (ALONE, OURS)]
        if all(one in results for one in pair):
            seeds.setdefault(job.base, set()).add(job.seed)
    bases = [base for base, own in seeds.items() if len(own) >= LEAST_SEEDS]
    if len(bases) < 2:
        return {}
    return {
        Job(setting, MEAN, method, seed): {
            part: float(np.mean([results[Job(setting, b, method, seed)][part] for b in bases]))
            for part in ("train", "val", "test")
        }
        for seed in sorted(set.intersection(*(seeds[base] for base in bases)))
        for method in (ALONE, OURS)
    }


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
    return T_QUANTILE[freedom - 1] * float(values.std(ddof=1)) / float(len(values) ** 0.5)


def table(found: list[Row]) -> str:
    """Markdown: by setting and base the accuracy alone, and what every method adds to it."""
    lines = []
    for setting in settings_of(found):
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
    return f" ± {row.half:.1f}" if row.seeds >= LEAST_SEEDS else f" (seeds: {row.seeds})"


def readme_table(found: list[Row]) -> str:
    """By base: the accuracy alone and what `CWBR` adds, by setting; then what others add."""
    settings = settings_of(found)
    cells = {(row.setting, row.base, row.method): row for row in found if row.against == ALONE}
    lines = [
        "| test accuracy, % | " + " | ".join(settings) + " |",
        "|---" * (len(settings) + 1) + "|",
    ]
    for label, base, method in lines_of(found):
        values = [_cell(cells.get((setting, base, method))) for setting in settings]
        lines.append(f"| {label} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    gain = f"{row.gain:+.1f}{_interval(row)}"
    return f"{row.mean - row.gain:.1f} {f'**{gain}**' if row.method == OURS else gain}"


def settings_of(found: list[Row]) -> list[str]:
    """The settings that there are, in the order in which they are shown."""
    return [name for name in SETTINGS if any(row.setting == name for row in found)]


def lines_of(found: list[Row]) -> list[tuple[str, str, str]]:
    """(label, base, method): `CWBR` on every base, then the other methods on each."""
    order = [*BASES, MEAN]
    pairs = {(r.base, r.method) for r in found if r.against == ALONE and r.method != ALONE}
    ranked = sorted(
        pairs, key=lambda pair: (pair[1] != OURS, order.index(pair[0]), [*METHODS].index(pair[1]))
    )
    return [(f"{base} + {method}", base, method) for base, method in ranked]


def draw(found: list[Row], path: Path) -> None:
    """What `CWBR` and others add to each base, a panel for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = {(row.setting, row.base, row.method): row for row in found if row.against == ALONE}
    settings, lines = settings_of(found), lines_of(found)
    figure, axes = plt.subplots(
        *(1, len(settings)),
        figsize=(3.4 * len(settings) + 2, 0.32 * len(lines) + 1.3),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    for axis, setting in zip(axes[0], settings, strict=True):
        axis.set_title(setting, fontsize=10)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params("x", labelsize=8)
        axis.tick_params("y", labelsize=9, length=0)
        for place, (_, base, method) in enumerate(lines):
            if (row := cells.get((setting, base, method))) is not None:
                _draw_gain(axis, row, place)
    axes[0][0].set_yticks(range(len(lines)), [label for label, _, _ in lines])
    axes[0][0].set_ylim(len(lines) - 0.5, -0.7)
    figure.supxlabel(
        "points of test accuracy added to the recipe (paired by seed; lines: 95 % intervals; "
        "hollow: fewer than three seeds)",
        fontsize=8,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_gain(axis: Any, row: Row, place: int) -> None:
    color = "C3" if row.method == OURS else "0.5"
    sure = row.seeds >= LEAST_SEEDS
    if sure:
        axis.plot([row.gain - row.half, row.gain + row.half], [place, place], color=color)
    axis.plot(row.gain, place, "o", color=color, markerfacecolor=color if sure else "white")
    text = {"xytext": (0, 5), "textcoords": "offset points", "ha": "center", "fontsize": 7}
    axis.annotate(f"{row.gain:+.1f}", (row.gain, place), color=color, **text)


def summarise(results: Results) -> None:
    """Writes ablation.csv, and from it what `publish` does."""
    with CSV.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows(results):
            writer.writerow([f"{x:.3f}" if isinstance(x, float) else x for x in row])
    publish(read())


def read() -> list[Row]:
    """The rows of ablation.csv."""
    with CSV.open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    return [Row._make([*line[:4], int(line[4]), *map(float, line[5:])]) for line in lines]


def publish(found: list[Row]) -> None:
    """Writes ablation.md, ablation.png and the table of the README, and prints the table."""
    text = table(found)
    (RESULTS / "ablation.md").write_text(text)
    print(text)
    draw(found, RESULTS / "ablation.png")
    README.write_text(insert_table(README.read_text(), "ablation", readme_table(found)))
