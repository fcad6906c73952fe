"""The published form in pure PyTorch, with the signatures of `cwbr_fused.functional`.

`backend` and `group` are accepted so that calls can be swapped; they change nothing. Every function
is differentiable by ordinary autograd, also twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cwbr_fused.inputs import soft_targets
from cwbr_fused.inputs.pooling import to_vec
from cwbr_fused.operations.reference import (
    accumulation_dtype,
    all_pair_distance,
    class_moments,
    confusion_weights,
    group_by_class,
    groups_of_inverse,
    overlap,
    pair_distance,
    sample_groups,
    top_pairs,
    upper_pairs,
)
from cwbr_fused.overlap.adjustments import (
    Adjustment,
    Noise,
    Pairs,
    Shrinkage,
    Temperature,
    adjusted_distance,
    every_pair,
    layer_distances,
    overlap_distance,
    shrink_variance,
)

__all__ = [
    "bhat_confusion_loss",
    "bhattacharyya_diag",
    "class_stats_diag",
    "confusion_alpha",
    "loss",
    "scale_match",
    "shrink_variance",
]


def class_stats_diag(
    z: Tensor, y: Tensor, eps: float = 1e-6, *, min_count: int = 2, backend: str = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `cwbr_fused.functional.class_stats_diag`."""
    order, offsets, classes = group_by_class(y, min_count)
    mean, var = class_moments(z, order, offsets, eps)
    used = int((classes >= 0).sum())
    group = sample_groups(order, offsets)
    inv = torch.where(group < used, group, -1)
    return classes[:used], mean[:used], var[:used], offsets.diff()[:used], inv


def confusion_alpha(
    logits: Tensor, y: Tensor, classes: Tensor, inv: Tensor, *, backend: str = "auto"
) -> Tensor:
    """See `cwbr_fused.functional.confusion_alpha`."""
    order, offsets = groups_of_inverse(inv, classes.shape[0])
    return confusion_weights(logits.detach(), order, offsets, classes)


def select_pairs(alpha: Tensor, top_m: int | None, eps: float) -> Pairs:
    """The `top_m` pairs of largest alpha, or all, and their distance."""
    if top_m is None:
        i, j = upper_pairs(alpha)
        return Pairs(i, j, alpha[i, j], lambda m, v: all_pair_distance(m, v, eps)[i, j])
    pairs, weights = top_pairs(alpha, top_m)
    i, j = pairs.unbind(1)
    return Pairs(i, j, weights, lambda m, v: pair_distance(m, v, pairs, eps))


def bhattacharyya_diag(
    mu: Tensor,
    var: Tensor,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
    temperature: Temperature = None,
    noise_floor: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """See `cwbr_fused.functional.bhattacharyya_diag`."""
    groups = mu.shape[0]
    pairs = every_pair(groups, mu.device, lambda m, v: all_pair_distance(m, v, eps))
    flat = adjusted_distance(pairs, mu, var, eps, temperature, noise_floor)
    distance = flat.view(groups, groups)
    return distance, torch.exp(-overlap_distance(distance))


def bhat_confusion_loss(
    mu: Tensor,
    var: Tensor,
    alpha: Tensor,
    top_m: int | None = 64,
    eps: float = 1e-6,
    *,
    objective: str = "overlap",
    backend: str = "auto",
    temperature: Temperature = None,
    noise_floor: Noise | None = None,
) -> Tensor:
    """See `cwbr_fused.functional.bhat_confusion_loss`."""
    pairs = select_pairs(alpha.detach(), top_m, eps)
    distance = adjusted_distance(pairs, mu, var, eps, temperature, noise_floor)
    log = objective == "log_overlap"
    return overlap(overlap_distance(distance), pairs.weights, eps, log)


def loss(
    features: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    *,
    top_m: int | None = 64,
    min_count: int = 2,
    eps: float = 1e-6,
    objective: str = "overlap",
    backend: str = "auto",
    group: object = None,
    temperature: Temperature = None,
    shrinkage: Shrinkage = None,
    noise_floor: bool = False,
) -> Tensor:
    """See `cwbr_fused.loss`."""
    layers = features.values() if isinstance(features, Mapping) else features
    vectors = [to_vec(layer) for layer in ([layers] if isinstance(layers, Tensor) else layers)]
    adjustment = Adjustment(temperature, shrinkage, noise_floor)
    if targets.dim() == 2:
        members = soft_targets.membership(targets, min_count)
        counts = members.counts
        alpha = soft_targets.confusion_weights(logits, members, accumulation_dtype(logits.dtype))
        moments = [
            soft_targets.class_moments(z, members.shares, eps, accumulation_dtype(z.dtype))
            for z in vectors
        ]
    else:
        groups = group_by_class(targets, min_count)
        counts = groups[1].diff()
        alpha = confusion_weights(logits.detach(), *groups)
        moments = [class_moments(z, *groups[:2], eps) for z in vectors]
    pairs = select_pairs(alpha, top_m, eps)
    distance, weights = layer_distances(pairs, moments, counts, eps, adjustment)
    return overlap(distance, weights, eps, objective == "log_overlap").mean()


def scale_match(
    ce: Tensor, reg: Tensor, eps: float = 1e-6, *, objective: str = "overlap"
) -> Tensor:
    """See `cwbr_fused.scale_match`."""
    if objective == "log_overlap":
        return ce + ce.detach() * (reg - reg.detach())
    return ce + (ce / (reg + eps)).detach() * reg
