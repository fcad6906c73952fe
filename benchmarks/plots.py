"""`make plots`: a report and a figure of each CSV, of one the README's table; from the CSVs alone.

python -m benchmarks.plots [FILE ...] [--shown NAME] [--readme FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib

from benchmarks.markdown import insert_table
from benchmarks.measure import ROOT
from benchmarks.providers import EAGER
from benchmarks.results import FOLDER, Results
from benchmarks.tables import Numbers, readme_table, report
from benchmarks.workloads import SWEEP, SWEEP_DIMS, SWEEP_GROUPS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

# Where pictures and pages are found from wherever the README is shown.
RAW = "https://raw.githubusercontent.com/cwbr-fused/cwbr_fused/main"
PAGES = "https://github.com/cwbr-fused/cwbr_fused/blob/main"
LABELS = {
    EAGER: "eager PyTorch",
    "eager compiled": "torch.compile",
    "chunked": "row chunks",
    "chunked checkpoint": "checkpointed",
    "keops": "KeOps",
}
COLORS = ("#8c8c8c", "#b07aa1", "#c49a3c", "#5b9aa0", "#7a8b4f")
OWN_COLOR = "#d1383a"


def spread_labels(heights: list[float], distance: float, top: float = 1) -> list[float]:
    """Positions in the order of `heights`, near them, `distance` apart and at most `top`."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for below, above in pairwise(order):
        placed[above] = max(placed[above], placed[below] + distance)
    if order:
        placed[order[-1]] = min(placed[order[-1]], top)
    for above, below in pairwise(reversed(order)):
        placed[below] = min(placed[below], placed[above] - distance)
    return placed


def draw(axes: Axes, numbers: Numbers, metric: str, unit: str) -> None:
    """Cost over K, one line per provider, named at its end; a cross where memory would run out."""
    ends: list[tuple[float, float, str, str]] = []
    own = numbers.own()
    styles = [*zip(LABELS, LABELS.values(), COLORS, strict=True), (own, "cwbr_fused", OWN_COLOR)]
    for provider, label, color in styles:
        rows = [
            (w.groups, numbers.get(w.name, provider, "step", metric))
            for w in SWEEP
            if w.dims[0] == SWEEP_DIMS[0]
        ]
        points = [(k, row.median) for k, row in rows if row and row.median]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        mine = provider == own
        axes.plot(x, y, color=color, lw=3 if mine else 2, marker="o", ms=5, zorder=2 + mine)
        out = any(row and row.note.startswith("out of memory") for _, row in rows)
        if out:
            axes.plot(x[-1], y[-1], marker="X", ms=9, color=color, zorder=4)
        ends.append((x[-1], y[-1], label, color))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(right=axes.get_xlim()[1] * 14)
    axes.set_xticks(SWEEP_GROUPS, ["64", "200", "500", "1k", "2k", "5k"])
    axes.minorticks_off()
    axes.set_xlabel("classes K")
    axes.set_title(unit, loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    _name_ends(axes, ends)


def _name_ends(axes: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """A column of names right of the largest K, each tied to the end of its line."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = [to_axes.transform((x, y)) for x, y, _, _ in ends]
    column = float(to_axes.transform((SWEEP_GROUPS[-1] * 1.5, 1))[0])
    heights = spread_labels([float(y) for _, y in places], 0.08)
    for (_, _, label, color), (x, y), height in zip(ends, places, heights, strict=True):
        axes.plot([x, column], [y, height], color=color, lw=0.7, transform=axes.transAxes)
        bold = "bold" if color == OWN_COLOR else "normal"
        axes.text(
            column + 0.01,
            height,
            label,
            transform=axes.transAxes,
            color=color,
            va="center",
            fontsize=10,
            fontweight=bold,
        )


def figure(numbers: Numbers, path: Path) -> None:
    """Time and memory side by side, 1600 x 720 pixels, to be shown at half that."""
    plt.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans"})
    drawing, panels = plt.subplots(1, 2, figsize=(8, 3.6), dpi=200, layout="constrained")
    draw(panels[0], numbers, "time_ms", "time, ms")
    draw(panels[1], numbers, "peak_extra_mb", "peak extra memory, MB")
    drawing.suptitle(
        f"All pairs of K classes, D = {SWEEP_DIMS[0]}, forward + backward, one thread"
        "   (✖ next size: out of memory)",
        fontsize=10,
        color="#444444",
    )
    drawing.savefig(path)
    plt.close(drawing)


def render(results: Path) -> str:
    """Write the report and the figure beside `results`; what the README shows of them."""
    numbers = Numbers(Results(results, "").rows.values())
    drawn, written = results.with_suffix(".png"), results.with_suffix(".md")
    figure(numbers, drawn)
    written.write_text(report(numbers))
    folder = FOLDER.relative_to(ROOT)
    return (
        f"![Time and memory of all pairs of K classes]({RAW}/{folder / drawn.name})\n\n"
        f"{readme_table(numbers)}\n"
        f"[All workloads, peers and numbers]({PAGES}/{folder / written.name}).\n"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", nargs="*", type=Path, help="default: every results/cpu-*.csv")
    parser.add_argument("--shown", help="the one in the README, as cpu-avx2; default: the first")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    given = parser.parse_args(arguments)
    shown = {path.stem: render(path) for path in given.results or sorted(FOLDER.glob("cpu-*.csv"))}
    table = shown[given.shown or next(iter(shown))]
    given.readme.write_text(insert_table(given.readme.read_text(), "table", table))


if __name__ == "__main__":
    main()
