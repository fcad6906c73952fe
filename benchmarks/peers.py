"""The same formulas as a PyTorch user would write them: what this package is measured against.

A peer is a way to get the weighted overlap of pairs of diagonal Gaussians,
`sum(w exp(-D)) / sum(w)`; the code around it is the same for all. Each works in the dtype of its
inputs: one of them, in float64, is the truth that the others are checked against.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.workloads import EPS, Inputs

# Elements of a chunk's (rows, K, D) temporaries: 4 MB each, which a cache holds.
CHUNK_ELEMENTS = 2**20

# Mean, u = var + eps, and log u, (rows, D) each.
Gaussians = tuple[Tensor, Tensor, Tensor]
# Rows and columns of the pairs that count.
Chosen = tuple[Tensor, Tensor]
# (x, y, weights (rows of x, rows of y), chosen or None for all pairs) -> scalar
Overlap = Callable[[Gaussians, Gaussians, Tensor, Chosen | None], Tensor]


def gaussians(mean: Tensor, var: Tensor) -> Gaussians:
    u = var + EPS
    return mean, u, u.log()


def take(x: Gaussians, index: Any) -> Gaussians:
    mean, u, log_u = x
    return mean[index], u[index], log_u[index]


def distance(x: Gaussians, y: Gaussians) -> Tensor:
    """Bhattacharyya distance over the last dimension, as published."""
    (mean_x, u_x, log_x), (mean_y, u_y, log_y) = x, y
    s = (u_x + u_y) / 2
    return ((mean_x - mean_y) ** 2 / (8 * s) + s.log() / 2 - log_x / 4 - log_y / 4).sum(-1)


def _weighted(d: Tensor, weights: Tensor) -> Tensor:
    return (weights * torch.exp(-d)).sum() / weights.sum().clamp(min=EPS)


def _overlap(d: Tensor, weights: Tensor, chosen: Chosen | None) -> Tensor:
    return _weighted(d, weights) if chosen is None else _weighted(d[chosen], weights[chosen])


def eager(x: Gaussians, y: Gaussians, weights: Tensor, chosen: Chosen | None) -> Tensor:
    """A (K, K, D) tensor per operation, then the chosen pairs."""
    return _overlap(distance(take(x, (slice(None), None)), take(y, None)), weights, chosen)


def gathered(x: Gaussians, y: Gaussians, weights: Tensor, chosen: Chosen | None) -> Tensor:
    """Gather the chosen pairs' rows first: (M, D) per operation."""
    assert chosen is not None
    rows, columns = chosen
    return _weighted(distance(take(x, rows), take(y, columns)), weights[chosen])


def _row_distance(mean: Tensor, u: Tensor, log_u: Tensor, *y: Tensor) -> Tensor:
    return distance((mean[:, None], u[:, None], log_u[:, None]), (y[0], y[1], y[2]))


