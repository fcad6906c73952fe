"""The operations of the class bank in plain PyTorch: what every backend must compute.

A bank holds a mean for each of all C classes, and variances that they share. For a sample z of
class y the squared Mahalanobis distance to class c is 8 times the Bhattacharyya distance of
N(z, var) and N(mean_c, var). `CWBR` pulls z to its own class and pushes it from those that the
model confuses with it, by the probabilities p that the model itself gives them:

    E(z) = |z - mean_y|^2 / (2 var) - sum_j p_j |z - mean_j|^2 / (2 var)

`top_confusions` names the classes j and their probabilities, `class_attraction` is E and its
gradient. `observe_classes` learns the variances from the moments of a batch's classes,
`follow_classes` moves the means of the bank towards those of the batch: the only operations that
write into their arguments. But for the first, each works on all L layers of a model at once.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    z: Tensor,
    mean: Sequence[Tensor],
    var: Tensor,
    unit: Tensor,
    labels: Tensor,
    shares: Tensor,
    own: Tensor,
    rivals: Tensor,
    weight: Tensor,
    seen: Tensor,
    push: float,
) -> tuple[Tensor, Tensor]:
    """Weighted squared Mahalanobis distances of each sample to some classes, and their gradient.

    A sample is pulled to its own classes by their shares and pushed from its rivals by `push` times
    their weights, c_j: `E = sum_j c_j |z - mean_j|^2 / (2 var)`. One without a main class, or with
    an own class of which nothing is known, is left alone: pushing it would have no counterweight.
    Differences are taken before they are weighted: means may be large beside the spread.

    Args:
        z: (B, D) features of all L layers side by side, D = D_1 + ... + D_L; any floating dtype.
        mean: L tensors (C, D_l), class means, in the accumulation dtype.
        var: (D,) variances > 0.
        unit: (L,) by which the gradients of each layer are multiplied.
        labels: (B, S) int64, the main own class first; negative for none. S = 0: rivals act alone.
        shares: (B, S) of the own classes, 0 for none; (B, 0) is 1 for each.
        own: (B,) weight of the main class.
        rivals: (B, J) int64; negative for none, and own classes are none either.
        weight: (B, J), not read where there is no rival.
        seen: (C,) bool, of which classes something is known.
        push: factor of the weights.

    Returns:
        gradient: (B, D), `unit_l sum_j c_j (z - mean_j) / var`, in the accumulation dtype.
        numbers: (4, L, B): the energy by dimension, E / D_l; 1 where the mean of the main class is
            nearer than that of each rival, 0 elsewhere and without any rival; 1 where the weight of
            the main class is larger than 0 and that of each rival, else 0; the squared length of
            the gradient, at least the smallest normal number, so that it has an inverse.
    """
    if shares.shape[1] == 0:
        shares = torch.ones_like(labels, dtype=weight.dtype)
    mine = torch.where(shares > 0, labels, -1).clamp(min=-1)
    also_own = (rivals[:, :, None] == mine[:, None, :]).any(2)
    rivals = torch.where(also_own, -1, rivals)
    largest = torch.nn.functional.pad(torch.where(rivals >= 0, weight, 0), (0, 1)).amax(1)
    right = (own > largest) & (mine[:, :1] >= 0).any(1)
    index = torch.where(_known(mine, seen), torch.cat([mine, rivals], 1), -1)
    coefficient = torch.cat([shares, -push * weight], 1)
    used, owners = (index >= 0)[:, :, None], labels.shape[1]
    gradients, numbers = [], []
    layers = zip(mean, _side_by_side(z, mean), _side_by_side(var, mean), unit, strict=True)
    for centers, x, variances, factor in layers:
        difference = x.to(centers.dtype)[:, None] - centers[index.clamp(min=0)]
        difference = torch.where(used, difference, 0)
        c = torch.where(used, coefficient[:, :, None], 0)
        energy = (c * difference.square() / (2 * variances)).sum((1, 2))
        gradient = (c * difference).sum(1) / variances * factor
        distance = torch.where(used[:, :, 0], (difference.square() / variances).sum(2), torch.inf)
        # Infinity is what an empty minimum would be.
        distance = torch.nn.functional.pad(distance, (0, 1), value=torch.inf)
        rival = distance[:, owners:].amin(1)
        nearest = (distance[:, 0] < rival) & rival.isfinite() & (owners > 0)
        gradients.append(gradient)
        flags = nearest.to(c.dtype), right.to(c.dtype)
        squares = gradient.square().sum(1).clamp(min=torch.finfo(c.dtype).tiny)
        by_dimension = energy / max(x.shape[1], 1)
        numbers.append(torch.stack([by_dimension, *flags, squares]))
    return torch.cat(gradients, 1), torch.stack(numbers, 1)


def _known(labels: Tensor, seen: Tensor) -> Tensor:
    """(B, 1) whether each sample has a main class, and something is known of all its classes."""
    if labels.shape[1] == 0:
        return labels.new_ones((len(labels), 1), dtype=torch.bool)
    known = seen[labels.clamp(min=0)] if len(seen) else torch.zeros_like(labels, dtype=torch.bool)
    return (known | (labels < 0)).all(1, keepdim=True) & (labels[:, :1] >= 0)


def _side_by_side(matrix: Tensor, mean: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The columns of each layer in a matrix that has all of them."""
    parts: tuple[Tensor, ...] = matrix.split([m.shape[1] for m in mean], -1)
    return parts


