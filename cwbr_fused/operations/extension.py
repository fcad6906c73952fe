"""Finds the compiled extensions, if they were built, and the Triton kernels."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

PACKAGE = Path(__file__).parents[1]
# The compiled extensions, each with the dispatch key of its kernels.
FILES = {"cpu": ("_C", "CPU"), "cuda": ("_cuda", "CUDA")}

_missing: dict[str, str] = {}
_capabilities: list[tuple[int, int]] = []


def _load(backend: str) -> None:
    """Load the extension of `backend`, which registers its kernels with the dispatcher."""
    name, key = FILES[backend]
    found = [p for suffix in ("so", "pyd") for p in sorted(PACKAGE.glob(f"{name}.*{suffix}"))]
    if not found:
        _missing[backend] = f"the {backend} kernels were not built (see CWBR_BUILD in the docs)"
        return
    try:
        torch.ops.load_library(str(found[0]))
    except OSError as error:
        reason = error.__cause__ or error  # torch's own error names the file alone
        _missing[backend] = f"the compiled {backend} kernels do not load: {reason}"
        return
    # Asked once, here, because torch.compile cannot trace the question.
    if not torch._C._dispatch_has_kernel_for_dispatch_key("cwbr_fused::plan", key):
        _missing[backend] = f"{found[0].name} has no {backend} kernels"


def missing(backend: str) -> str | None:
    """Why there are no compiled kernels for "cpu" or "cuda"; None where there are."""
    return _missing.get(backend)


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures`, as in TORCH_CUDA_ARCH_LIST, runs on such a GPU.

    Machine code runs on GPUs of its generation from its own capability on; PTX on all later ones.
    """
    for name in architectures.replace(";", " ").split():
        major, minor = map(int, name.removesuffix("+PTX").rstrip("af").split("."))
        if major == capability[0] and minor <= capability[1]:
            return True
        if name.endswith("+PTX") and (major, minor) <= capability:
            return True
    return False


def unsuited_gpu() -> str | None:
    """Why the CUDA kernels cannot run on some GPU of this machine; None if they run on all."""
    if not _capabilities and not torch.compiler.is_compiling():  # which cannot trace the question
        devices = range(torch.cuda.device_count())
        _capabilities.extend(torch.cuda.get_device_capability(i) for i in devices)
    for major, minor in _capabilities:
        if not runs_on(_architectures, (major, minor)):
            return (
                f"they were built for compute capability {_architectures}, and a GPU of this "
                f"machine has {major}.{minor}; build with TORCH_CUDA_ARCH_LIST={major}.{minor}"
            )
    return None


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
            raise ImportError(
                f"{name}: expected it installed, or beside the package in a checkout, got neither"
            )
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]  # as an import statement does: the next call fails the same way
            raise
    return importlib.import_module(name)


for _backend in FILES:
    _load(_backend)
_architectures: str = "" if missing("cuda") else torch.ops.cwbr_fused_build.cuda_architectures()
