"""What a report shows, on a page as in a figure: numbers as text, columns, charts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Report = Mapping[str, Any]
# Okabe and Ito's colours, which colour-blind readers can tell apart too.
FLOOR = 1e-12
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")


def percent(value: float | None) -> str:
    """A share as text; "-" for none."""
    return "-" if value is None else f"{100 * value:.1f} %"


def number(value: float | None) -> str:
    """Three digits, or a whole number of thousands; "-" for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"


def largest_off_diagonal(matrix: Sequence[Sequence[float | None]]) -> float:
    """Of the defined values; 0 where there is none."""
    values = [v for k, row in enumerate(matrix) for j, v in enumerate(row) if j != k]
    return max((v for v in values if v is not None), default=0.0)


class Column(NamedTuple):
    """A column of the table of layers."""

    title: str
    key: str
    text: Callable[[float | None], str]


LAYER_COLUMNS = (
    Column("dimensions", "dims", number),
    Column("rho", "rho", number),
    Column("D", "distance", number),
    Column("its floor", "distance_floor", number),
    Column("D per\ndimension", "distance_per_dim", number),
    Column("underflow", "underflow", percent),
    Column("bound", "bayes_bound", percent),
    Column("probe", "probe", percent),
    Column("gradient norm,\ncross-entropy", "ce_norm", number),
    Column("gradient norm,\nregularizer", "reg_norm", number),
    Column("cosine", "cosine", number),
)


def layer_columns(report: Report) -> list[Column]:
    """Those of which a layer has a number."""
    layers = report["layers"].values()
    return [c for c in LAYER_COLUMNS if any(layer[c.key] is not None for layer in layers)]


class Line(NamedTuple):
    """One value at each step; None where it is undefined."""

    name: str
    colour: str
    values: list[float | None]
    dashed: bool = False


class Chart(NamedTuple):
    """Lines over the steps of training. A logarithmic one draws what is below FLOOR as FLOOR."""

    title: str
    lines: list[Line]
    log: bool = False
    limits: tuple[float, float] | None = None


def over_time(history: Sequence[Report]) -> list[Chart]:
    """A chart of each measure of which the history has a number."""
    layers = list(history[-1]["layers"])

    def whole(name: str, key: str, colour: str, percent: bool = False) -> Line:
        values = [r.get(key) for r in history]
        return Line(name, colour, [_scaled(v, 100 if percent else 1) for v in values])

    def by_layer(key: str, percent: bool = False, dashed: bool = False) -> list[Line]:
        return [
            Line(
                layer,
                COLOURS[k % len(COLOURS)],
                [
                    _scaled(r["layers"].get(layer, {}).get(key), 100 if percent else 1)
                    for r in history
                ],
                dashed,
            )
            for k, layer in enumerate(layers)
        ]

    charts = [
        Chart("accuracy, %", [whole("accuracy", "accuracy", COLOURS[0], True)]),
        Chart("error rate of the pairs, %", [whole("pairs", "error_rate", COLOURS[1], True)]),
        Chart("mean overlap rho", by_layer("rho"), log=True),
        Chart("mean distance D per dimension", by_layer("distance_per_dim"), log=True),
        Chart("linear probe, %", by_layer("probe", percent=True)),
        Chart(
            "gradient norm; dashed: of the regularizer",
            by_layer("ce_norm") + by_layer("reg_norm", dashed=True),
            log=True,
        ),
        Chart("cosine of the two gradients", by_layer("cosine"), limits=(-1, 1)),
        Chart(
            "scale: cross-entropy / regularizer", [whole("scale", "scale", COLOURS[0])], log=True
        ),
    ]
    return [c for c in charts if any(v is not None for line in c.lines for v in line.values)]


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
