"""The regularizer of all layers: two launches forward, two backward, however many layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .class_moments import launch_moments, store_feature_gradient, store_ungrouped_zeros
from .common import (
    SIZES_OF_A_BATCH,
    approximate,
    last_to_arrive,
    launch,
    scratch,
    sum_of,
    with_unit_stride,
)
from .pair_distance import (
    LIST_BLOCK,
    distance_of_rows,
    list_pairs_of_row,
    pair_lists,
    row_gradient,
)

PAIR_BLOCK = 1024


@triton.jit
def _log_terms(distance, weights, first, n_pairs, BLOCK: tl.constexpr):
    """`log(w) - D` of one block of pairs, -inf beyond the last."""
    m = first + tl.arange(0, BLOCK)
    weight = tl.load(weights + m, mask=m < n_pairs, other=0)
    # Not from the first-level cache: other programs of the same launch may have stored it.
    return tl.log(weight) - tl.load(distance + m, mask=m < n_pairs, other=0, cache_modifier=".cg")


@triton.jit
def _log_sum_exp(distance, weights, n_pairs, BLOCK: tl.constexpr):
    """Largest `log(w) - D` (0 if all are -inf), and the sum of exp of what lies below it."""
    peaks = tl.full([BLOCK], float("-inf"), distance.dtype.element_ty)
    for first in range(0, n_pairs, BLOCK):
        peaks = tl.maximum(peaks, _log_terms(distance, weights, first, n_pairs, BLOCK))
    peak = tl.max(peaks, 0)
    peak = tl.where(peak == float("-inf"), 0, peak)
    sums = tl.zeros([BLOCK], distance.dtype.element_ty)
    for first in range(0, n_pairs, BLOCK):
        sums += tl.exp(_log_terms(distance, weights, first, n_pairs, BLOCK) - peak)
    return peak, tl.sum(sums, 0)


@triton.jit
def _overlap(
    distance, weights, n_pairs, total, EPS: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr
):
    """`sum(w exp(-D)) / max(total, eps)`; its logarithm, without eps, where LOG."""
    if LOG:
        peak, mass = _log_sum_exp(distance, weights, n_pairs, BLOCK)
        overlap = tl.where(total == 0, 0, peak + tl.log(mass) - tl.log(total))
    else:
        sums = tl.zeros([BLOCK], distance.dtype.element_ty)
        for first in range(0, n_pairs, BLOCK):
            m = first + tl.arange(0, BLOCK)
            d = tl.load(distance + m, mask=m < n_pairs, other=0, cache_modifier=".cg")
            sums += tl.load(weights + m, mask=m < n_pairs, other=0) * tl.exp(-d)
        overlap = tl.sum(sums, 0) / tl.where(total < EPS, EPS, total)
    return overlap


@triton.jit
def _mean_overlap(
    n_layers, distance, weights, n_pairs, EPS: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr
):
    total = sum_of(weights, n_pairs, BLOCK, "")
    overlap = total * 0
    for layer in range(n_layers):
        row = distance + layer * n_pairs
        overlap += _overlap(row, weights, n_pairs, total, EPS, LOG, BLOCK)
    return overlap / n_layers


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _value_kernel(
    layers,
    pairs,
    n_pairs,
    weights,
    distance,
    counter,
    value,
    EPS: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Program (pair, layer): its distance. The last one to finish forms the value."""
    pair = tl.program_id(0).to(tl.int64)
    i, j = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    for layer in tl.static_range(len(layers)):
        if tl.program_id(1) == layer:
            mean, var, dims = layers[layer]
            d = distance_of_rows(mean, var, i, j, dims, EPS, BLOCK, APPROXIMATE)
            tl.store(distance + layer * n_pairs + pair, d)
    if last_to_arrive(counter):
        overlap = _mean_overlap(len(layers), distance, weights, n_pairs, EPS, LOG, PAIR_BLOCK)
        tl.store(value, overlap)


