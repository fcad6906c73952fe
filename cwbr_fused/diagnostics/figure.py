"""A report as pictures. Only this module and page.py import matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import cycle, pairwise
from typing import Any, NamedTuple

from matplotlib import font_manager, rcParams
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch, Rectangle
from torch import Tensor

from cwbr_fused.diagnostics.arguments import Histories, Report

WIDTH, DPI = 16.0, 120  # of a slide, in inches
TOP, STRIP = 4.4, 2.4  # heights
SLIDE_PAIRS, SLIDE_CLASSES, PANELS_PER_ROW = 8, 12, 6
LONGEST = 18  # characters of a name
MUTED, DARK = "#667085", "#1d2430"
# Okabe and Ito's colours, which colour-blind readers can tell apart too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
Thumbs = Mapping[int, Tensor]
Number = float | None


class Panel(NamedTuple):
    """A small chart: what its vertical axis shows, and what draws it."""

    title: str
    unit: str
    draw: Callable[[Any], None]


def percent(value: Number) -> str:
    """A share as text; "-" for none."""
    return "-" if value is None else f"{value:.1%}"


def number(value: Number) -> str:
    """Three digits, or a whole number of thousands; "-" for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:#.3g}"


def latest(histories: Histories) -> Report:
    """The last report of the last method, whose pairs are shown."""
    return list(histories.values())[-1][-1]


def overview(histories: Histories, thumbs: Thumbs) -> Figure:
    """Pairs and heat map of the last report, charts of the histories: a slide."""
    last, rows = latest(histories), _rows(histories)
    heights = [TOP, STRIP * len(rows)][: 1 + bool(rows)]
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.5), dpi=DPI, layout="constrained")
    error = f"error rate of {len(last['pairs'])} pairs {percent(last['error_rate'])}"
    step = "" if last["step"] is None else f"step {last['step']}: "
    figure.suptitle(f"{step}accuracy {percent(last['accuracy'])}, {error}", fontsize=16)
    above, *below = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    pairs, confusion = above.subplots(1, 2, width_ratios=(1.8, 1))
    _draw_pairs(pairs, last, thumbs)
    _draw_heat_map(confusion, last, thumbs, SLIDE_CLASSES)
    for charts_below in below:
        _draw_rows(charts_below, rows, histories)
    return figure


def charts(histories: Histories) -> Figure | None:
    """The charts of the overview alone; None where no number is defined."""
    rows = _rows(histories)
    if not rows:
        return None
    figure = Figure(figsize=(WIDTH, STRIP * len(rows)), layout="constrained")
    _draw_rows(figure, rows, histories)
    return figure


def heat_map(report: Report, thumbs: Thumbs) -> Figure:
    """The confusion of the classes of the first pairs."""
    size = 3 + 0.25 * len(report["confusion"]["classes"])
    figure = Figure(figsize=(size * 1.15, size), layout="constrained")
    _draw_heat_map(figure.add_subplot(), report, thumbs)
    return figure