def floored(var: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """(D,) variances > 0, `var` raised by `floor` times its mean, and the root of that mean.

    Both are 1 while the mean is 0.
    """
    level = var.mean()
    metric = torch.where(level > 0, var + (floor * level + torch.finfo(var.dtype).tiny), 1)
    return metric, torch.where(level > 0, level.sqrt(), 1)


def observe_classes(
    mean: Sequence[Tensor],
    count: Sequence[Tensor],
    var: Sequence[Tensor],
    updates: Sequence[Tensor],
    classes: Tensor,
    size: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    momentum: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Updates the variances of each layer by the scatter of a batch about the means of its bank.

    Args:
        mean, count: L tensors (C, D_l) and L (C,), the class means and how many samples each has
            seen.
        var, updates: L tensors (D_l,) and L (), the variances and how often they were updated; all
            are written.
        classes: (K,) int64, distinct but for negative ones, which are left out.
        size: (K,) how many samples, or how much weight, of each class; 0 leaves it out.
        batch_mean, batch_var: (K, D) of the samples of each, all layers side by side; variances may
            be 0.
        momentum: of the variances, which are a plain average until that moves more slowly.
        floor: of the metric, as a share of the mean variance.

    Returns:
        weight: (L, K) `size`, 0 for classes left out, also where the moments are too large to
            square.
        metric: (D,) the variances with a floor, 1 while there are none.
        unit: (L,) the root of each layer's mean variance, 1 while there is none.
    """
    of_batch = _side_by_side(batch_mean, mean), _side_by_side(batch_var, mean)
    results = [
        _observe_layer(m, c, v, u, classes, size, of_mean, of_var, momentum, floor)
        for m, c, v, u, of_mean, of_var in zip(mean, count, var, updates, *of_batch, strict=True)
    ]
    weight, metric, unit = zip(*results, strict=True)
    return torch.stack(weight), torch.cat(metric), torch.stack(unit)


def _observe_layer(
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
) -> tuple[Tensor, Tensor, Tensor]:
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
    return weight, *floored(var, floor)


def follow_classes(
    mean: Sequence[Tensor],
    count: Sequence[Tensor],
    classes: Tensor,
    weight: Tensor,
    batch_mean: Tensor,
    momentum: float,
) -> None:
    """Moves class means towards those of a batch: averages that turn into moving ones.

    Args:
        mean, count: L tensors (C, D_l) and L (C,), as for `observe_classes`; all are written.
        classes: (K,) int64, distinct but for negative ones, which are left out.
        weight: (L, K), as `observe_classes` returns; 0 leaves a class out.
        batch_mean: (K, D), all layers side by side.
        momentum: how much of a mean is kept at least when its class occurs again.
    """
    rows = classes.clamp(min=0)
    layers = zip(mean, count, weight, _side_by_side(batch_mean, mean), strict=True)
    for centers, seen, of_layer, target in layers:
        moved = torch.where(classes >= 0, of_layer, 0)
        seen.index_add_(0, rows, moved)
        rate = (moved / seen[rows].clamp(min=1)).clamp(min=1 - momentum)
        move = torch.where(moved[:, None] > 0, rate[:, None] * (target - centers[rows]), 0)
        centers.index_add_(0, rows, move)
