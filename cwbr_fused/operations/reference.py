"""Every operation in pure PyTorch, under its own name: the definition of right.

Each is as short as the mathematics, runs on any device and in any floating dtype, and is
differentiable by ordinary autograd, also twice.

Notation: B samples, D dimensions, C classes, K class groups, M pairs. Half-precision inputs are
accumulated in float32, float64 in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "accumulation_dtype",
    "all_pair_distance",
    "class_moments",
    "confusion_weights",
    "group_by_class",
    "groups_of_inverse",
    "mean_probs",
    "overlap",
    "pair_distance",
    "plan",
    "regularizer",
    "row_blocks",
    "sample_groups",
    "top_pairs",
    "upper_pairs",
    "weighted_overlap",
]


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over samples and dimensions are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def group_by_class(targets: Tensor, min_count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Group the samples of a batch by class, padded to a size that depends on B alone.

    Args:
        targets: (B,) integer classes.
        min_count: classes with fewer samples than this, at least 1, form no group.

    Returns:
        order: (B,) int64 permutation. Group k holds samples `order[offsets[k]:offsets[k + 1]]`,
            in batch order; samples of no group come last, by class, then in batch order.
        offsets: (K + 1,) int64 with K = B // min_count. Groups are in order of their class;
            those beyond the last usable class are empty.
        classes: (K,) int64, -1 for the empty groups.
    """
    batch = targets.shape[0]
    groups = batch // min_count
    sorted_targets, by_class = torch.sort(targets.long(), stable=True)
    starts = torch.ones_like(sorted_targets, dtype=torch.bool)
    starts[1:] = sorted_targets[1:] != sorted_targets[:-1]
    run = starts.cumsum(0) - 1
    run_size = torch.zeros_like(run).scatter_add(0, run, torch.ones_like(run))
    run_usable = run_size >= min_count
    run_group = torch.where(run_usable, run_usable.cumsum(0) - 1, groups)

    sizes = run.new_zeros(groups + 1).scatter_add(0, run_group, run_size)[:groups]
    offsets = torch.cat([run.new_zeros(1), sizes.cumsum(0)])
    classes = run.new_full((groups + 1,), -1).scatter(0, run_group[run], sorted_targets)[:groups]
    order = by_class[torch.sort((~run_usable[run]).long(), stable=True).indices]
    return order, offsets, classes


def sample_groups(order: Tensor, offsets: Tensor) -> Tensor:
    """The group of each sample, (B,); K for samples of no group."""
    position = torch.arange(order.shape[0], device=order.device)
    group_of_position = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
    return torch.empty_like(order).scatter(0, order, group_of_position)