def _rows(histories: Histories) -> list[list[Panel]]:
    """What changed over the steps, with a panel for each layer; then the layers side by side."""
    measures: list[tuple[str, str, Callable[[Report], Number]]] = [
        ("accuracy", "%", lambda r: _scaled(r["accuracy"], 100)),
        ("error rate of the pairs", "%", lambda r: _scaled(r["error_rate"], 100)),
    ]
    for layer in latest(histories)["layers"]:
        title = f"overlap, {_short(layer)}"
        measures.append((title, "per dimension", partial(_of_layer, layer=layer, key="overlap")))
    panels = [_lines(*measure, histories) for measure in measures]
    if all(len(history) == 1 for history in histories.values()):
        panels = []
    bars = [
        _bars("separation of the pairs", "per dimension", "separation", 1, histories),
        _bars("linear probe", "accuracy, %", "probe", 100, histories),
        _bars("gradient added by CWBR", "% of the loss's", "share", 100, histories),
        _bars("added to the loss's gradient", "cosine", "cosine", 1, histories),
    ]
    shown = [panel for panel in panels if panel is not None]
    count = -(-len(shown) // PANELS_PER_ROW)
    bounds = [len(shown) * k // count for k in range(count + 1)] if shown else []
    rows = [shown[start:end] for start, end in pairwise(bounds)]
    return [row for row in (*rows, [bar for bar in bars if bar is not None]) if row]


def _of_layer(report: Report, layer: str, key: str) -> Number:
    value: Number = report["layers"].get(layer, {}).get(key)
    return value


def _scaled(value: Number, factor: float) -> Number:
    return None if value is None else value * factor


def _lines(
    title: str, unit: str, read: Callable[[Report], Number], histories: Histories
) -> Panel | None:
    """A line for each method, through the steps where its value is defined."""
    curves = [
        [(r["step"], value) for r in history if (value := read(r)) is not None]
        for history in histories.values()
    ]

    def draw(ax: Any) -> None:
        for colour, curve in zip(cycle(COLOURS), curves, strict=False):
            if curve:
                ax.plot(*zip(*curve, strict=True), ".-", color=colour)
        ax.set_xlabel("step")

    return Panel(title, unit, draw) if any(curves) else None


def _bars(title: str, unit: str, key: str, factor: float, histories: Histories) -> Panel | None:
    """Of the last report of each method, a bar for each layer."""
    layers = list(latest(histories)["layers"])
    heights = [
        [_scaled(_of_layer(history[-1], layer, key), factor) for layer in layers]
        for history in histories.values()
    ]
    known = [
        (c, h) for c, h in zip(cycle(COLOURS), heights, strict=False) if h.count(None) < len(h)
    ]

    def draw(ax: Any) -> None:
        width = 0.8 / len(known)
        for place, (colour, values) in enumerate(known):
            left = [x - 0.4 + width * place for x in range(len(layers))]
            heights = [float("nan") if v is None else v for v in values]
            bars = ax.bar(left, heights, width, align="edge", color=colour)
            if len(layers) * len(known) <= 16:
                texts = ["" if v is None else f"{v:.1f}" if v >= 1 else f"{v:.2g}" for v in values]
                ax.bar_label(bars, texts, fontsize=8)
        names = [_short(layer) for layer in layers]
        slanted = {"rotation": 20, "ha": "right"} if len("".join(names)) > 40 else {}
        ax.set_xticks(range(len(layers)), names, parse_math=False, **slanted)
        ax.margins(y=0.15)
        ax.axhline(0, color=MUTED, lw=0.8)

    return Panel(title, unit, draw) if known else None


def _draw_rows(figure: Any, rows: Sequence[Sequence[Panel]], histories: Histories) -> None:
    for strip, panels in zip(
        figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True
    ):
        for ax, panel in zip(strip.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            ax.set_title(panel.title, fontsize=11, parse_math=False)
            ax.set_ylabel(panel.unit)
            ax.grid(axis="y", color="#e4e7ec")
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
            panel.draw(ax)
    if len(histories) > 1:
        methods = zip(cycle(COLOURS), histories, strict=False)
        patches = [Patch(color=colour, label=method) for colour, method in methods]
        legend = figure.legend(
            handles=patches, loc="outside upper left", ncols=len(patches), frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)


def _draw_pairs(ax: Any, report: Report, thumbs: Thumbs) -> None:
    """A table with one row for each pair, their images beside the names."""
    pairs = report["pairs"][:SLIDE_PAIRS]
    ax.set_axis_off()
    ax.set(xlim=(0, 1), ylim=(SLIDE_PAIRS - 0.5, -1.5))
    ax.text(0, -1, "most confused pairs", fontsize=13, va="center")
    if not pairs:
        ax.text(0, 0, "none: fewer than two classes occur", color=MUTED, fontsize=11)
    columns = {
        "images": [str(sum(pair["samples"])) for pair in pairs],
        "softmax mass": [percent(pair["alpha"]) for pair in pairs],
        "error before": [percent(pair["error_rate_before"]) for pair in pairs],
        "error": [percent(pair["error_rate"]) for pair in pairs],
    }
    if report["error_rate_before"] is None:
        del columns["error before"]
    for right, (title, cells) in zip(
        (0.96, 0.84, 0.7, 0.55), reversed(columns.items()), strict=False
    ):
        for row, cell in enumerate([title, *cells], -1):
            ax.text(right, row, cell, fontsize=11, ha="right", va="center")
    for row, pair in enumerate(pairs):
        for left, k, name in zip((0.0, 0.24), pair["classes"], pair["names"], strict=True):
            beside = left + (0.06 if thumbs else 0)
            ax.text(beside, row, _label(k, name), fontsize=11, va="center", parse_math=False)
            if k in thumbs:
                _place(ax, thumbs[k], (left + 0.025, row), 30)


def _draw_heat_map(ax: Any, report: Report, thumbs: Thumbs, most: int | None = None) -> None:
    """Rows and columns have the image of their class, or its name."""
    confusion = report["confusion"]
    classes = confusion["classes"][:most]
    ax.set_title("mean softmax, %", fontsize=13)
    if not classes:
        ax.set_axis_off()
        return
    nan = float("nan")
    shown = [
        [nan if v is None or j == k else 100 * v for j, v in enumerate(row[:most])]
        for k, row in enumerate(confusion["mean_probs"][:most])
    ]
    largest = max((v for row in shown for v in row if v > 0), default=1.0)
    ax.set_facecolor("#f2f4f7")
    picture = ax.imshow(shown, cmap="Blues", norm=PowerNorm(0.5, 0, largest))
    ax.figure.colorbar(picture, ax=ax)
    for k, row in enumerate(shown):
        for j, value in enumerate(row):
            if value >= 0.5:
                colour = "white" if value > largest / 3 else DARK
                ax.text(j, k, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    place = {k: position for position, k in enumerate(classes)}
    for pair in report["pairs"]:
        if place.keys() >= set(pair["classes"]):
            i, j = (place[k] for k in pair["classes"])
            for corner in ((i - 0.48, j - 0.48), (j - 0.48, i - 0.48)):
                ax.add_patch(Rectangle(corner, 0.96, 0.96, fill=False, color=DARK, lw=0.8))
    names = zip(classes, confusion["names"], strict=False)
    texts = ["" if k in thumbs else _label(k, name) for k, name in names]
    ax.tick_params(length=0, labelsize=9)
    ax.set_xticks(range(len(classes)), texts, rotation=90, parse_math=False)
    ax.set_yticks(range(len(classes)), texts, parse_math=False)
    ax.set_xlabel("predicted class", labelpad=24 if thumbs else 4)
    ax.set_ylabel("true class", labelpad=24 if thumbs else 4)
    side = 20 if len(classes) <= SLIDE_CLASSES else 14
    for k in thumbs.keys() & place.keys():
        _place(ax, thumbs[k], (-0.5, place[k]), side, (-side / 2 - 3, 0))
        _place(ax, thumbs[k], (place[k], len(classes) - 0.5), side, (0, -side / 2 - 3))


def _place(
    ax: Any,
    image: Tensor,
    place: tuple[float, float],
    points: float,
    offset: tuple[float, float] = (0, 0),
) -> None:
    """An image whose larger side is so many points, at an offset in points from a place."""
    box = OffsetImage(image.numpy(), zoom=points / max(image.shape[:2]))
    options: dict[str, Any] = {"boxcoords": "offset points", "pad": 0}
    options |= {"frameon": False, "annotation_clip": False}
    ax.add_artist(AnnotationBbox(box, place, offset, **options))


def _label(k: int, name: str) -> str:
    """A short name; the number of a class whose name the configured fonts cannot write."""
    fonts = [
        font_manager.get_font(font_manager.findfont(FontProperties(family=[family])))
        for family in rcParams["font.family"]
    ]
    drawable = all(any(font.get_char_index(ord(c)) for font in fonts) for c in name)
    return _short(name) if drawable else f"class {k}"


def _short(name: str) -> str:
    """Without its middle if it is long: names differ at the end, paths of layers above all."""
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[: half - 1]}…{name[-half:]}"
