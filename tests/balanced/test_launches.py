"""How much a step of `CWBR` asks of a device: a fixed number of launches, and a few per layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_triton_graph import counted_launches
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from cwbr_fused import CWBR

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

BATCH, CLASSES = 12, 7
# Operations that make a tensor and leave it as it is.
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# The range of the targets is looked at on the CPU alone; on a GPU the kernels assert it.
ON_THE_CPU = {"aminmax", "_local_scalar_dense"}
# Pooling, the length of the gradient, and the sum of both.
PER_LAYER = 3


class Launches(TorchDispatchMode):
    """Counts torch's operations that start a kernel: neither views nor allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        returned = [r.alias_info for r in func._schema.returns]
        is_view = any(alias is not None and not alias.is_write for alias in returned)
        left_out = name in ALLOCATIONS | ON_THE_CPU or func.namespace.startswith("cwbr_fused")
        if not (is_view or left_out):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def step(cwbr: nn.Module | None, layers: int, dtype: torch.dtype, names: list[str]) -> None:
    """A forward and backward pass through feature maps; adds what it launched."""
    torch.manual_seed(0)
    shape = BATCH, 3, 2, 2
    leaves = [torch.randn(shape, dtype=dtype, requires_grad=True) for _ in range(layers)]
    logits = torch.randn(BATCH, CLASSES, requires_grad=True)
    targets = torch.arange(BATCH) % CLASSES
    with counted_launches(run=True) as ours, Launches() as theirs:
        features: list[Tensor] = [leaf * 2 for leaf in leaves]
        loss = torch.stack([f.float().square().sum() for f in features]).sum() + logits.sum()
        if cwbr is not None:
            cwbr(features, logits, targets)
        loss.backward()
    names += ours + theirs.names


def launches(layers: int, dtype: torch.dtype) -> list[str]:
    """Of a step of `CWBR` alone, in which no cosine is measured."""
    cwbr, found, others = CWBR(CLASSES, backend="triton"), [], []
    for _ in range(3):
        found.clear()
        step(cwbr, layers, dtype, found)
    step(None, layers, dtype, others)
    for name in others:
        found.remove(name)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_four_layers_is_at_most_35_launches(dtype: torch.dtype) -> None:
    found = launches(4, dtype)
    assert len(found) <= 35, found


def test_launches_grow_by_three_a_layer() -> None:
    few, many = launches(2, torch.float32), launches(5, torch.float32)
    assert len(many) - len(few) == 3 * PER_LAYER, (few, many)
