"""A pytest plugin: Triton's kernels are compiled to PTX, which the machine runs on the CPU.

TRITON_INTERPRET=0 PYTHONPATH=.:tests/ptx python -m pytest -p plugin tests/operations/...
"""

from __future__ import annotations

import os
import re
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"

import machine
import program
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ARCH = int(os.environ.get("CWBR_PTX_ARCH", "80"))
conditions = machine.Conditions(
    seed=int(os.environ.get("CWBR_PTX_SEED", "0")),
    scattered=os.environ.get("CWBR_PTX_SCATTERED") == "1",
)
# By the kernel's name and its binary's hash: all programs that ran.
programs: dict[tuple[str, str], program.Program] = {}
# Puts another program in the place of one, for tests of the machine itself.
substitutes: dict[tuple[str, str], program.Program] = {}


class _Driver:
    """In the place of Triton's, for a device that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self) -> str:
        return str(ARCH)

    def get_current_stream(self, device: Any = None) -> int:
        return 0


def _no_cubin(self: Any, source: str, metadata: dict[str, Any], *_: Any) -> bytes:
    match = re.search(r"\.entry (\w+)", source)
    assert match
    metadata["name"] = match[1]
    return b""


def _arguments(value: Any, kind: Any) -> list[int]:
    """A kernel's parameters for an argument of Triton's, whose type Triton names."""
    if isinstance(kind, (tuple, list)):
        return [x for v, k in zip(value, kind, strict=True) for x in _arguments(v, k)]
    if kind == "constexpr":
        return []
    return [value.data_ptr() if isinstance(value, Tensor) else int(value)]


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in _tensors(part)]
    return [value] if isinstance(value, Tensor) else []


_compile = JITFunction.run


def _run(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
    binary = _compile(kernel, *args, grid=grid, warmup=True, **options)
    name = kernel.fn.__name__
    key = (name, binary.hash)
    if key not in programs:
        programs[key] = machine.translate(binary.asm["ptx"], name)
    if warmup or 0 in grid:
        return binary
    values = dict(zip(kernel.arg_names, args, strict=False))
    values |= {k: v for k, v in options.items() if k in kernel.arg_names}
    signature = binary.src.signature.items()
    conditions.seed += 1
    try:
        machine.run(
            substitutes.get(key, programs[key]),
            grid,
            32 * binary.metadata.num_warps,
            binary.metadata.shared,
            [x for parameter, kind in signature for x in _arguments(values[parameter], kind)],
            _tensors([values[parameter] for parameter, _ in signature]),
            conditions,
        )
    except machine.KernelError as fault:
        raise machine.KernelError(f"{name}: {fault}") from None
    return binary


def install() -> None:
    os.environ.setdefault("TRITON_CACHE_DIR", str(machine.BUILD / "triton"))
    CUDABackend.make_cubin = _no_cubin
    driver.set_active(_Driver())
    JITFunction.run = _run
    # Uninitialised memory is full of NaN.
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)


install()
