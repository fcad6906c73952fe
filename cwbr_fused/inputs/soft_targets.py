"""Class statistics of soft targets (label smoothing, mixup, CutMix), as matrix products.

Sample b belongs to class k with weight `t_bk >= 0`. With the shares `w_bk = t_bk / sum_b t_bk`

    mean_k = sum_b w_bk z_b
    var_k = sum_b w_bk (z_b - mean_k)^2 = sum_b w_bk x_b^2 - (sum_b w_bk x_b)^2
    P_kj = sum_b w_bk softmax(logits_b)_j
    n_k = 1 / sum_b w_bk^2

where x is z less the batch's mean, and n is the effective sample size (Kish 1965): the count for
one-hot rows, and what makes `var n/(n - 1)` unbiased and `v/n` the variance of the mean. The
difference cancels where classes lie far apart for their spread, so products are taken in float64:
one-hot rows then give what class indices give, to float32 rounding.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Membership(NamedTuple):
    """Which samples the classes of a batch are made of.

    shares: (B, K) float64; columns sum to 1, or to 0 for the unused.
    counts: (K,) float64 effective samples; 0 for the unused.
    classes: (K,) int64, ascending, -1 for the unused.
    """

    shares: Tensor
    counts: Tensor
    classes: Tensor


def membership(targets: Tensor, min_count: float) -> Membership:
    """The classes whose weights sum to at least `min_count`, to within a thousandth of it.

    K = min(C, B // min_count) is static, and holds every usable class if no row sums to more than
    1; else those of largest sum, ties to the smaller class.

    Args:
        targets: (B, C) weights >= 0.
    """
    batch, columns = targets.shape
    targets = targets.detach().double()
    sums = targets.sum(0)
    usable = sums >= min_count * (1 - 1e-3)
    ranked = torch.sort(torch.where(usable, sums, -1.0), descending=True, stable=True).indices
    largest = ranked[: min(columns, int(batch / min_count))]
    classes = torch.sort(torch.where(usable[largest], largest, columns)).values
    used = classes < columns
    row = torch.where(used, classes, 0)
    shares = torch.where(used, targets[:, row] / sums[row], 0.0)
    # Rounding must not make a thousandth of a degree of freedom out of a single sample.
    effective = 1 / shares.square().sum(0)
    effective = torch.where(effective < 1 + 1e-3, 1.0, effective)
    return Membership(shares, torch.where(used, effective, 0.0), torch.where(used, classes, -1))


def class_moments(
    z: Tensor, shares: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Weighted mean and biased variance, at least eps, of each class, (K, D) in `dtype`."""
    x = z.double()
    shift = x.detach().mean(0)
    x = x - shift
    mean = shares.T @ x
    var = shares.T @ x.square() - mean.square()
    return (mean + shift).to(dtype), var.clamp(min=eps).to(dtype)


def confusion_weights(logits: Tensor, members: Membership, dtype: torch.dtype) -> Tensor:
    """`reference.confusion_weights` with weighted means of the softmax rows, (K, K) in `dtype`."""
    used = members.classes >= 0
    probs = logits.detach().to(dtype).softmax(dim=1)[:, torch.where(used, members.classes, 0)]
    mean_probs = members.shares.T @ probs.double()
    alpha = (mean_probs + mean_probs.T) / 2
    pair_used = used[:, None] & used & ~torch.eye(len(used), device=used.device).bool()
    return torch.where(pair_used, alpha, 0.0).to(dtype)
