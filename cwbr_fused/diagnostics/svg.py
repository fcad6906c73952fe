"""Line charts as inline SVG, which needs no library and no network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from cwbr_fused.diagnostics.content import FLOOR, Chart, Line

WIDTH, HEIGHT = 400, 210
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 24


def line_chart(chart: Chart, steps: Sequence[int]) -> str:
    """The chart without title and legend; each point tells its value under the mouse."""
    values = [v for line in chart.lines for v in line.values if v is not None]
    low, high = chart.limits or (min(values), max(values))
    if chart.log:
        low, high = max(low, FLOOR), max(high, FLOOR)
    marks = log_ticks(low, high) if chart.log else ticks(low, high)
    y = _scale(min(low, marks[0]), max(high, marks[-1]), HEIGHT - BOTTOM, TOP, chart.log)
    x = _scale(steps[0], steps[-1], LEFT, WIDTH - RIGHT, False)
    grid = [
        f'<path class="grid" d="M{LEFT} {y(mark):.1f}H{WIDTH - RIGHT}"/>'
        f'<text x="{LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{mark:g}</text>'
        for mark in marks
    ]
    labels = [
        f'<text x="{x(mark):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{mark:g}</text>'
        for mark in ticks(steps[0], steps[-1])
        if steps[0] <= mark <= steps[-1]
    ]
    lines = [_line(line, steps, x, y) for line in chart.lines]
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(chart.title)}">'
        f"{''.join(grid)}{''.join(labels)}{''.join(lines)}</svg>"
    )


def _line(
    line: Line, steps: Sequence[int], x: Callable[[float], float], y: Callable[[float], float]
) -> str:
    """A path that is broken where a value is missing, and its points."""
    path, points, pen_down = [], [], False
    for step, value in zip(steps, line.values, strict=True):
        if value is not None:
            path.append(f"{'L' if pen_down else 'M'}{x(step):.1f} {y(value):.1f}")
            points.append(
                f'<circle cx="{x(step):.1f}" cy="{y(value):.1f}" r="2.5" fill="{line.colour}">'
                f"<title>{escape(line.name)}, step {step}: {value:.4g}</title></circle>"
            )
        pen_down = value is not None
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    return f'<path class="line" stroke="{line.colour}"{dash} d="{"".join(path)}"/>{"".join(points)}'


def _scale(
    low: float, high: float, start: float, end: float, log: bool
) -> Callable[[float], float]:
    """The place of a value on an axis from `start` to `end` pixels."""

    def position(value: float) -> float:
        return math.log10(max(value, FLOOR)) if log else value

    first, span = position(low), position(high) - position(low)
    return lambda value: start + (end - start) * ((position(value) - first) / span if span else 0.5)


def ticks(low: float, high: float) -> list[float]:
    """Round values, about five, that enclose the interval."""
    if low == high:
        return [low]
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(k * step, 12) for k in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten that enclose the interval, or some powers if it is long."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    fine = [float(f"{m}e{power}") for power in range(first, last + 1) for m in (1, 2, 5)]
    start = max(k for k, mark in enumerate(fine) if mark <= low)
    end = min(k for k, mark in enumerate(fine) if mark >= high)
    if end - start < 7:
        return fine[start : end + 1]
    stride = math.ceil((last - first) / 5)
    return [10.0**power for power in range(first, last + stride, stride)]
