"""Reports as TensorBoard events."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

from cwbr_fused.diagnostics.arguments import check_report, check_step, shown_names
from cwbr_fused.diagnostics.content import Report, number, percent
from cwbr_fused.diagnostics.images import ImageSource, thumbnails

SCALARS = (
    "accuracy",
    "cross_entropy",
    "regularizer",
    "scale",
    "error_rate",
    "error_rate_before",
)


def write_tensorboard(
    writer: Any,
    report: Report,
    step: int | None = None,
    *,
    images: ImageSource | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Log a report to TensorBoard.

    Scalars: `cwbr/accuracy`, `cwbr/error_rate`, `cwbr/scale` and so on, and for each layer
    `cwbr_rho/LAYER`, `cwbr_distance/LAYER`, ...; numbers that are undefined are left out. The table
    of pairs as text, and with matplotlib the heat map as a figure.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or what else has `add_scalar`, `add_text`
            and `add_figure` of that kind.
        report: from `cwbr_fused.diagnostics.report`.
        step: the training step; None: the report's own.
        images, class_names: see `write_report`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    for method in ("add_scalar", "add_text", "add_figure"):
        if not callable(getattr(writer, method, None)):
            raise TypeError(
                f"writer: expected a SummaryWriter, got {type(writer).__name__} without {method}"
            )
    check_report("report", report)
    step = report["step"] if step is None else step
    check_step("step", step, required=True)
    names = shown_names(report, class_names)
    thumbs = thumbnails(images, names)
    for key in SCALARS:
        if report[key] is not None:
            writer.add_scalar(f"cwbr/{key}", report[key], step)
    for layer, measures in report["layers"].items():
        for key, value in measures.items():
            if value is not None:
                writer.add_scalar(f"cwbr_{key}/{layer}", value, step)
    writer.add_text("cwbr/pairs", _markdown(report, names), step)
    if importlib.util.find_spec("matplotlib") is not None:
        from cwbr_fused.diagnostics import figure

        writer.add_figure("cwbr/confusion", figure.heat_map(report, names, thumbs), step)


def _markdown(report: Report, names: Mapping[int, str]) -> str:
    """The pairs as a table; TensorBoard renders Markdown and drops unsafe HTML."""

    def plain(name: str) -> str:
        special = "\\`*_{}[]()<>#+-.!|&$"
        return "".join(f"\\{c}" if c in special else " " if c.isspace() else c for c in name)

    lines = ["| pair | samples | alpha | error rate | before |", "|---|---|---|---|---|"]
    lines += [
        f"| {' / '.join(plain(names[k]) for k in pair['classes'])} | {sum(pair['samples'])} "
        f"| {number(pair['alpha'])} | {percent(pair['error_rate'])} "
        f"| {percent(pair['error_rate_before'])} |"
        for pair in report["pairs"]
    ]
    return "\n".join(lines)
