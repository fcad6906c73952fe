"""The published formulas, transcribed literally in float64: loops and K x K x D, no cleverness.

Nothing here comes from the package, so it can contradict it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def class_moments(
    z: Tensor, y: Tensor, eps: float, min_count: int
) -> tuple[list[int], Tensor, Tensor]:
    """Classes with at least `min_count` samples, their means and clamped biased variances."""
    z = z.double()
    classes = [c for c in sorted(set(y.tolist())) if int((y == c).sum()) >= min_count]
    mean = [z[y == c].mean(0) for c in classes]
    var = [
        ((z[y == c] - m) ** 2).mean(0).clamp(min=eps) for c, m in zip(classes, mean, strict=True)
    ]
    empty = z.new_zeros(0, z.shape[1])
    return classes, torch.stack(mean) if mean else empty, torch.stack(var) if var else empty


def confusion(logits: Tensor, y: Tensor, classes: list[int]) -> Tensor:
    probs = torch.softmax(logits.double(), dim=1)
    mean_probs = probs.new_zeros(len(classes), len(classes))
    for row, k in enumerate(classes):
        for column, j in enumerate(classes):
            mean_probs[row, column] = probs[y == k, j].mean()
    alpha = (mean_probs + mean_probs.T) / 2
    return alpha - torch.diag(alpha.diagonal())


def distance(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    u = var + eps
    s = (u[:, None] + u[None]) / 2
    difference = mean[:, None] - mean[None]
    logs = s.log() / 2 - u.log()[:, None] / 4 - u.log()[None] / 4
    return (difference**2 / (8 * s) + logs).sum(-1)


def layer_loss(d: Tensor, alpha: Tensor, top_m: int | None, eps: float) -> Tensor:
    pairs = [(i, j) for i in range(len(d)) for j in range(i + 1, len(d))]
    pairs.sort(key=lambda pair: (-float(alpha[pair]), pair))
    chosen = pairs if top_m is None else pairs[:top_m]
    numerator = sum((alpha[p] * torch.exp(-d[p]) for p in chosen), d.new_zeros(()))
    denominator = sum((alpha[p] for p in chosen), d.new_zeros(()))
    return numerator / max(float(denominator), eps)


def loss(
    features: list[Tensor], logits: Tensor, y: Tensor, top_m: int | None, min_count: int, eps: float
) -> Tensor:
    values = []
    for z in features:
        classes, mean, var = class_moments(z, y, eps, min_count)
        alpha = confusion(logits, y, classes)
        values.append(layer_loss(distance(mean, var, eps), alpha, top_m, eps))
    return sum(values, torch.zeros((), dtype=torch.float64)) / len(values)
