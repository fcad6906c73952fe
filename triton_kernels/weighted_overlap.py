"""Weighted mean overlap of all pairs: no matrix of distances is kept, only the tiles' parts.

Backward recomputes the distances, turns them into dL/dD (K, K) and sums that over all pairs; where
value and gradient are wanted together the distances are computed once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import SIZES_OF_A_BATCH, last_to_arrive, launch, scratch
from .pair_tiles import (
    Partial,
    launch_partial,
    store_symmetric,
    tile_distance,
    tile_index,
    tile_is_needed,
)
from .pair_tiles_backward import launch_pairs_backward, pair_gradients

BLOCK = 1024


@triton.jit
def _tile_weights(alpha, groups, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """alpha of this program's tile where i < j, else 0."""
    i = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return tl.load(alpha + i * groups + j, mask=(i < j) & (j < groups), other=0)


@triton.jit
def _combine(statistics, n_tiles, EPS: tl.constexpr, LOG: tl.constexpr, BLOCK: tl.constexpr):
    """The overlap from each tile's (sum of weights, peak, sum of exp below the peak)."""
    ACC: tl.constexpr = statistics.dtype.element_ty
    totals = tl.zeros([BLOCK], ACC)
    peaks = tl.full([BLOCK], float("-inf"), ACC)
    for first in range(0, n_tiles, BLOCK):
        t = first + tl.arange(0, BLOCK)
        at = statistics + 3 * t
        totals += tl.load(at, mask=t < n_tiles, other=0, cache_modifier=".cg")
        peak = tl.load(at + 1, mask=t < n_tiles, other=float("-inf"), cache_modifier=".cg")
        peaks = tl.maximum(peaks, peak)
    total = tl.sum(totals, 0)
    peak = tl.max(peaks, 0)
    shift = tl.where(peak == float("-inf"), 0, peak)
    masses = tl.zeros([BLOCK], ACC)
    for first in range(0, n_tiles, BLOCK):
        t = first + tl.arange(0, BLOCK)
        at = statistics + 3 * t
        tile_peak = tl.load(at + 1, mask=t < n_tiles, other=float("-inf"), cache_modifier=".cg")
        mass = tl.load(at + 2, mask=t < n_tiles, other=0, cache_modifier=".cg")
        masses += mass * tl.exp(tile_peak - shift)
    mass = tl.sum(masses, 0)
    if LOG:
        overlap = tl.where(total == 0, 0, shift + tl.log(mass) - tl.log(total))
    else:
        overlap = mass * tl.exp(shift) / tl.where(total < EPS, EPS, total)
    return overlap


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _overlap_kernel(
    partial,
    n_tiles,
    parts,
    groups,
    alpha,
    statistics,
    counter,
    value,
    EPS: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row tile, column tile): its statistics. The last one to finish combines them."""
    if tile_is_needed(groups, ROWS, COLUMNS):
        distance = tile_distance(partial, n_tiles, parts, ROWS, COLUMNS)
        weight = _tile_weights(alpha, groups, ROWS, COLUMNS)
        peak = tl.sum(tl.sum(weight, 1), 0) * 0
        if LOG:
            log_terms = tl.log(weight) - distance
            peak = tl.max(tl.max(log_terms, 1), 0)
            peak = tl.where(peak == float("-inf"), 0, peak)
            terms = tl.exp(log_terms - peak)
        else:
            terms = weight * tl.exp(-distance)
        at = statistics + 3 * tile_index(ROWS, COLUMNS)
        tl.store(at, tl.sum(tl.sum(weight, 1), 0))
        tl.store(at + 1, peak)
        tl.store(at + 2, tl.sum(tl.sum(terms, 1), 0))
    if last_to_arrive(counter):
        tl.store(value, _combine(statistics, n_tiles, EPS, LOG, BLOCK))


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _row_totals_kernel(alpha, groups, totals, BLOCK: tl.constexpr):
    """Program i: the sum of alpha[i, j] over j > i."""
    i = tl.program_id(0)
    total = tl.zeros([BLOCK], totals.dtype.element_ty)
    for first in range(0, groups, BLOCK):
        j = first + tl.arange(0, BLOCK)
        row = alpha + i.to(tl.int64) * groups
        total += tl.load(row + j, mask=(j > i) & (j < groups), other=0)
    tl.store(totals + i, tl.sum(total, 0))


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _pair_gradient_kernel(
    partial,
    n_tiles,
    parts,
    groups,
    alpha,
    totals,
    grad,
    value,
    grad_distance,
    pitch,
    EPS: tl.constexpr,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row tile, column tile): dL/dD at (i, j) and at (j, i), 0 beyond the groups."""
    if not tile_is_needed(groups, ROWS, COLUMNS):
        return
    sums = tl.zeros([BLOCK], totals.dtype.element_ty)
    for first in range(0, groups, BLOCK):
        i = first + tl.arange(0, BLOCK)
        sums += tl.load(totals + i, mask=i < groups, other=0)
    total = tl.sum(sums, 0)
    distance = tile_distance(partial, n_tiles, parts, ROWS, COLUMNS)
    weight = _tile_weights(alpha, groups, ROWS, COLUMNS)
    if LOG:
        share = weight * tl.exp(-distance - tl.load(value)) / tl.where(total == 0, 1, total)
    else:
        share = weight * tl.exp(-distance) / tl.where(total < EPS, EPS, total)
    store_symmetric(grad_distance, pitch, -tl.load(grad) * share, ROWS, COLUMNS)


