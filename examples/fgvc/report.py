"""The result of a run in words: a table, and what its numbers mean."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from fgvc.evaluation import SCORES
from fgvc.results import (
    Difference,
    Result,
    Results,
    image_difference,
    metrics,
    paired_difference,
)

SILENT = 0.01  # of the cross-entropy


def _cell(value: float, unit: str) -> str:
    digits = f"{value:.2f}" if unit else f"{value:.3g}"
    return f"{digits} {unit}".strip()


def _difference(difference: Difference, unit: str) -> str:
    digits = ".2f" if unit else ".3g"
    text = f"{difference.mean:+{digits}}"
    if not math.isnan(difference.half):
        text += f" ± {difference.half:{digits}}"
    return f"{text} {'points' if unit == '%' else unit}".strip()


def table(results: Results) -> str:
    """One column for each method, and its difference to the first; means over seeds."""
    names = list(results)
    rows = [["", *names, *(f"{name} - {names[0]}" for name in names[1:])]]
    for name, unit, values in metrics(results):
        cells = [_cell(statistics.fmean(v), unit) for v in values]
        cells += [_difference(paired_difference(v, values[0]), unit) for v in values[1:]]
        rows.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:], rule])


def footnotes(results: Results, class_names: Sequence[str], top_m: int) -> list[str]:
    """What the numbers mean and, from the numbers, what the regularizer did."""
    names = list(results)
    base = results[names[0]]
    first = base[0].evaluation
    shown = ", ".join(
        f"{class_names[i]}/{class_names[j]} {c:.0%}"
        for (i, j), c in zip(first.pairs[:5].tolist(), first.confusion[:5].tolist(), strict=True)
    )
    notes = [
        f"All of it is measured on the test part, after the last step. The confusing pairs are the "
        f"{len(first.pairs)} that {names[0]} confuses most on the validation part (most: {shown}, "
        "in softmax mass). Their error rate is the share of images of either class that is taken "
        "for the other.",
        f"Distance: the Bhattacharyya distance per dimension between the {top_m} pairs of classes "
        "that a model confuses most, with the variance that all classes share, corrected for the "
        "finite samples; 0 is no separation. Probe: ridge regression on the frozen layer. Time in "
        "the regularizer: forward and backward, measured alone at every logged step.",
    ]
    for name, runs in results.items():
        notes += _silence(name, runs)
    notes += [_verdict(name, results[name], names[0], base) for name in names[1:]]
    if len(names) > 1 and len(base) == 1:
        notes.append("One seed each: repeat with --seeds 3 before believing a small difference.")
    return notes


def _silence(name: str, runs: Sequence[Result]) -> list[str]:
    """Where the published regularizer came to nothing."""
    rows = [row for run in runs for row in run.history if "scale" in row]
    parts = [abs(row["regularizer"] * row["scale"]) / row["cross_entropy"] for row in rows]
    silent = sum(part < SILENT for part in parts) / max(1, len(parts))
    if silent == 0:
        return []
    return [
        f"{name} was all but silent in {silent:.0%} of the logged steps: times its scale, its "
        f"value was below {SILENT:.0%} of the cross-entropy."
    ]


def _verdict(name: str, runs: Sequence[Result], base_name: str, base: Sequence[Result]) -> str:
    if len(runs) == 1:
        found = image_difference(runs[0].evaluation, base[0].evaluation)
        over = "95 % interval over the test images"
    else:
        values = [[100 * run.evaluation.scores["top-1"] for run in r] for r in (runs, base)]
        found = paired_difference(*values)
        each = ", ".join(f"{v - b:+.2f}" for v, b in zip(*values, strict=True))
        over = f"95 % interval over {len(runs)} seeds by Student's t; each: {each}"
    amount = f"{abs(found.mean):.2f} ± {found.half:.2f} points of {SCORES['top-1']}"
    if found.sign < 0:
        return f"{name} hurt here: it lost {amount} against {base_name} ({over})."
    if found.sign > 0:
        return f"{name} helped here: it gained {amount} over {base_name} ({over})."
    return (
        f"{name} made no clear difference here: {found.mean:+.2f} ± {found.half:.2f} points of "
        f"{SCORES['top-1']} against {base_name} ({over})."
    )
