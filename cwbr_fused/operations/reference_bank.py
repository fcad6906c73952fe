"""The operations of the class bank in plain PyTorch: what every backend must compute.

A bank holds a mean for each of all C classes, and variances that they share. For a sample z of
class y the squared Mahalanobis distance to class c is 8 times the Bhattacharyya distance of
N(z, var) and N(mean_c, var). `CWBR` pulls z to its own class and pushes it from those that the
model confuses with it, by the probabilities p that the model itself gives them:

    E(z) = |z - mean_y|^2 / (2 var) - sum_j p_j |z - mean_j|^2 / (2 var)

`top_confusions` names the classes j and their probabilities, `class_attraction` is E, for any
coefficients, and its gradient. `observe_classes` learns the variances from the moments of a batch's
classes, `follow_classes` moves the means of the bank towards those of the batch: the only
operations that write into their arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cwbr_fused.operations.reference import accumulation_dtype


def top_confusions(
    logits: Tensor, targets: Tensor, seen: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each sample the seen classes, other than its own, of largest probability.

    Args:
        logits: (B, C).
        targets: (B,) classes.
        seen: (C,) bool; only these classes are candidates.
        top: how many classes at most.

    Returns:
        index: (B, J) int64 with J = min(top, C - 1), by falling logit, ties to the smaller class;
            -1 where there is no candidate left, and in rows that hold a NaN or an infinity
            other than -inf.
        weight: (B, J), their probabilities, of the softmax over all C; 0 where index is -1.
        own: (B,), the probability of the sample's own class among all C.
    """
    dtype = accumulation_dtype(logits.dtype)
    classes = logits.shape[1]
    scores = logits.to(dtype)
    # Beside large logits a logarithm rounds away: the sum is taken beside their largest.
    level = scores.logsumexp(1, keepdim=True)
    level = torch.where(level.isfinite(), level, 0)
    log_mass = (scores - level).logsumexp(1, keepdim=True)
    own = (scores.gather(1, targets[:, None].long()) - level - log_mass).exp()[:, 0]
    finite = (scores < torch.inf).all(1)[:, None]
    candidate = seen & (torch.arange(classes, device=logits.device) != targets[:, None])
    scores = torch.where(candidate & finite, scores, -torch.inf)
    value, index = scores.sort(dim=1, descending=True, stable=True)
    width = max(0, min(top, classes - 1))
    value, index = value[:, :width], index[:, :width]
    usable = value > -torch.inf
    weight = torch.where(usable, (value - level - log_mass).exp(), 0)
    return torch.where(usable, index, -1), weight, own


def class_attraction(
    z: Tensor, mean: Tensor, var: Tensor, index: Tensor, coefficient: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted squared Mahalanobis distances of each sample to some classes, and their gradient.

    Differences are taken before they are weighted: means may be large beside the spread.

    Args:
        z: (B, D) features, any floating dtype.
        mean: (C, D) class means, in the accumulation dtype.
        var: (D,) variances > 0.
        index: (B, J) int64 classes; -1 for none.
        coefficient: (B, J), positive to attract, negative to repel; not read where index is -1.

    Returns:
        energy: (B,), `sum_j c_j |z - mean_j|^2 / (2 var)`, in the accumulation dtype.
        gradient: (B, D) of the energy's sum, `sum_j c_j (z - mean_j) / var`.
    """
    used = (index >= 0)[:, :, None]
    c = torch.where(used, coefficient[:, :, None], 0)
    difference = z.to(mean.dtype)[:, None] - mean[index.clamp(min=0)]
    difference = torch.where(used, difference, 0)
    energy = (c * difference.square() / (2 * var)).sum((1, 2))
    return energy, (c * difference).sum(1) / var


def floored(var: Tensor, floor: float) -> Tensor:
    """(D,) variances > 0: `var` raised by `floor` times its mean; 1 while that is 0."""
    level = var.mean()
    return torch.where(level > 0, var + (floor * level + torch.finfo(var.dtype).tiny), 1)


def observe_classes(
    mean: Tensor,
    count: Tensor,
    var: Tensor,
    updates: Tensor,
    classes: Tensor,
    size: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    momentum: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Updates the variances by the scatter of a batch about the means of a bank.

    Args:
        mean, count: (C, D) and (C,), the class means and how many samples each has seen.
        var, updates: (D,) and (), the variances and how often they were updated; both are written.
        classes: (K,) int64, distinct but for negative ones, which are left out.
        size: (K,) how many samples, or how much weight, of each class; 0 leaves it out.
        batch_mean, batch_var: (K, D) of the samples of each; variances may be 0.
        momentum: of the variances, which are a plain average until that moves more slowly.
        floor: of the metric, as a share of the mean variance.

    Returns:
        weight: (K,) `size`, 0 for classes left out, also where the moments are too large to square.
        metric: (D,) the variances with a floor, 1 while there are none.
    """
    # Nor may a later difference to this mean, whose square is at most 4 of these, overflow.
    finite = (4 * torch.addcmul(batch_var, batch_mean, batch_mean).sum(1)).isfinite()
    weight = torch.where((classes >= 0) & (size > 0) & finite, size, 0)
    rows = classes.clamp(min=0)
    known = torch.where(count[rows] > 0, weight, 0)
    total = known.sum()
    any_known = (total > 0).to(total.dtype)
    difference = batch_mean - mean[rows]
    scatter = torch.addcmul(batch_var, difference, difference)
    scatter = torch.where(known[:, None] > 0, scatter, 0)  # 0 times what is not finite is not 0
    share = known / (total + (1 - any_known))
    now = (share[:, None] * scatter).sum(0)
    updates += any_known
    pace = (1 / updates.clamp(min=1)).clamp(min=1 - momentum)
    var.lerp_(now, any_known * pace)
    return weight, floored(var, floor)


def follow_classes(
    mean: Tensor,
    count: Tensor,
    classes: Tensor,
    weight: Tensor,
    batch_mean: Tensor,
    momentum: float,
) -> None:
    """Moves class means towards those of a batch: averages that turn into moving ones.

    Args:
        mean, count: (C, D) and (C,), as for `observe_classes`; both are written.
        classes, weight: (K,) int64, distinct but for negative ones, which are left out, and the
            weights that `observe_classes` returns; 0 leaves a class out.
        batch_mean: (K, D).
        momentum: how much of a mean is kept at least when its class occurs again.
    """
    rows = classes.clamp(min=0)
    weight = torch.where(classes >= 0, weight, 0)
    count.index_add_(0, rows, weight)
    used = weight > 0
    rate = (weight / count[rows].clamp(min=1)).clamp(min=1 - momentum)
    move = torch.where(used[:, None], rate[:, None] * (batch_mean - mean[rows]), 0)
    mean.index_add_(0, rows, move)
