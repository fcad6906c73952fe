"""Few images for the tests of the training example."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import fgvc.data

CLASSES = 6


def use_few_glyphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The glyphs of six classes, no picture, and everything is written to the folder."""
    with np.load(fgvc.data.GLYPHS) as glyphs:
        arrays = {"chars": glyphs["chars"][:CLASSES]}
        for part in fgvc.data.PARTS:
            kept = np.flatnonzero(glyphs[f"y{part}"] < CLASSES)[: 12 * CLASSES]
            arrays |= {f"x{part}": glyphs[f"x{part}"][kept], f"y{part}": glyphs[f"y{part}"][kept]}
    np.savez(folder / "glyphs.npz", **arrays)
    monkeypatch.setattr(fgvc.data, "GLYPHS", folder / "glyphs.npz")
    monkeypatch.chdir(folder)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
