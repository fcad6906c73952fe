"""Finds the implementations: the compiled extension, if one was built, and the Triton kernels."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).parents[1]

_failure: str | None = None
_built: set[str] = set()


def _load() -> None:
    """Load `cwbr_fused/_C*.so`, which registers its kernels with the dispatcher."""
    global _failure
    found = sorted(PACKAGE.glob("_C*.so")) + sorted(PACKAGE.glob("_C*.pyd"))
    if not found:
        _failure = "the compiled extension was not built (see CWBR_BUILD in the README)"
        return
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        _failure = f"the compiled extension does not load: {error}"
        return
    # Asked once, here, because torch.compile cannot trace the question.
    for key in ("CPU", "CUDA"):
        if torch._C._dispatch_has_kernel_for_dispatch_key("cwbr_fused::plan", key):
            _built.add(key.lower())


def missing(backend: str) -> str | None:
    """Why the compiled extension has no kernels for "cpu" or "cuda"; None where it has."""
    if _failure is not None:
        return _failure
    if backend in _built:
        return None
    return f"the compiled extension was built without {backend} kernels"


def triton_kernels() -> ModuleType:
    """The package `cwbr_fused.triton_kernels`, imported at the first call.

    In a checkout it is the folder `triton_kernels` beside `cwbr_fused`; installed, it is inside.
    """
    name = "cwbr_fused.triton_kernels"
    if name not in sys.modules and importlib.util.find_spec(name) is None:
        sibling = PACKAGE.parent / "triton_kernels"
        spec = importlib.util.spec_from_file_location(
            name, sibling / "__init__.py", submodule_search_locations=[str(sibling)]
        )
        if spec is None or spec.loader is None:
            raise ImportError(f"{name} is neither installed nor beside the package in a checkout")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]  # as an import statement does: the next call fails the same way
            raise
    return importlib.import_module(name)


_load()
