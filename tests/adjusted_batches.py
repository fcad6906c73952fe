"""Batches for the tests of what changes the plain formulas."""

from __future__ import annotations

import torch
from torch import Tensor

from cwbr_fused import reference

EPS = 1e-6
OBJECTIVES = ["overlap", "log_overlap"]


def batch(seed: int, size: int, dims: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, dims, generator=generator, dtype=torch.float64)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64) * 2
    return z, logits, torch.randint(classes, (size,), generator=generator)


def class_variances(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variances of all classes and their counts."""
    _, _, var, counts, _ = reference.class_stats_diag(z, y, 1e-30, min_count=1)
    return var, counts