def _row_chunks(x: Gaussians, y: Gaussians, row_distance: Callable[..., Tensor]) -> Tensor:
    rows = max(1, CHUNK_ELEMENTS // y[0].numel())
    chunks = zip(*(field.split(rows) for field in x), strict=True)
    return torch.cat([row_distance(*chunk, *y) for chunk in chunks])


def chunked(x: Gaussians, y: Gaussians, weights: Tensor, chosen: Chosen | None) -> Tensor:
    """All pairs, a few rows at a time; autograd still keeps (K, K, D) tensors for the backward."""
    return _overlap(_row_chunks(x, y, _row_distance), weights, chosen)


def chunked_checkpoint(
    x: Gaussians, y: Gaussians, weights: Tensor, chosen: Chosen | None
) -> Tensor:
    """The same, recomputing each chunk in the backward: nothing of size K x K x D is kept."""

    def recomputed(*args: Tensor) -> Tensor:
        result: Tensor = checkpoint(_row_distance, *args, use_reentrant=False)
        return result

    return _overlap(_row_chunks(x, y, recomputed), weights, chosen)


def keops(x: Gaussians, y: Gaussians, weights: Tensor, chosen: Chosen | None) -> Tensor:
    """KeOps' symbolic (K, K, D), all pairs of x with itself.

    KeOps takes dense weights only as a variable of j, so each row i is a batch of its own; what it
    compiles then depends on D alone. With weights that are symmetric the gradient by the rows i is
    half the whole one: that by the columns j, the same, is not formed.
    """
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")
    from pykeops.torch import LazyTensor

    assert chosen is None
    mean_x, u_x = (LazyTensor(field[:, None, None].contiguous()) for field in x[:2])
    mean_y, u_y = (LazyTensor(field.detach()[None, None].contiguous()) for field in y[:2])
    w = LazyTensor((weights + weights.T)[:, None, :, None].contiguous())
    s = (u_x + u_y) / 2
    logs = s.log() / 2 - u_x.log() / 4 - u_y.log() / 4
    d = ((mean_x - mean_y) ** 2 / (8 * s) + logs).sum(-1)
    both: Tensor = (w * (-d).exp()).sum(dim=2).sum() / weights.sum().clamp(min=EPS)
    return both - both.detach() / 2


def class_stats(z: Tensor, row: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and clamped biased variance (K, D) of the rows of z (B, D), by class number (B,)."""
    zeros = z.new_zeros(len(counts), z.shape[1])
    mean = zeros.index_add(0, row, z) / counts[:, None]
    squares = (z - mean[row]) ** 2
    return mean, (zeros.index_add(0, row, squares) / counts[:, None]).clamp(min=EPS)


def confusion(logits: Tensor, row: Tensor, counts: Tensor, classes: Tensor) -> Tensor:
    """alpha (K, K): mean softmax mass that classes lend each other."""
    probs = logits.softmax(1)
    sums = probs.new_zeros(len(counts), logits.shape[1]).index_add(0, row, probs)
    mean_probs = (sums / counts[:, None])[:, classes]
    return (mean_probs + mean_probs.T) / 2


def loss(inputs: Inputs, overlap: Overlap) -> Tensor:
    """The regularizer of a batch: the mean over layers."""
    assert inputs.logits is not None
    assert inputs.targets is not None
    classes, row, counts = torch.unique(inputs.targets, return_inverse=True, return_counts=True)
    usable = counts >= 2
    with torch.no_grad():
        alpha = confusion(inputs.logits, row, counts, classes)[usable][:, usable].triu(1)
        top = alpha.flatten().topk(inputs.workload.top_m or alpha.numel()).indices
    chosen = (top // len(alpha), top % len(alpha))
    values = []
    for z in inputs.features:
        mean, var = class_stats(z, row, counts)
        x = gaussians(mean[usable], var[usable])
        values.append(overlap(x, x, alpha, chosen))
    return torch.stack(values).mean()


def pairs(inputs: Inputs, overlap: Overlap) -> Tensor:
    """One layer's overlap of all pairs i < j."""
    assert inputs.weights is not None
    x = gaussians(inputs.means[0], inputs.vars[0])
    return overlap(x, x, inputs.weights.triu(1), None)


def attraction(inputs: Inputs) -> Tensor:
    """`CWBR`'s energy as its docstring has it, every class seen: the mean over samples and layers.

    A (B, 1 + top_m, D) tensor of differences per layer.
    """
    assert inputs.logits is not None
    assert inputs.targets is not None
    assert inputs.workload.top_m is not None
    own = inputs.targets[:, None]
    with torch.no_grad():
        others = inputs.logits.softmax(1).scatter(1, own, -1)
        probability, confused = others.topk(inputs.workload.top_m)
        index = torch.cat([own, confused], 1)
        coefficient = torch.cat([torch.ones_like(probability[:, :1]), -probability], 1)
    values = []
    for z, mean, var in zip(inputs.features, inputs.bank_means, inputs.bank_vars, strict=True):
        distance = ((z[:, None] - mean[index]) ** 2 / (2 * var)).sum(-1)
        values.append((coefficient * distance).sum(1).mean() / z.shape[1])
    return torch.stack(values).mean()


AROUND: dict[str, Callable[[Inputs, Overlap], Tensor]] = {
    "loss": loss,
    "pairs": pairs,
    "cwbr": lambda inputs, overlap: attraction(inputs),
}
