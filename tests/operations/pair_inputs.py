"""Means and variances on which the pair kernels may lose precision, and pairs of their rows."""

from __future__ import annotations

import torch
from kernel_inputs import rand, randn
from torch import Tensor


def moments(kind: str, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Float32 means and variances (k, d) of the kind that breaks something."""
    mean, var = randn(k, d, seed=1), rand(k, d, seed=2) + 0.1
    if kind == "means of 1000":
        mean = mean + 1000
    elif kind == "variances from 1e-6 to 1e6":
        var = 10 ** (12 * rand(k, d, seed=3) - 6)
    elif kind == "variances at the clamp":
        var = torch.where(rand(k, d, seed=3) < 0.6, 1e-6, 10 * var * rand(k, 1, seed=4))
    elif kind == "all variances at the clamp":
        var = torch.full_like(var, 1e-6)
    elif kind == "huge":
        mean, var = 300 * mean, 1e5 * var
    elif kind == "nearly equal":
        mean, var = mean[:1] + 1e-3 * mean, var[:1] * (1 + 1e-3 * var)
    return mean.contiguous(), var.contiguous()


KINDS = (
    "plain",
    "means of 1000",
    "variances from 1e-6 to 1e6",
    "variances at the clamp",
    "all variances at the clamp",
    "huge",
    "nearly equal",
)
# Every remainder of the 4, 8 and 16 lanes, of tiles of 8 rows and of groups of 8 vectors.
SHAPES = (
    [(2, d) for d in range(1, 18)]
    + [(5, 31), (8, 100), (9, 128), (10, 129), (16, 200), (17, 256), (20, 777)]
    + [(3, 2048), (3, 5000), (40, 150), (300, 37)]
)


def shapes(kind: str) -> list[tuple[int, int]]:
    """With one shape whose rows are more than one block."""
    return [*SHAPES, (530, 5)] if kind == "plain" else SHAPES


def pairs_of(k: int) -> Tensor:
    """Some 2 k pairs in no order, of which many share rows."""
    generator = torch.Generator().manual_seed(5)
    i, j = torch.randint(k, (2, 2 * k + 3), generator=generator)
    return torch.stack([i, torch.where(i == j, (j + 1) % k, j)], dim=1)


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)