def _group_means(x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Mean of the rows of x (B, N) over each group, (K + 1, N); zero for empty and for no group."""
    groups = offsets.shape[0] - 1
    sums = x.new_zeros(groups + 1, x.shape[1]).index_add(0, sample_groups(order, offsets), x)
    sizes = torch.cat([offsets.diff(), offsets.new_ones(1)]).clamp(min=1)
    used = torch.arange(groups + 1, device=x.device) < groups
    return torch.where(used[:, None], sums / sizes[:, None], 0)


def class_moments(z: Tensor, order: Tensor, offsets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and clamped biased variance of each class group, by two passes.

    `mean_k = E[z]`, `var_k = max(E[(z - mean_k)^2], eps)` over the samples of group k.

    Args:
        z: (B, D) features.
        order, offsets: the groups, from `group_by_class`.
        eps: the smallest variance; where it is active no gradient passes.

    Returns:
        mean, var: (K, D) each, in the accumulation dtype; 0 and eps for empty groups.
    """
    x = z.to(accumulation_dtype(z.dtype))
    mean = _group_means(x, order, offsets)
    centred = x - mean[sample_groups(order, offsets)]
    var = _group_means(centred.square(), order, offsets)
    return mean[:-1], var[:-1].clamp(min=eps)


def mean_probs(logits: Tensor, order: Tensor, offsets: Tensor, classes: Tensor) -> Tensor:
    """Mean of `softmax(logits)[:, classes[j]]` over the samples of each group k, (K, K)."""
    probs = logits.to(accumulation_dtype(logits.dtype)).softmax(dim=1)
    return _group_means(probs[:, classes.clamp(min=0)], order, offsets)[:-1]


def confusion_weights(logits: Tensor, order: Tensor, offsets: Tensor, classes: Tensor) -> Tensor:
    """How much softmax mass the classes of the batch lend each other, (K, K).

    `alpha = (P + P^T) / 2` with a zero diagonal, where `P = mean_probs(...)`. Rows and columns of
    empty groups are zero.

    Args:
        logits: (B, C).
        order, offsets, classes: the groups, from `group_by_class`.
    """
    probs = mean_probs(logits, order, offsets, classes)
    alpha = (probs + probs.T) / 2
    used = classes >= 0
    pair_used = used[:, None] & used[None, :] & ~torch.eye(len(used), device=used.device).bool()
    return torch.where(pair_used, alpha, 0)


def upper_pairs(alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Rows i and columns j > i of a (K, K) matrix, in lexicographic order.

    `torch.triu_indices`, which torch.compile would compile anew for every K.
    """
    groups = alpha.shape[0]
    row = torch.arange(groups, device=alpha.device)
    first = row * (2 * groups - row - 1) // 2
    pair = torch.arange(groups * (groups - 1) // 2, device=alpha.device)
    i = torch.searchsorted(first, pair, right=True) - 1
    return i, pair - first[i] + i + 1


def top_pairs(alpha: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
    """The pairs i < j of largest weight; ties go to the smaller (i, j), NaN counts as largest.

    Args:
        alpha: (K, K) symmetric weights, of which the upper triangle is read.
        top_m: how many pairs.

    Returns:
        pairs: (M, 2) int64 with M = min(top_m, K (K - 1) / 2), by falling weight.
        weights: (M,).
    """
    i, j = upper_pairs(alpha)
    weights, rank = torch.sort(alpha[i, j], descending=True, stable=True)
    chosen = rank[:top_m]
    return torch.stack([i[chosen], j[chosen]], dim=1), weights[:top_m]


def plan(
    logits: Tensor, targets: Tensor, top_m: int, min_count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What one training step needs for all its layers: class groups and most confused pairs.

    `group_by_class`, `confusion_weights` and `top_pairs` in one.

    Returns:
        order (B,), offsets (K + 1,), classes (K,), pairs (M, 2), weights (M,).
    """
    groups = group_by_class(targets, min_count)
    return *groups, *top_pairs(confusion_weights(logits, *groups), top_m)


def _distance(mean_i: Tensor, u_i: Tensor, mean_j: Tensor, u_j: Tensor) -> Tensor:
    """Bhattacharyya distance of diagonal Gaussians over the last dimension.

    With s = (u_i + u_j)/2 the log term `log(s)/2 - log(u_i)/4 - log(u_j)/4` equals
    `log(1 + (u_i - u_j)^2 / (4 u_i u_j)) / 4`, which cancels nothing.
    """
    mahalanobis = (mean_i - mean_j).square() / (4 * (u_i + u_j))
    spread = (u_i - u_j) / u_i * ((u_i - u_j) / u_j) / 4
    return (mahalanobis + spread.log1p() / 4).sum(-1)


def pair_distance(mean: Tensor, var: Tensor, pairs: Tensor, eps: float) -> Tensor:
    """Bhattacharyya distance of the listed pairs of diagonal Gaussians, (M,).

    `D_ij = sum_d (mean_i - mean_j)^2/(8 s) + log(s)/2 - log(u_i)/4 - log(u_j)/4` with
    `u = var + eps` and `s = (u_i + u_j)/2` (Bhattacharyya 1943; Kailath 1967).

    Args:
        mean, var: (K, D).
        pairs: (M, 2) rows i and j.
        eps: added to every variance.
    """
    i, j = pairs.unbind(1)
    u = var + eps
    return _distance(mean[i], u[i], mean[j], u[j])


def row_blocks(mean: Tensor) -> tuple[int, ...]:
    """Sizes of the blocks of rows whose (rows, K, D) temporaries hold about 4M elements."""
    groups, dims = mean.shape
    rows = max(1, 2**22 // max(1, groups * dims))
    return (rows,) * (groups // rows) + ((groups % rows,) if groups % rows else ())


def all_pair_distance(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """`pair_distance` of all pairs: (K, K), symmetric with a zero diagonal."""
    u = var + eps
    sizes = row_blocks(mean)
    blocks = [
        _distance(mean_i[:, None], u_i[:, None], mean[None], u[None])
        for mean_i, u_i in zip(mean.split(sizes), u.split(sizes), strict=True)
    ]
    return torch.cat(blocks) if blocks else mean[:, :0]


def overlap(distance: Tensor, weights: Tensor, eps: float, log: bool) -> Tensor:
    """Weighted mean overlap of pairs, `sum(w exp(-D)) / max(sum(w), eps)`, over the last dimension.

    With `log` its logarithm `log(sum(w exp(-D)) / sum(w))` by log-sum-exp. Zero, with zero
    gradients, where the weights sum to zero.

    Args:
        distance: (..., M).
        weights: (M,), >= 0.
    """
    total = weights.sum()
    if not log:
        return (weights * torch.exp(-distance)).sum(-1) / total.clamp(min=eps)
    nothing = total == 0
    # log(1) in place of log(0) where nothing is weighted keeps NaN out of the unused branch.
    log_weights = torch.where(nothing, 1.0, weights).log()
    log_overlap = torch.logsumexp(log_weights - distance, dim=-1) - total.log()
    return torch.where(nothing, 0.0, log_overlap)


def weighted_overlap(mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool) -> Tensor:
    """`overlap` over all pairs i < j with weights alpha (K, K), a scalar. No gradient to alpha."""
    i, j = upper_pairs(alpha)
    return overlap(all_pair_distance(mean, var, eps)[i, j], alpha.detach()[i, j], eps, log)


def regularizer(
    features: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    weights: Tensor,
    eps: float,
    log: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Mean over L layers of the overlap of the planned pairs, and what its gradient needs.

    Args:
        features: L tensors (B, D_l) of one accumulation dtype, which `weights` has too.
        order, offsets, pairs, weights: from `plan`.

    Returns:
        value: scalar.
        mean, var: (K, D_l) for each layer; or nothing for tensors on the CPU, where the backward
            pass computes them again. Rows of groups in no pair of positive weight are not
            specified.
        distance: (L, M). Distances of pairs of weight zero are not specified.
    """
    moments = [class_moments(z, order, offsets, eps) for z in features]
    distance = torch.stack([pair_distance(mean, var, pairs, eps) for mean, var in moments])
    value = overlap(distance, weights, eps, log).mean()
    kept = [] if weights.is_cpu else moments
    return value, [mean for mean, _ in kept], [var for _, var in kept], distance


def groups_of_inverse(inv: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The `order` and `offsets` of samples whose group is known: inv (B,), -1 for no group."""
    group, order = torch.sort(torch.where(inv < 0, groups, inv), stable=True)
    return order, torch.searchsorted(group, torch.arange(groups + 1, device=inv.device))
