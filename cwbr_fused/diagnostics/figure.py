"""A report as a figure of matplotlib, which is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from cwbr_fused.diagnostics.content import (
    FLOOR,
    Chart,
    Report,
    largest_off_diagonal,
    layer_columns,
    number,
    over_time,
    percent,
)

try:
    from matplotlib import font_manager, rcParams
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage
    from matplotlib.patches import Rectangle
except ImportError as error:
    raise ImportError("a picture needs matplotlib: pip install matplotlib") from error

MAX_PAIRS = 20
CHARTS_PER_ROW = 4
MAX_LAYERS = 4  # of the table of pairs
LONGEST = 16  # characters of a name
MUTED = "#667085"
Names = Mapping[int, str]
Thumbs = Mapping[int, Tensor]


def overview(history: Sequence[Report], names: Names, thumbs: Thumbs) -> Figure:
    """Pairs, heat map and layers of the last report, charts of the history."""
    last, label = history[-1], _labels(names)
    charts = over_time(history) if len(history) > 1 else []
    chart_rows = -(-len(charts) // CHARTS_PER_ROW)
    pairs = last["pairs"][:MAX_PAIRS]
    heights = [max(5.0, 0.34 * len(pairs) + 1), 0.35 * len(last["layers"]) + 1]
    heights += [2.5] * chart_rows
    figure = Figure(figsize=(18, sum(heights) + 1), layout="constrained")
    figure.suptitle(_headline(last), fontsize=13)
    grid = figure.add_gridspec(len(heights), CHARTS_PER_ROW, height_ratios=heights)
    _pairs(figure.add_subplot(grid[0, :2]), last, pairs, label, thumbs)
    _heat_map(figure.add_subplot(grid[0, 2:]), last, label, thumbs)
    _layers(figure.add_subplot(grid[1, :]), last)
    steps = [report["step"] for report in history]
    for k, chart in enumerate(charts):
        row, column = divmod(k, CHARTS_PER_ROW)
        _chart(figure.add_subplot(grid[2 + row, column]), chart, steps)
    return figure


def heat_map(report: Report, names: Names, thumbs: Thumbs) -> Figure:
    """The confusion of the classes of the first pairs."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    _heat_map(figure.add_subplot(), report, _labels(names), thumbs)
    return figure


def _labels(names: Names) -> Callable[[int], str]:
    """Short class names; the number of a class whose name the configured fonts cannot write."""
    fonts = [
        font_manager.get_font(font_manager.findfont(FontProperties(family=[family])))
        for family in rcParams["font.family"]
    ]

    def label(k: int) -> str:
        name = names[k]
        drawable = all(any(font.get_char_index(ord(c)) for font in fonts) for c in name)
        return _short(name) if drawable else f"class {k}"

    return label


