"""A report as one HTML page that holds everything it shows."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from cwbr_fused.diagnostics import figure
from cwbr_fused.diagnostics.arguments import Histories
from cwbr_fused.diagnostics.figure import Thumbs


def html(histories: Histories, thumbs: Thumbs) -> str:
    """The page: pairs, heat map and layers of the last report, charts of the histories."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": figure.percent, "number": figure.number}
    last = figure.latest(histories)
    chosen = [[pair["classes"] for pair in r["pairs"]] for h in histories.values() for r in h]
    return environment.get_template("page.html").render(
        report=last,
        pictures={k: png_url(image) for k, image in thumbs.items()},
        charts=svg_url(figure.charts(histories)),
        heat_map=svg_url(figure.heat_map(last, thumbs)),
        pairs_differ=any(pairs != chosen[0] for pairs in chosen),
    )


def svg_url(drawing: Figure | None) -> str | None:
    """A URL that holds the picture; the same drawing gives the same text."""
    if drawing is None:
        return None
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": "cwbr_fused"}):
        drawing.savefig(file, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def png_url(image: Tensor) -> str:
    """A URL that holds (H, W, 3) uint8."""
    file = io.BytesIO()
    imsave(file, image.numpy(), format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
