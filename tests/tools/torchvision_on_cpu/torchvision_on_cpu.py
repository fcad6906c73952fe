"""Lets PyPI's torchvision be imported beside a CPU build of torch, for which it has no library.

Its compiled operators (`nms` and the like) stay unusable; its models, transforms and datasets are
Python. `make install` puts this file and the .pth that runs it into the test environment.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

# Those whose schema torchvision takes for granted while it is imported.
OPERATORS = ("nms", "qnms")
_kept = []  # a library that is collected takes its operators along


class Finder(MetaPathFinder):
    """Declares the operators before the first import of torchvision, if its library fails."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            _declare_missing(Path(spec.submodule_search_locations[0]))
        return spec


def _declare_missing(folder: Path) -> None:
    import torch

    try:
        for library in folder.glob("_C*"):
            torch.ops.load_library(str(library))
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for operator in OPERATORS:
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _kept.append(library)


def install() -> None:
    """Idempotent: Python 3.11 reads the .pth files of a virtual environment twice."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
