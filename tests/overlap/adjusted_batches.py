"""Batches for the tests of what changes the plain formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cwbr_fused import reference

EPS = 1e-6
OBJECTIVES = ["overlap", "log_overlap"]
ADJUSTED: list[dict[str, Any]] = [
    {"temperature": 3},
    {"temperature": "dims", "shrinkage": "pooled"},
    {"shrinkage": 2.5, "min_count": 1},
    {"shrinkage": "analytic", "noise_floor": True, "min_count": 1},
    {"noise_floor": True, "temperature": 0.5},
]


def batch(seed: int, size: int, dims: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, dims, generator=generator, dtype=torch.float64)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64) * 2
    return z, logits, torch.randint(classes, (size,), generator=generator)


def smoothed(y: Tensor, classes: int, amount: float) -> Tensor:
    """The soft targets of label smoothing."""
    return one_hot(y, classes).double() * (1 - amount) + amount / classes


def class_variances(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variances of all classes and their counts."""
    _, _, var, counts, _ = reference.class_stats_diag(z, y, 1e-30, min_count=1)
    return var, counts
