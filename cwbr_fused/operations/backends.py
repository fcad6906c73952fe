"""Which implementation runs, and why not another.

- `reference`: pure PyTorch; any device, every floating dtype.
- `cpu`: C++ kernels, for tensors on the CPU.
- `triton`: Triton kernels, for GPUs; on the CPU under TRITON_INTERPRET=1.
- `cuda`: CUDA C++ kernels, for the NVIDIA GPUs they were compiled for.

`backend="auto"` takes the first that is usable: `cpu` for tensors on the CPU, `cuda` or `triton`
for tensors on a GPU, and otherwise `reference`. The environment variable CWBR_BACKEND replaces
"auto" by a name of your choice. If "auto" takes the reference because compiled kernels are absent,
the first such call warns.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, TypeAlias

from cwbr_fused.operations import absence, extension

__all__ = ["NAMES", "Backend", "check", "explain", "rejection", "resolve"]

Backend: TypeAlias = Literal["auto", "cpu", "cuda", "triton", "reference"]
NAMES = ("cpu", "cuda", "triton", "reference")
# The reference under ordinary autograd, which can differentiate twice: `cwbr_fused.reference`.
PLAIN = "plain"

# Asked once, here, because torch.compile cannot trace the question.
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def rejection(name: str, device_type: str) -> str | None:
    """Why backend `name` cannot serve tensors on `device_type`; None where it can."""
    if name == "reference":
        return None
    if name == "triton":
        return _triton_rejection(device_type)
    if device_type != name:
        return f"it serves tensors on {name!r}, not on {device_type!r}"
    reason = extension.missing(name)
    return extension.unsuited_gpu() if reason is None and name == "cuda" else reason


def _triton_rejection(device_type: str) -> str | None:
    if not _TRITON_INSTALLED:
        return "the package triton is not installed"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device_type == "cuda" or (device_type == "cpu" and interpreted):
        return None
    return f"it serves GPU tensors (CPU tensors under TRITON_INTERPRET=1), not {device_type!r}"


def check(backend: str) -> str:
    """`backend` itself, with "auto" replaced by CWBR_BACKEND where that is set."""
    source = "backend"
    if backend == "auto":
        backend, source = os.environ.get("CWBR_BACKEND", "auto"), "CWBR_BACKEND"
    if backend not in ("auto", PLAIN, *NAMES):
        raise ValueError(f"{source}: expected 'auto' or one of {NAMES}, got {backend!r}")
    return backend


def resolve(backend: str, device_type: str) -> str:
    """The name of the backend that runs for tensors on `device_type`.

    Raises:
        ValueError: `backend` is unknown, or was named but cannot serve this device.
    """
    backend = check(backend)
    if backend == "auto":
        chosen = _first_usable(device_type)
        reason = rejection(device_type, device_type) if device_type in ("cpu", "cuda") else None
        if chosen == "reference" and reason is not None:
            absence.warn_once(device_type, reason)
        return chosen
    reason = rejection(backend, device_type) if backend != PLAIN else None
    if reason is not None:
        raise ValueError(f"backend: expected one that can be used, got {backend!r}: {reason}")
    return backend


def _first_usable(device_type: str) -> str:
    """Triton's interpreter is slower than the reference by far, so only its name selects it."""
    names = [name for name in NAMES if (name, device_type) != ("triton", "cpu")]
    return next(name for name in names if rejection(name, device_type) is None)


def explain(device_type: str = "cpu") -> str:
    """One line per backend, in the order in which "auto" tries them: chosen, usable, or why not."""
    named = check("auto")
    chosen = _first_usable(device_type) if named == "auto" else resolve(named, device_type)
    lines = []
    for name in NAMES:
        reason = rejection(name, device_type)
        verdict = f"rejected: {reason}" if reason else "chosen" if name == chosen else "usable"
        lines.append(f"{name:9} {verdict}")
    return "\n".join(lines)
