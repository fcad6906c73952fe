"""Arguments for the emulated kernels, and the comparison of their results with float64 truth."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kernel_inputs import EPS, TOLERANCE, randn, regularizer_with_moments
from torch import Tensor

from cwbr_fused import reference
from cwbr_fused.operations import schema
from cwbr_fused.operations.reference import accumulation_dtype

from .harness import Emulator


def some_targets(batch: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(batch))


def some_moments(rows: int, dims: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means of spread 1; variances over four orders of magnitude, some of them at the clamp."""
    var = (2 * randn(rows, dims, seed=1, dtype=torch.float64)).exp() / 10
    var = torch.where(randn(rows, dims, seed=2) > 1.5, EPS, var)
    return randn(rows, dims, dtype=dtype), var.to(dtype)


def some_pairs(rows: int) -> Tensor:
    """Pairs with repetitions, in both orders, and one of a row with itself."""
    listed = [[i % rows, (i * i + 1) % rows] for i in range(9)]
    return torch.tensor([*listed, [0, rows - 1], [rows - 1, 0], [0, 0]])


def doubles(args: Any) -> Any:
    if isinstance(args, Tensor):
        return args.double() if args.is_floating_point() else args
    return [doubles(arg) for arg in args] if isinstance(args, (list, tuple)) else args


def pure_pytorch(name: str) -> Callable[..., Any]:
    """The operation with the results that it has on a GPU."""
    return regularizer_with_moments if name == "regularizer" else schema.pure_pytorch(name)


def assert_close(ours: Any, truth: Any, factor: float = 1) -> None:
    if not isinstance(ours, Tensor):
        for one, true in zip(ours, truth, strict=True):
            assert_close(one, true, factor)
    elif ours.is_floating_point():
        size = float(truth.abs().max()) if truth.numel() else 0.0
        kind = torch.finfo(ours.dtype)
        bound = factor * TOLERANCE[ours.dtype] * size + kind.smallest_normal
        torch.testing.assert_close(ours.double(), truth.double(), rtol=0, atol=bound)
    else:
        assert torch.equal(ours, truth)


def check(gpu: Emulator, name: str, *args: Any, factor: float = 1) -> Any:
    """The emulated operation agrees with the pure-PyTorch one in float64; returns its result."""
    ours = getattr(gpu, name)(*args)
    assert_close(ours, pure_pytorch(name)(*doubles(args)), factor)
    return ours


def planned(dtype: torch.dtype, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """features, order, offsets, pairs and weights of a batch with groups of one to many samples."""
    y = torch.cat([some_targets(40, 9), torch.full((20,), 3)])
    features = [(randn(60, d, seed=d) / d**0.5).to(dtype) for d in dims]
    logits = randn(60, 9, dtype=accumulation_dtype(dtype))
    order, offsets, _, pairs, weights = reference.plan(logits, y, 17, 2)
    return features, order, offsets, pairs, weights
