"""What a bug report needs: `python -m cwbr_fused.info`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

import torch

import cwbr_fused
from cwbr_fused.operations import absence, backends, extension

# What changes behaviour from outside; CWBR_BUILD matters only while installing.
OVERRIDES = (
    "CWBR_BACKEND",
    "CWBR_CPU_ISA",
    "CWBR_EARLY_EXIT",
    "CWBR_TRITON_AUTOTUNE",
    "TRITON_INTERPRET",
)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kernels(backend: str) -> str:
    """Whether the kernels are there; if not, why, and what to do about it."""
    reason = extension.missing(backend)
    if reason is not None:
        return f"{reason}; {absence.remedy(backend, reason)}"
    if backend == "cuda":
        return "built"
    try:
        return f"built, running on {torch.ops.cwbr_fused_build.cpu_isa()}"
    except (ValueError, RuntimeError) as error:  # torch 2.15 makes it a RuntimeError
        return f"built, but {error}"


def _explained(device_type: str) -> str:
    try:
        return backends.explain(device_type)
    except ValueError as error:
        return str(error)  # CWBR_BACKEND names one that cannot serve this device


def info() -> str:
    """Versions, platform, what was built, overrides, and the backends of each kind of device."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    overrides = [f"{name}={os.environ[name]}" for name in OVERRIDES if name in os.environ]
    facts = {
        "cwbr_fused": f"{cwbr_fused.__version__} in {Path(cwbr_fused.__file__).parent}",
        "python": f"{platform.python_version()} on {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}, "
        f"{torch.get_num_threads()} threads",
        "triton": _version("triton"),
        "cpu kernels": _kernels("cpu"),
        "cuda kernels": _kernels("cuda"),
        "GPUs": ", ".join(gpus) or "none",
        "overrides": " ".join(overrides) or "none",
    }
    lines = [f"{name:13} {value}" for name, value in facts.items()]
    for device_type in ("cpu", "cuda"):
        lines.append(f"backends for tensors on {device_type!r}:")
        lines.extend(f"    {line}" for line in _explained(device_type).splitlines())
    return "\n".join(lines)


if __name__ == "__main__":
    print(info())