def _launch_value(partial: Partial, mean: Tensor, alpha: Tensor, eps: float, log: bool) -> Tensor:
    value = scratch(mean)
    launch(
        _overlap_kernel,
        partial.grid,
        partial.values,
        partial.n_tiles,
        partial.parts,
        mean.shape[0],
        alpha,
        scratch(mean, partial.n_tiles, 3),
        partial.counter,
        value,
        EPS=eps,
        LOG=log,
        BLOCK=BLOCK,
        **(partial.options | tuning.every_register(partial.options["num_warps"], mean.device)),
    )
    return value


def _launch_gradients(
    partial: Partial,
    grad: Tensor,
    value: Tensor,
    mean: Tensor,
    var: Tensor,
    alpha: Tensor,
    eps: float,
    log: bool,
) -> tuple[Tensor, Tensor]:
    groups = mean.shape[0]
    totals, grad_distance = scratch(mean, groups), pair_gradients(mean)
    launch(_row_totals_kernel, (groups,), alpha, groups, totals, BLOCK=BLOCK)
    launch(
        _pair_gradient_kernel,
        partial.grid,
        partial.values,
        partial.n_tiles,
        partial.parts,
        groups,
        alpha,
        totals,
        grad,
        value,
        grad_distance,
        grad_distance.stride(0),
        EPS=eps,
        LOG=log,
        BLOCK=BLOCK,
        **partial.options,
    )
    return launch_pairs_backward(grad_distance, mean, var, eps)


def weighted_overlap(mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool) -> Tensor:
    """Overlap, or its logarithm, of all pairs i < j of (K, D) weighted by alpha (K, K)."""
    if mean.shape[0] < 2:
        return mean.new_zeros(())
    return _launch_value(launch_partial(mean, var, eps), mean, alpha.contiguous(), eps, log)


def weighted_overlap_backward(
    grad: Tensor, value: Tensor, mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool
) -> tuple[Tensor, Tensor]:
    """Gradients (K, D) with respect to mean and var, for a scalar grad."""
    if mean.shape[0] < 2:
        return mean.new_zeros(mean.shape), var.new_zeros(var.shape)
    partial = launch_partial(mean, var, eps)
    return _launch_gradients(partial, grad, value, mean, var, alpha.contiguous(), eps, log)


def weighted_overlap_with_gradient(
    grad: Tensor, mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Both of the above from the same distances."""
    if mean.shape[0] < 2:
        return mean.new_zeros(()), mean.new_zeros(mean.shape), var.new_zeros(var.shape)
    alpha, partial = alpha.contiguous(), launch_partial(mean, var, eps)
    value = _launch_value(partial, mean, alpha, eps, log)
    return value, *_launch_gradients(partial, grad, value, mean, var, alpha, eps, log)
