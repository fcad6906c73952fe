"""A report as one HTML page that holds everything it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from torch import Tensor

from cwbr_fused.diagnostics.content import (
    Chart,
    Report,
    largest_off_diagonal,
    layer_columns,
    number,
    over_time,
    percent,
)
from cwbr_fused.diagnostics.images import data_url
from cwbr_fused.diagnostics.svg import line_chart

STYLE = """
:root { color-scheme: light; print-color-adjust: exact; -webkit-print-color-adjust: exact }
body { font: 14px/1.45 system-ui, sans-serif; color: #1d2430; background: #fff; margin: 2em auto;
  max-width: 1280px; padding: 0 1.5em }
h1 { font-size: 1.6em; margin: 0 0 .2em }
h2 { font-size: 1.2em; margin: 2em 0 .6em }
h3 { font-size: 1em; margin: 0 }
p, li { max-width: 80ch }
.muted { color: #667085 }
.tiles { display: flex; flex-wrap: wrap; gap: .8em; margin: 1.2em 0 }
.tile { border: 1px solid #e4e7ec; border-radius: 8px; padding: .5em 1em }
.tile b { display: block; font-size: 1.5em; font-weight: 600 }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
.list th, .list td { padding: .3em .8em; text-align: right; border-bottom: 1px solid #eaecf0;
  white-space: nowrap }
.list th { font-weight: 600; vertical-align: bottom; border-bottom: 2px solid #98a2b3 }
.list .text { text-align: left }
.list small { color: #667085 }
.thumb { display: inline-block; width: 44px; height: 44px; vertical-align: middle;
  background: center / contain no-repeat; margin-right: .4em }
.heat td { min-width: 24px; height: 24px; padding: 0; border: 1px solid #fff }
.heat th { font-weight: 400; font-size: 12px; padding: 0 }
.heat th div { display: flex; align-items: center; justify-content: flex-end; gap: .3em;
  max-width: 14em; padding-right: .4em }
.heat thead th { vertical-align: bottom; text-align: center }
.heat thead .name { display: inline-block; writing-mode: vertical-rl; transform: rotate(180deg);
  text-orientation: sideways; max-height: 12em; line-height: 1.4 }
.heat .name { overflow: hidden; text-overflow: ellipsis; white-space: nowrap }
.heat .thumb { flex: none; width: 22px; height: 22px; margin: 0 }
.heat .same { background: #f2f4f7 }
.heat .pair { outline: 1.5px solid #1d2430; outline-offset: -2px }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1.4em }
.charts svg { width: 100%; display: block }
.charts text { font-size: 11px; fill: #667085 }
.grid { stroke: #e4e7ec }
.line { fill: none; stroke-width: 1.8 }
.key { margin-right: 1em; white-space: nowrap }
.key::before { content: ""; display: inline-block; width: 1em; height: .25em; margin-right: .4em;
  vertical-align: middle; background: var(--colour) }
"""

NOTES = """
<li><b>alpha</b> of a pair i, j: the softmax mass its classes lend each other, the mean of class
j's over the samples of i and of i's over those of j. <b>Error</b>: the share of samples of either
class that is taken for the other one.</li>
<li><b>rho</b> = exp(-D) is the overlap of the classes in a layer, <b>D</b> their Bhattacharyya
distance, both of Gaussians with diagonal covariance. <b>Floor</b>: the mean D that identical
Gaussian classes with these sample counts would read; D means something well above it.
<b>Underflow</b>: the share of pairs whose rho is 0 in float32.</li>
<li><b>Bound</b>: sqrt(w<sub>i</sub> w<sub>j</sub>) rho, with the classes' shares w of the pair's
samples, is the most that the best classifier on this layer alone confuses them (Kailath 1967;
Nielsen 2014, arXiv 1401.4788), provided that its features are such Gaussians and that the samples
are enough to measure them.</li>
<li><b>Scale</b>: cross-entropy divided by the published regularizer, both of this data as one
batch. <b>Probe</b>: accuracy of a linear classifier, ridge regression, on the frozen
layer.</li>
"""


def html(history: Sequence[Report], names: Mapping[int, str], thumbs: Mapping[int, Tensor]) -> str:
    """The page: tables and heat map of the last report, charts of the history."""
    last = history[-1]
    sections = [
        _tiles(last),
        "<h2>Most confused pairs</h2>" + _pairs(last, names, thumbs),
        "<h2>Where the softmax mass goes</h2>" + _heat_map(last, names, thumbs),
        "<h2>Layers</h2>" + _layers(last),
    ]
    if len(history) > 1:
        steps = [report["step"] for report in history]
        charts = "".join(_chart(chart, steps) for chart in over_time(history))
        sections.append(f'<h2>Over time</h2>{_moving(history)}<div class="charts">{charts}</div>')
    images = "".join(
        f'.c{k} {{ background-image: url("{data_url(image)}") }}\n' for k, image in thumbs.items()
    )
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Confusing pairs</title><style>{STYLE}{images}</style></head><body>"
        f"<h1>Confusing pairs, layer by layer</h1>{''.join(sections)}"
        f"<h2>How to read this</h2><ul>{NOTES}</ul></body></html>\n"
    )


def _tiles(report: Report) -> str:
    step = None if report["step"] is None else str(report["step"])
    before = report["error_rate_before"]
    before = None if before is None else percent(before)
    tiles = [
        ("step", step),
        ("samples", f"{report['samples']:,}"),
        ("classes", f"{report['classes']:,}"),
        ("accuracy", percent(report["accuracy"])),
        ("cross-entropy", number(report["cross_entropy"])),
        ("error rate of the pairs", percent(report["error_rate"])),
        ("before", before),
        ("scale", number(report["scale"])),
    ]
    shown = "".join(
        f'<div class="tile"><b>{value}</b><span class="muted">{label}</span></div>'
        for label, value in tiles
        if value is not None
    )
    return f'<div class="tiles">{shown}</div>'


def _moving(history: Sequence[Report]) -> str:
    """A warning where the lines over time are of different pairs."""
    pairs = [[pair["classes"] for pair in report["pairs"]] for report in history]
    if all(p == pairs[0] for p in pairs):
        return ""
    return (
        '<p class="muted">Each report has the pairs that were the most confused at its step; give '
        "them <code>pairs</code> to follow the same ones.</p>"
    )


def _thumb(k: int, names: Mapping[int, str], thumbs: Mapping[int, Tensor]) -> str:
    if k not in thumbs:
        return ""
    return f'<span class="thumb c{k}" role="img" aria-label="{escape(names[k])}"></span>'


def _pairs(report: Report, names: Mapping[int, str], thumbs: Mapping[int, Tensor]) -> str:
    if not report["pairs"]:
        return "<p>None: fewer than two classes occur.</p>"
    origin = (
        "The pairs that the report was given."
        if report["pairs_given"]
        else "Picked on this very data: their error rate falls by itself when the model is trained "
        "again, so compare models on pairs that were picked on another set."
    )
    before = report["error_rate_before"] is not None
    layers = list(report["layers"])
    head = (
        '<th></th><th class="text" colspan="2">pair</th><th>samples</th><th>alpha</th>'
        + ("<th>error<br>before</th><th>error<br>now</th>" if before else "<th>error</th>")
        + "".join(f"<th>{escape(layer)}<br><small>rho, D</small></th>" for layer in layers)
    )
    rows = []
    for place, pair in enumerate(report["pairs"], 1):
        cells = [f'<td class="muted">{place}</td>']
        cells += [
            f'<td class="text">{_thumb(k, names, thumbs)}{escape(names[k])}</td>'
            for k in pair["classes"]
        ]
        cells.append(f"<td>{pair['samples'][0]} + {pair['samples'][1]}</td>")
        cells.append(f"<td>{number(pair['alpha'])}</td>")
        if before:
            cells.append(f"<td>{percent(pair['error_rate_before'])}</td>")
        cells.append(f"<td>{percent(pair['error_rate'])}</td>")
        for layer in layers:
            of_layer = pair["layers"][layer]
            rho, distance = number(of_layer["rho"]), number(of_layer["distance"])
            cells.append(f"<td>{rho}<br><small>{distance}</small></td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f'<p class="muted">{origin}</p>' + _table(head, rows)


def _table(head: str, rows: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><table class="list"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _heat_map(report: Report, names: Mapping[int, str], thumbs: Mapping[int, Tensor]) -> str:
    classes, matrix = report["confusion"]["classes"], report["confusion"]["mean_probs"]
    if not classes:
        return "<p>Nothing to show.</p>"
    largest = largest_off_diagonal(matrix)
    pairs = {tuple(pair["classes"]) for pair in report["pairs"]}
    named = {k: f'<span class="name">{escape(names[k])}</span>' for k in classes}
    pictures = {k: _thumb(k, names, thumbs) for k in classes}
    head = "".join(
        f'<th title="{escape(names[k])}">{pictures[k] or named[k]}</th>' for k in classes
    )
    rows = []
    for k, row in zip(classes, matrix, strict=True):
        cells = []
        for j, value in zip(classes, row, strict=True):
            tip = f'title="{escape(names[k])} as {escape(names[j])}: {percent(value)}"'
            paired = ' class="pair"' if (k, j) in pairs or (j, k) in pairs else ""
            cells.append(
                f'<td class="same" {tip}></td>'
                if j == k
                else f'<td{paired} {tip} style="background:{_shade(value, largest)}"></td>'
            )
        label = f"<th><div>{named[k]}{pictures[k]}</div></th>"
        rows.append(f"<tr>{label}{''.join(cells)}</tr>")
    return (
        "<p class=\"muted\">Mean softmax of the column's class over the samples of the row's, on a "
        f"square-root scale from white, 0, to dark, {percent(largest)}. The listed pairs are "
        'framed.</p><div class="scroll"><table class="heat"><thead><tr><th></th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _shade(value: float | None, largest: float) -> str:
    """White to dark blue."""
    if value is None or largest == 0:
        return "#fff"
    t = math.sqrt(min(value / largest, 1))
    red, green, blue = (round(255 + t * (dark - 255)) for dark in (8, 48, 107))
    return f"#{red:02x}{green:02x}{blue:02x}"


def _layers(report: Report) -> str:
    layers: Mapping[str, Mapping[str, Any]] = report["layers"]
    columns = layer_columns(report)
    head = '<th class="text">layer</th>' + "".join(
        f"<th>{column.title.replace(chr(10), '<br>')}</th>" for column in columns
    )
    rows = [
        f'<tr><td class="text">{escape(name)}</td>'
        + "".join(f"<td>{column.text(layer[column.key])}</td>" for column in columns)
        + "</tr>"
        for name, layer in layers.items()
    ]
    return '<p class="muted">Means over the pairs above.</p>' + _table(head, rows)


def _chart(chart: Chart, steps: Sequence[int]) -> str:
    colours = {line.name: line.colour for line in chart.lines}
    keys = "".join(
        f'<span class="key" style="--colour:{colour}">{escape(name)}</span>'
        for name, colour in colours.items()
    )
    legend = f'<div class="muted">{keys if len(colours) > 1 else "&nbsp;"}</div>'
    return f"<div><h3>{escape(chart.title)}</h3>{legend}{line_chart(chart, steps)}</div>"
