"""The kernels of each backend behind one call, for tests that hold all of them to the same."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from emulation.harness import Emulator, emulated_library
from kernel_inputs import flat, map_tensors, outcome, written
from torch import Tensor
from triton_inputs import DEVICE, TRITON

from cwbr_fused.operations import extension


@dataclass(frozen=True)
class Kernels:
    """The operations of one backend, and the device whose tensors they take."""

    operations: Any
    device: str

    def __call__(self, name: str, *arguments: Any) -> Any:
        """The results on the CPU of operation `name`, whose arguments are moved to the device.

        What the operation writes is brought back.
        """
        moved = [map_tensors(lambda t: t.to(self.device), a) for a in arguments]
        result = getattr(self.operations, name)(*moved)
        for position in written(name):
            for here, there in zip(flat(arguments[position]), flat(moved[position]), strict=True):
                here.copy_(there)
        if result is None or isinstance(result, Tensor):
            return result if result is None else result.cpu()
        return tuple(t.cpu() for t in result)

    def outcome(self, name: str, *arguments: Any) -> list[Tensor]:
        """The results on the CPU, and copies of the arguments that operation `name` writes."""
        return outcome(partial(self, name), name, arguments)


def kernels_of(backend: str) -> Kernels:
    """Of "cpu", "triton", or "cuda" on the emulated GPU; skips the test where there are none."""
    if backend == "triton":
        return Kernels(TRITON, DEVICE)
    if backend == "cuda":
        return Kernels(Emulator(emulated_library()), "cpu")
    if (reason := extension.missing("cpu")) is not None:
        pytest.skip(reason)
    return Kernels(torch.ops.cwbr_fused, "cpu")


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
