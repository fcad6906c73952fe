"""Inputs for the Triton kernels' tests, and the truth they are held to."""

from __future__ import annotations

import torch
from torch import Tensor

from cwbr_fused import extension, reference

EPS = 1e-6
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ACCUMULATION_DTYPES = (torch.float32, torch.float64)
# What rounding the result to its dtype, and the sums before it, may cost relative to its scale.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-12,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
TRITON = extension.triton_kernels()


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def rand(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)


def classes(size: int, count: int, seed: int = 0) -> Tensor:
    drawn = torch.randint(count, (size,), generator=torch.Generator().manual_seed(seed))
    return drawn.to(DEVICE)


def planned(batch: int, count: int, top_m: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """order, offsets, pairs, weights by the reference; some groups are empty."""
    logits = randn(batch, count, seed=1, dtype=dtype)
    order, offsets, _, pairs, weights = reference.plan(logits, classes(batch, count), top_m, 2)
    return order, offsets, pairs, weights


def symmetric(groups: int, dtype: torch.dtype) -> Tensor:
    """Weights (K, K) >= 0 with zero diagonal."""
    alpha = rand(groups, groups, seed=5, dtype=dtype).triu(1)
    return alpha + alpha.T


def assert_near(actual: Tensor, truth: Tensor, scale: float = 1) -> None:
    """Relative to the largest element of the truth, `scale` times the tolerance of the dtype."""
    assert actual.shape == truth.shape
    largest = float(truth.abs().max()) if truth.numel() else 0
    underflow = torch.finfo(actual.dtype).smallest_normal
    bound = TOLERANCE[actual.dtype] * max(scale * largest, underflow)
    torch.testing.assert_close(actual.double(), truth.double(), rtol=0, atol=bound, equal_nan=True)