@triton.jit
def _store_pair_gradients(
    scale,
    distance,
    weights,
    grad_distance,
    n_pairs,
    EPS: tl.constexpr,
    LOG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dL/dD of one layer: `-scale w exp(-D)/max(sum(w), eps)`, or -scale softmax(log(w) - D)."""
    total = sum_of(weights, n_pairs, BLOCK, "")
    if LOG:
        peak, mass = _log_sum_exp(distance, weights, n_pairs, BLOCK)
    for first in range(0, n_pairs, BLOCK):
        m = first + tl.arange(0, BLOCK)
        if LOG:
            terms = _log_terms(distance, weights, first, n_pairs, BLOCK)
            share = tl.where(total == 0, 0, tl.exp(terms - peak) / mass)
        else:
            weight = tl.load(weights + m, mask=m < n_pairs, other=0)
            d = tl.load(distance + m, mask=m < n_pairs, other=0)
            share = weight * tl.exp(-d) / tl.where(total < EPS, EPS, total)
        tl.store(grad_distance + m, -scale * share, mask=m < n_pairs)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _prepare_backward_kernel(
    grad,
    n_layers,
    groups,
    pairs,
    n_pairs,
    weights,
    distance,
    grad_distance,
    starts,
    entries,
    EPS: tl.constexpr,
    LOG: tl.constexpr,
    PAIR_BLOCK: tl.constexpr,
    LIST_BLOCK: tl.constexpr,
):
    """Program p: the list of pairs of row p, and the gradients of the distances of layer p."""
    program = tl.program_id(0)
    if program < groups:
        list_pairs_of_row(program, pairs, n_pairs, starts, entries, LIST_BLOCK)
    if program < n_layers:
        row = program.to(tl.int64) * n_pairs
        scale = tl.load(grad) / n_layers
        _store_pair_gradients(
            scale, distance + row, weights, grad_distance + row, n_pairs, EPS, LOG, PAIR_BLOCK
        )


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _feature_gradient_kernel(
    layers,
    order,
    offsets,
    groups,
    batch,
    pairs,
    n_pairs,
    grad_distance,
    starts,
    entries,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Program (group, block of dimensions, layer): from pairs to moments to samples."""
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start, end = tl.load(offsets + group), tl.load(offsets + group + 1)
    for layer in tl.static_range(len(layers)):
        if tl.program_id(2) == layer and tl.program_id(1) * BLOCK < layers[layer][2]:
            z, stride, dims, mean, var, grad_z = layers[layer]
            by_mean, by_var = row_gradient(
                group,
                mean,
                var,
                dims,
                pairs,
                starts,
                entries,
                grad_distance + layer * n_pairs,
                d,
                EPS,
                APPROXIMATE,
            )
            store_feature_gradient(
                by_mean,
                by_var,
                z,
                stride,
                dims,
                tl.load(mean + group * dims + d, mask=d < dims, other=0),
                tl.load(var + group * dims + d, mask=d < dims, other=0),
                grad_z,
                order,
                start,
                end,
                d,
                EPS,
            )
            store_ungrouped_zeros(grad_z, dims, order, offsets, groups, batch, d)


def regularizer(
    features: Sequence[Tensor],
    order: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    weights: Tensor,
    eps: float,
    log: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Value, mean (K, D_l) and var (K, D_l) of each layer, and distance (L, M)."""
    n_layers, n_pairs = len(features), pairs.shape[0]
    pairs, weights = pairs.contiguous(), weights.contiguous()
    counter = scratch(weights, 1, dtype=torch.int32)
    mean, var = launch_moments(features, order, offsets, eps, counter)
    distance = scratch(weights, n_layers, n_pairs)
    if n_pairs == 0:
        return weights.new_zeros(()), mean, var, distance
    value = scratch(weights)
    layers = tuple((m, v, m.shape[1]) for m, v in zip(mean, var, strict=True))
    widest = max(m.shape[1] for m in mean)
    launch(
        _value_kernel,
        (n_pairs, n_layers),
        layers,
        pairs,
        n_pairs,
        weights,
        distance,
        counter,
        value,
        EPS=eps,
        LOG=log,
        PAIR_BLOCK=PAIR_BLOCK,
        APPROXIMATE=approximate(mean[0]),
        **tuning.pair_distance(widest, mean[0]),
    )
    return value, mean, var, distance


def regularizer_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    distance: Tensor,
    order: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    weights: Tensor,
    eps: float,
    log: bool,
) -> list[Tensor]:
    """Gradients (B, D_l) with respect to each layer's features, for a scalar grad."""
    groups, n_pairs, n_layers = offsets.shape[0] - 1, pairs.shape[0], len(features)
    if n_pairs == 0:
        return [torch.zeros_like(z, memory_format=torch.contiguous_format) for z in features]
    order, offsets, pairs = order.contiguous(), offsets.contiguous(), pairs.contiguous()
    grad_distance = scratch(distance, n_layers, n_pairs)
    starts, entries = pair_lists(pairs, groups)
    launch(
        _prepare_backward_kernel,
        (max(groups, n_layers),),
        grad,
        n_layers,
        groups,
        pairs,
        n_pairs,
        weights.contiguous(),
        distance.contiguous(),
        grad_distance,
        starts,
        entries,
        EPS=eps,
        LOG=log,
        PAIR_BLOCK=PAIR_BLOCK,
        LIST_BLOCK=LIST_BLOCK,
    )
    features = [with_unit_stride(z) for z in features]
    gradients = [scratch(z, *z.shape) for z in features]
    layers = tuple(
        (z, z.stride(0), z.shape[1], m.contiguous(), v.contiguous(), g)
        for z, m, v, g in zip(features, mean, var, gradients, strict=True)
    )
    widest = max(z.shape[1] for z in features)
    options = tuning.moments_backward(widest, mean[0])
    grid = (groups, triton.cdiv(widest, options["BLOCK"]), n_layers)
    launch(
        _feature_gradient_kernel,
        grid,
        layers,
        order,
        offsets,
        groups,
        features[0].shape[0],
        pairs,
        n_pairs,
        grad_distance,
        starts,
        entries,
        EPS=eps,
        APPROXIMATE=approximate(mean[0]),
        **options,
    )
    return gradients
