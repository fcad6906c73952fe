"""Reports as a page, as a picture and as TensorBoard events."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from cwbr_fused.diagnostics.arguments import (
    Report,
    check_report,
    check_step,
    checked_histories,
    shown_names,
)
from cwbr_fused.diagnostics.images import ImageSource, thumbnails

SCALARS = ("accuracy", "cross_entropy", "regularizer", "scale", "error_rate", "error_rate_before")


def write_report(
    path: str | PathLike[str],
    report: Report | Sequence[Report] | Mapping[str, Report | Sequence[Report]],
    *,
    images: ImageSource | None = None,
) -> None:
    """Write a report, or the histories of several methods, as one file: a page or a picture.

    Pairs and heat map are those of the last report. A history adds how accuracy, error rate and the
    overlap at each layer changed over the steps. The page holds all it shows and asks nothing of
    the network.

    Args:
        path: ends in .html or .png.
        report: from `cwbr_fused.diagnostics.report`; or a sequence of those with rising `step`; or
            a mapping from names of methods to either, to show the methods beside each other.
        images: an example image of each class: a mapping from classes, or a function of a class
            that may return None, to a tensor (H, W), (1, H, W) or (3, H, W), uint8 or
            floating-point; what exceeds [0, 1], as normalized images do, is stretched to it.

    Raises:
        TypeError, ValueError: naming the argument.
        ImportError: without matplotlib and Jinja2, which `pip install 'cwbr_fused[report]'` brings.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".html", ".png"):
        raise ValueError(f"path: expected a name that ends in .html or .png, got {str(path)!r}")
    histories = checked_histories(report)
    last = list(histories.values())[-1][-1]
    thumbs = thumbnails(images, shown_names(last))
    try:
        from cwbr_fused.diagnostics import figure, page
    except ImportError as error:
        raise ImportError(
            f"write_report: expected matplotlib and Jinja2, got {error}; "
            "pip install 'cwbr_fused[report]'"
        ) from error
    if suffix == ".html":
        Path(path).write_text(page.html(histories, thumbs), encoding="utf-8")
    else:
        figure.overview(histories, thumbs).savefig(path)


def write_tensorboard(
    writer: Any, report: Report, step: int | None = None, *, images: ImageSource | None = None
) -> None:
    """Log a report to TensorBoard.

    Scalars: `cwbr/accuracy`, `cwbr/error_rate` and so on, and for each layer `cwbr_overlap/LAYER`,
    `cwbr_share/LAYER`, ...; numbers that are undefined are left out. The pairs are logged as text.
    Where matplotlib is installed the heat map is logged as a figure.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or an object with the same `add_scalar`,
            `add_text` and `add_figure`.
        report: from `cwbr_fused.diagnostics.report`.
        step: the training step; None: the report's own.
        images: see `write_report`.

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
    thumbs = thumbnails(images, shown_names(report))
    scalars = {f"cwbr/{key}": report[key] for key in SCALARS}
    for layer, measures in report["layers"].items():
        scalars |= {f"cwbr_{key}/{layer}": value for key, value in measures.items()}
    for tag, value in scalars.items():
        if value is not None:
            writer.add_scalar(tag, value, step)
    writer.add_text("cwbr/pairs", _markdown(report), step)
    try:
        from cwbr_fused.diagnostics import figure
    except ImportError:
        return
    writer.add_figure("cwbr/confusion", figure.heat_map(report, thumbs), step)


def _markdown(report: Report) -> str:
    """The pairs as a table; TensorBoard renders Markdown and drops unsafe HTML."""

    def plain(name: str) -> str:
        special = "\\`*_{}[]()<>#+-.!|&$"
        return "".join(f"\\{c}" if c in special else " " if c.isspace() else c for c in name)

    lines = ["| pair | samples | softmax mass | error rate | before |", "|---|---|---|---|---|"]
    for pair in report["pairs"]:
        shares = (pair[key] for key in ("alpha", "error_rate", "error_rate_before"))
        cells = [" / ".join(map(plain, pair["names"])), str(sum(pair["samples"]))]
        cells += ["-" if share is None else f"{share:.1%}" for share in shares]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
