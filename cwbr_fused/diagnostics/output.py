"""Reports as files: a page or a picture."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from cwbr_fused.diagnostics import page
from cwbr_fused.diagnostics.arguments import checked_history, shown_names
from cwbr_fused.diagnostics.content import Report
from cwbr_fused.diagnostics.images import ImageSource, thumbnails


def write_report(
    path: str | PathLike[str],
    report: Report | Sequence[Report],
    *,
    images: ImageSource | None = None,
    class_names: Sequence[str] | None = None,
) -> None:
    """Write a report, or a history of reports, as one file: a page or a picture.

    The page holds all it shows and asks nothing of the network or of other packages. Tables and
    heat map are the last report's; a history adds what became of its numbers over the steps.

    Args:
        path: ends in .html, or in .png, which needs matplotlib.
        report: from `cwbr_fused.diagnostics.report`, or a sequence of those with rising `step`.
        images: an example image of each class: a mapping from classes, or a function of a class
            that may return None, to a tensor (H, W), (1, H, W) or (3, H, W), uint8 or
            floating-point; what exceeds [0, 1], as normalized images do, is stretched to it.
        class_names: C names, in place of those in the report.

    Raises:
        TypeError, ValueError: naming the argument.
        ImportError: .png without matplotlib.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in (".html", ".png"):
        raise ValueError(f"path: expected a name that ends in .html or .png, got {str(path)!r}")
    history = checked_history(report)
    names = shown_names(history[-1], class_names)
    thumbs = thumbnails(images, names)
    if suffix == ".html":
        Path(path).write_text(page.html(history, names, thumbs), encoding="utf-8")
        return
    from cwbr_fused.diagnostics import figure

    figure.overview(history, names, thumbs).savefig(path, dpi=110)
