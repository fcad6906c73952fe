"""A warning, given once, that compiled kernels are absent, with the reason and a remedy."""

from __future__ import annotations

import re
import warnings

import torch

from cwbr_fused.operations.warning import CWBRWarning

REINSTALL = "reinstall cwbr_fused from its sources: CWBR_BUILD={} pip install --force-reinstall"
# What to do for each kind of reason; the first pattern that matches counts.
REMEDIES = (
    (r"cuda kernels were not built", f"put nvcc on PATH and {REINSTALL}; or install triton"),
    (r"were not built", f"install a C++20 compiler and {REINSTALL}"),
    (r"were built for compute capability", f"{REINSTALL}; or install triton"),
    (
        r"undefined symbol|Symbol not found|procedure could not be found",
        f"the library does not fit torch {{torch}}; use torch 2.10 or newer, or {REINSTALL}",
    ),
    (r"GLIBC|CXXABI|newer macOS", f"the library was built on a newer system; {REINSTALL}"),
    (
        r"ELF|file too short|wrong architecture|not a valid Win32",
        f"the file is damaged or made for another kind of processor; {REINSTALL}",
    ),
    (
        r"cannot open shared object|Library not loaded|module could not be found",
        f"a library it needs is missing: repair this installation of torch, or {REINSTALL}",
    ),
    (r"", REINSTALL),
)

_said: set[str] = set()


def remedy(backend: str, reason: str) -> str:
    """What a user can do if the kernels of `backend` are absent for this reason."""
    text = next(text for pattern, text in REMEDIES if re.search(pattern, reason))
    return text.format(backend, torch=torch.__version__)


def warn_once(backend: str, reason: str) -> None:
    """Warn that plain PyTorch runs in place of `backend`, except while torch.compile traces."""
    if backend in _said or torch.compiler.is_compiling():
        return
    _said.add(backend)
    warnings.warn(
        f"cwbr_fused runs in plain PyTorch, many times slower than its {backend} kernels: "
        f"{reason}. Remedy: {remedy(backend, reason)}. CWBR_BACKEND=reference selects plain "
        "PyTorch and silences this warning.",
        CWBRWarning,
        stacklevel=4,
    )
