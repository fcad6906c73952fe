"""The published form step by step: class statistics, pairs, distances, overlap.

Every step takes the resolved name of a backend, or `PLAIN` for ordinary autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cwbr_fused.inputs import membership
from cwbr_fused.inputs.targets import Targets
from cwbr_fused.operations import reference
from cwbr_fused.operations.autograd import (
    OPERATIONS,
    Regularizer,
    all_pair_distance,
    class_moments,
    pair_distance,
    weighted_overlap,
)
from cwbr_fused.operations.backends import PLAIN
from cwbr_fused.operations.reference import accumulation_dtype
from cwbr_fused.overlap.adjustments import (
    Noise,
    Pairs,
    adjusted_distance,
    overlap_distance,
    shrink_variance,
)
from cwbr_fused.overlap.options import OverlapOptions, Temperature

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Statistics(NamedTuple):
    """What a batch says about its classes.

    counts: (K,) samples of each class; 0 for unused rows.
    alpha: (K, K), the confusion of the classes; 0 for unused rows.
    moments: mean and biased variance of the classes at each layer, (K, D_l) each.
    """

    counts: Tensor
    alpha: Tensor
    moments: list[tuple[Tensor, Tensor]]


class Layer(NamedTuple):
    """Gaussians of the classes at one layer: mean and var (K, D), and their sampling noise."""

    mean: Tensor
    var: Tensor
    noise: Noise | None = None


def regularizer(
    vectors: Sequence[Tensor],
    logits: Tensor,
    targets: Targets,
    options: OverlapOptions,
    backend: str,
    processes: ProcessGroup | None = None,
) -> Tensor:
    """The mean over the layers of the confusion-weighted overlap, a scalar.

    Args:
        vectors: L tensors (B, D_l) of one accumulation dtype.
        processes: those whose samples are taken together; None for this process alone.
    """
    whole = targets.shares is None and processes is None
    if whole and options.top_m is not None and not options.adjusted and backend != PLAIN:
        order, offsets, _, pairs, weights = OPERATIONS[backend].plan(
            logits.detach(), targets.main, options.top_m, options.min_count
        )
        weights = weights.to(accumulation_dtype(vectors[0].dtype))
        value: Tensor = Regularizer.apply(
            order, offsets, pairs, weights, options.eps, options.log, backend, *vectors
        )
        return value
    statistics = statistics_of(vectors, logits, targets, options, backend, processes)
    return overlap(*adjusted(statistics, options), options, backend)


def statistics_of(
    vectors: Sequence[Tensor],
    logits: Tensor,
    targets: Targets,
    options: OverlapOptions,
    backend: str,
    processes: ProcessGroup | None = None,
) -> Statistics:
    """The class statistics of a batch; see `regularizer` for the arguments."""
    dtype = accumulation_dtype(vectors[0].dtype)
    min_count, eps = options.min_count, options.eps
    if targets.shares is not None or processes is not None:
        members = membership.of_targets(targets, logits.shape[1], min_count, dtype, processes)
        alpha = membership.confusion_weights(logits, members, backend)
        moments = membership.class_moments(vectors, members, eps, backend)
        return Statistics(members.counts, alpha, moments)
    operations = OPERATIONS[backend]
    order, offsets, classes = operations.group_by_class(targets.main, min_count)
    alpha = operations.confusion_weights(logits.detach(), order, offsets, classes).to(dtype)
    moments = [class_moments(z, order, offsets, eps, backend) for z in vectors]
    return Statistics(offsets.diff(), alpha, moments)


def adjusted(statistics: Statistics, options: OverlapOptions) -> tuple[Tensor, list[Layer]]:
    """The weights alpha (K, K) and the Gaussians of each layer, after shrinkage.

    If the variances are shrunk and no class has two samples, there is no variance to shrink to, and
    the weights are zero.
    """
    counts, alpha, moments = statistics
    if options.shrinkage is None and not options.noise_floor:
        return alpha, [Layer(mean, var) for mean, var in moments]
    layers = []
    for mean, var in moments:
        shrunk, intensity = shrink_variance(var, counts, options.shrinkage, options.eps)
        noise = (counts, intensity) if options.noise_floor else None
        layers.append(Layer(mean, shrunk, noise))
    if options.shrinkage is not None:
        alpha = torch.where((counts > 1).any(), alpha, 0)
    return alpha, layers


def overlap(
    alpha: Tensor, layers: Sequence[Layer], options: OverlapOptions, backend: str
) -> Tensor:
    """The mean over the layers of the weighted overlap of all pairs, or of the chosen ones."""
    plain = options.temperature is None and all(layer.noise is None for layer in layers)
    eps, log = options.eps, options.log
    if plain and options.top_m is None:
        each = [weighted_overlap(mean, var, alpha, eps, log, backend) for mean, var, _ in layers]
        return torch.stack(each).mean()
    distance, weights = distances(alpha, layers, options, backend)
    return reference.overlap(distance, weights, eps, log).mean()


def distances(
    alpha: Tensor, layers: Sequence[Layer], options: OverlapOptions, backend: str
) -> tuple[Tensor, Tensor]:
    """What `reference.overlap` takes: distances (L, M) and weights (M,) of the chosen pairs."""
    eps = options.eps
    if options.top_m is None:
        i, j = reference.upper_pairs(alpha)
        weights = alpha[i, j]

        def measure(mean: Tensor, var: Tensor) -> Tensor:
            return all_pair_distance(mean, var, eps, backend)[i, j]
    else:
        pairs, weights = OPERATIONS[backend].top_pairs(alpha, options.top_m)
        i, j = pairs.unbind(1)

        def measure(mean: Tensor, var: Tensor) -> Tensor:
            return pair_distance(mean, var, pairs, eps, backend)

    chosen = Pairs(i, j, measure)
    each = [adjusted_distance(chosen, *layer, eps, options.temperature) for layer in layers]
    return overlap_distance(torch.stack(each)), weights


def distance_matrix(
    layer: Layer, eps: float, temperature: Temperature, backend: str
) -> tuple[Tensor, Tensor]:
    """Distance and overlap of all pairs, (K, K) each."""

    def measure(mean: Tensor, var: Tensor) -> Tensor:
        return all_pair_distance(mean, var, eps, backend).flatten()

    groups = layer.mean.shape[0]
    row = torch.arange(groups, device=layer.mean.device)
    every = Pairs(row.repeat_interleave(groups), row.repeat(groups), measure)
    distance = adjusted_distance(every, *layer, eps, temperature).view(groups, groups)
    kept = distance if layer.noise is None else overlap_distance(distance)
    return distance, torch.exp(-kept)


def class_statistics(
    z: Tensor, targets: Tensor, eps: float, min_count: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `cwbr_fused.functional.class_stats_diag`."""
    order, offsets, classes = OPERATIONS[backend].group_by_class(targets, min_count)
    mean, var = class_moments(z, order, offsets, eps, backend)
    used = int((classes >= 0).sum())
    row = reference.sample_groups(order, offsets)
    inverse = torch.where(row < used, row, -1)
    return classes[:used], mean[:used], var[:used], offsets.diff()[:used], inverse
