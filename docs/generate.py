"""Writes the API reference, from the docstrings, as HTML: `python docs/generate.py build/docs`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pdoc

MODULES = (
    "cwbr_fused",
    "cwbr_fused.diagnostics",
    "cwbr_fused.integrations",
    "cwbr_fused.balanced",
    "cwbr_fused.overlap",
    "cwbr_fused.operations",
    "cwbr_fused.inputs",
    "cwbr_fused.info",
)
# The base classes of `cwbr_fused.integrations`, by the library that has them.
BASES = {
    "lightning": ("lightning.pytorch", ("Callback", "LightningModule", "Trainer")),
    "transformers": ("transformers", ("Trainer",)),
}


def stand_in(library: str) -> None:
    """Empty classes in place of those of a library that is not installed."""
    module_name, classes = BASES[library]
    for name in {library, module_name}:
        sys.modules[name] = ModuleType(name)
    for name in classes:
        setattr(sys.modules[module_name], name, type(name, (), {"__module__": module_name}))


def main(folder: str) -> None:
    for library in BASES:
        if importlib.util.find_spec(library) is None:
            stand_in(library)
    pdoc.render.configure(docformat="google", search=True)
    pdoc.pdoc(*MODULES, output_directory=Path(folder))


if __name__ == "__main__":
    main(sys.argv[1])