def _short(name: str) -> str:
    """Without its middle if it is long: names differ at the end, paths of layers above all."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"


def _headline(report: Report) -> str:
    step = "" if report["step"] is None else f"step {report['step']}: "
    error = f"error rate of {len(report['pairs'])} pairs {percent(report['error_rate'])}"
    if report["error_rate_before"] is not None:
        error += f", before {percent(report['error_rate_before'])}"
    return f"{step}accuracy {percent(report['accuracy'])}, {error}, scale {number(report['scale'])}"


def _picture(
    ax: Any, image: Tensor, place: tuple[float, float], points: float, **where: Any
) -> None:
    """An image whose larger side is so many points, at a place in the axes."""
    box = OffsetImage(image.numpy(), zoom=points / max(image.shape[:2]), interpolation="nearest")
    ax.add_artist(AnnotationBbox(box, place, frameon=False, annotation_clip=False, **where))


def _pairs(
    ax: Any, report: Report, pairs: Sequence[Report], label: Callable[[int], str], thumbs: Thumbs
) -> None:
    """A table with one row for each pair, their images beside the names."""
    before = report["error_rate_before"] is not None
    columns = [("alpha", [number(pair["alpha"]) for pair in pairs])]
    if before:
        columns.append(("error\nbefore", [percent(pair["error_rate_before"]) for pair in pairs]))
    columns.append(("error\nnow" if before else "error", [percent(p["error_rate"]) for p in pairs]))
    for layer in list(report["layers"])[-MAX_LAYERS:]:
        rho = [number(pair["layers"][layer]["rho"]) for pair in pairs]
        columns.append((f"rho\n{_short(layer)}", rho))

    ax.set(title="most confused pairs", xlim=(0, 1), ylim=(len(pairs) - 0.4, -2.2))
    ax.set_axis_off()
    width = 0.56 / len(columns)
    for k, (title, cells) in enumerate(columns):
        right = 0.44 + (k + 1) * width
        above = {"ha": "right", "va": "bottom", "color": MUTED}
        ax.text(right, -0.6, title, fontsize=9, parse_math=False, **above)
        for row, cell in enumerate(cells):
            ax.text(right, row, cell, fontsize=9, ha="right", va="center")
    for row, pair in enumerate(pairs):
        for left, k in zip((0.0, 0.22), pair["classes"], strict=True):
            ax.text(left + 0.04, row, label(k), fontsize=9, va="center", parse_math=False)
            if k in thumbs:
                _picture(ax, thumbs[k], (left + 0.015, row), 18)


def _heat_map(ax: Any, report: Report, label: Callable[[int], str], thumbs: Thumbs) -> None:
    """Rows and columns bear the image of their class, or its name."""
    classes, matrix = report["confusion"]["classes"], report["confusion"]["mean_probs"]
    ax.set_title("mean softmax of the column's class over the row's samples")
    if not classes:
        ax.set_axis_off()
        return
    shown = [[float("nan") if v is None else v for v in row] for row in matrix]
    for k, row in enumerate(shown):
        row[k] = float("nan")
    ax.set_facecolor("#f2f4f7")
    norm = PowerNorm(0.5, 0, largest_off_diagonal(matrix) or 1)
    picture = ax.imshow(shown, cmap="Blues", norm=norm, aspect="auto")
    ax.figure.colorbar(picture, ax=ax, shrink=0.7, pad=0.02)
    place = {k: position for position, k in enumerate(classes)}
    for pair in report["pairs"]:
        if all(k in place for k in pair["classes"]):
            i, j = (place[k] for k in pair["classes"])
            for corner in ((i - 0.45, j - 0.45), (j - 0.45, i - 0.45)):
                ax.add_patch(Rectangle(corner, 0.9, 0.9, fill=False, color="#1d2430", lw=0.8))
    texts = ["" if k in thumbs else label(k) for k in classes]
    size = 300 / len(classes)
    ax.tick_params(length=0, labelsize=min(9, size))
    ax.set_xticks(range(len(classes)), texts, rotation=90, parse_math=False)
    ax.set_yticks(range(len(classes)), texts, parse_math=False)
    points = min(18, size)
    beside = {"boxcoords": "offset points", "pad": 0}
    for k in thumbs.keys() & place.keys():
        left, below = (-0.5, place[k]), (place[k], len(classes) - 0.5)
        _picture(ax, thumbs[k], left, points, xybox=(-points, 0), **beside)
        _picture(ax, thumbs[k], below, points, xybox=(0, -points), **beside)


def _layers(ax: Any, report: Report) -> None:
    columns = layer_columns(report)
    ax.set_axis_off()
    table = ax.table(
        [
            [_short(name), *(c.text(layer[c.key]) for c in columns)]
            for name, layer in report["layers"].items()
        ],
        colLabels=["layer", *(c.title for c in columns)],
        cellLoc="center",
        edges="horizontal",
        loc="center",
    )
    table.auto_set_font_size(False)
    table.set_fontsize(10)
    table.scale(1, 1.5)
    for (row, _), cell in table.get_celld().items():
        if row == 0:
            cell.set_height(2 * cell.get_height())


def _chart(ax: Any, chart: Chart, steps: Sequence[int]) -> None:
    for line in chart.lines:
        values = [float("nan") if v is None else v for v in line.values]
        if chart.log:
            values = [max(v, FLOOR) for v in values]
        style = "--" if line.dashed else "-"
        ax.plot(steps, values, style, marker=".", color=line.colour)
    ax.set_title(chart.title, fontsize=10)
    ax.grid(axis="y", color="#e4e7ec")
    ax.spines[["top", "right"]].set_visible(False)
    if chart.log:
        ax.set_yscale("log")
    if chart.limits:
        ax.set_ylim(chart.limits)
    keys = {
        line.name: handle
        for line, handle in zip(chart.lines, ax.lines, strict=True)
        if not line.dashed
    }
    if len(keys) > 1:
        ax.legend(list(keys.values()), list(keys), fontsize=8, frameon=False)
