"""Paired gains on top of each base with 95 % intervals, from a CSV of the runs."""

from __future__ import annotations

import csv
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import markdown
from benchmarks.ablation.bases import BASES
from benchmarks.ablation.methods import METHODS
from benchmarks.ablation.settings import SETTINGS

README = Path(__file__).parents[2] / "README.md"
RESULTS = Path(__file__).parents[1] / "results"
CSV = RESULTS / "ablation.csv"
# What the file keeps of a run: accuracies in %, and its time on one core.
MEASURED = ("train", "val", "test", "seconds")
HEADER = ("base", "method", "seeds", "test, %", "gain", "on validation")
ALONE, OURS, PULL, MEAN = "alone", "CWBR", "pull", "mean of the recipes"
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
    cells = sorted({job[:3] for job in results}, key=_place)
    found = [_row(results, *cell, ALONE) for cell in cells]
    settings = dict.fromkeys(job.setting for job in results)
    found += [_row(_mean_base(results, name), name, MEAN, OURS, ALONE) for name in settings]
    found += [_row(results, *cell, PULL) for cell in cells if cell[2] == OURS]
    return [row for row in found if row is not None]


def best_rivals(found: list[Row]) -> list[Row]:
    """By setting and base the rival that gains most on validation, of those with most seeds."""
    best: dict[tuple[str, str], Row] = {}
    for row in found:
        if row.method in METHODS and METHODS[row.method].rival:
            known = best.setdefault((row.setting, row.base), row)
            best[row.setting, row.base] = max(row, known, key=lambda r: (r.seeds, r.val_gain))
    return list(best.values())


def _place(cell: tuple[str, str, str]) -> tuple[int, int, int]:
    """Where the cell stands in the tables."""
    setting, base, method = cell
    return [*SETTINGS].index(setting), [*BASES].index(base), [*METHODS].index(method)


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
    parts = []
    for setting in settings_of(found):
        own = [row for row in found if row.setting == setting]
        parts.append(f"**{setting}**\n\n" + markdown.table(HEADER, map(_line, own)))
    whats = {name.split(",")[0]: method.what for name, method in METHODS.items()}
    parts.append("".join(f"- {name}: {what}.\n" for name, what in whats.items()))
    return "\n".join(parts)


def _line(row: Row) -> tuple[str, ...]:
    name = row.method if row.against == ALONE else f"{row.method} over {row.against}"
    start = row.base, name, str(row.seeds), f"{row.mean:.1f}"
    if row.method == ALONE:
        return (*start, "", "")
    return (*start, f"{row.gain:+.1f}{_interval(row)}", f"{row.val_gain:+.1f}")


def _interval(row: Row) -> str:
    return f" ± {row.half:.1f}" if row.seeds >= LEAST_SEEDS else f" (seeds: {row.seeds})"


def readme_table(found: list[Row]) -> str:
    """By base: the accuracy alone and what is added to it, by setting."""
    cells = shown(found)
    settings = settings_of(cells.values())
    return markdown.table(
        ["test accuracy, %", *settings],
        (
            [label, *(_cell(cells.get((label, setting))) for setting in settings)]
            for label in labels_of(cells)
        ),
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    gain = f"{row.gain:+.1f}{_interval(row)}"
    name = f" ({row.method})" if METHODS[row.method].rival else ""
    return f"{row.mean - row.gain:.1f} {f'**{gain}**' if row.method == OURS else gain}{name}"


Cells = Mapping[tuple[str, str], Row]


def shown(found: list[Row]) -> Cells:
    """What is compared in picture and README, by its label and setting.

    Of the rivals the best; of the settings those in which some row has enough seeds.
    """
    own = [r for r in found if r.against == ALONE and r.method in (OURS, PULL, "published")]
    named = [(f"{row.base} + {row.method}", row) for row in own]
    named += [(f"{row.base} + best rival", row) for row in best_rivals(found)]
    sure = settings_of([row for _, row in named if row.seeds >= LEAST_SEEDS])
    return {(label, row.setting): row for label, row in named if row.setting in sure}


def labels_of(cells: Cells) -> list[str]:
    """`CWBR` on every base, then the other methods on each."""
    order = [*BASES, MEAN]
    methods = (OURS, PULL, "best rival", "published")
    possible = [f"{base} + {method}" for method in methods for base in order]
    there = {label for label, _ in cells}
    return [label for label in possible if label in there]


def settings_of(found: Collection[Row]) -> list[str]:
    """The settings that there are, in the order in which they are shown."""
    return [name for name in SETTINGS if any(row.setting == name for row in found)]


def draw(found: list[Row], path: Path) -> None:
    """What `CWBR` and others add to each base, a panel for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    cells = shown(found)
    labels, settings = labels_of(cells), settings_of(cells.values())
    across = min(len(settings), 3)
    down = -(-len(settings) // across)
    figure, axes = plt.subplots(
        *(down, across),
        figsize=(3.4 * across + 2, (0.32 * len(labels) + 0.6) * down + 0.7),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis in axes.flat[len(settings) :]:
        axis.set_visible(False)
    for axis, setting in zip(axes.flat, settings, strict=False):
        axis.set_title(setting, fontsize=10)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.grid(axis="x", color="0.92")
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params("x", labelsize=8)
        axis.tick_params("y", labelsize=9, length=0)
        for place, label in enumerate(labels):
            if (row := cells.get((label, setting))) is not None:
                _draw_gain(axis, row, place)
    axes[0][0].set_yticks(range(len(labels)), labels)
    axes[0][0].set_ylim(len(labels) - 0.5, -0.7)
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


def record(results: Results) -> None:
    """Writes the runs to ablation.csv, beside those that it has and these are not."""
    runs = {**read(), **results}
    with CSV.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*Job._fields, *MEASURED])
        for job in sorted(runs):
            writer.writerow([*job, *(f"{runs[job][name]:.3f}" for name in MEASURED)])


def read() -> dict[Job, dict[str, float]]:
    """The runs of ablation.csv."""
    if not CSV.exists():
        return {}
    with CSV.open(newline="") as file:
        lines = list(csv.reader(file))[1:]
    return {
        Job(setting, base, method, int(seed)): dict(zip(MEASURED, map(float, rest), strict=True))
        for setting, base, method, seed, *rest in lines
    }


def publish(found: list[Row]) -> None:
    """Writes ablation.md, ablation.png and the table of the README, and prints the table."""
    text = table(found)
    (RESULTS / "ablation.md").write_text(text)
    print(text)
    draw(found, RESULTS / "ablation.png")
    README.write_text(markdown.insert_table(README.read_text(), "ablation", readme_table(found)))
