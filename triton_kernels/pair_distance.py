"""Distance of listed pairs with the gather fused, and its gradient without atomics.

Forward: one program per pair walks both rows once. Backward: one program per row walks the list
of the pairs that touch it, so its gradient is summed in one place and in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import (
    SIZES_OF_A_BATCH,
    approximate,
    eighth,
    fast_reciprocal,
    launch,
    log1p_of_scaled,
    scratch,
)

LIST_BLOCK = 1024


@triton.jit
def distance_of_rows(
    mean, var, i, j, dims, EPS: tl.constexpr, BLOCK: tl.constexpr, APPROXIMATE: tl.constexpr
):
    """Bhattacharyya distance of rows i and j: `delta^2/(4 S) + log1p(spread)/4` summed over d.

    With S = u_i + u_j and spread = (u_i - u_j)^2/(4 u_i u_j). In terms of q = u/8, whose sums and
    reciprocals do not leave the number format; spread might, and is formed divided by 2^BITS.
    """
    BITS: tl.constexpr = 510 if mean.dtype.element_ty == tl.float64 else 74
    total = tl.zeros([BLOCK], mean.dtype.element_ty)
    for first in range(0, dims, BLOCK):
        d = first + tl.arange(0, BLOCK)
        inside = d < dims
        q_i = eighth(tl.load(var + i * dims + d, mask=inside, other=1), EPS)
        q_j = eighth(tl.load(var + j * dims + d, mask=inside, other=1), EPS)
        delta = tl.load(mean + i * dims + d, mask=inside, other=0) - tl.load(
            mean + j * dims + d, mask=inside, other=0
        )
        eight_over_s = fast_reciprocal(q_i + q_j, APPROXIMATE)
        total += delta * (delta * (eight_over_s / 8))
        excess = (q_i - q_j) * 0.5 ** (BITS // 2 + 1)
        excess_i = excess * fast_reciprocal(q_i, APPROXIMATE)
        excess_j = excess * fast_reciprocal(q_j, APPROXIMATE)
        total += log1p_of_scaled(excess_i * excess_j, BITS, APPROXIMATE)
    return tl.sum(total, 0) / 4


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _pair_distance_kernel(
    mean,
    var,
    pairs,
    distance,
    dims,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Program: one pair."""
    pair = tl.program_id(0).to(tl.int64)
    i, j = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
    tl.store(distance + pair, distance_of_rows(mean, var, i, j, dims, EPS, BLOCK, APPROXIMATE))


@triton.jit
def list_pairs_of_row(row, pairs, n_pairs, starts, entries, BLOCK: tl.constexpr):
    """Write row's part of the list of its pairs: entries[starts[row]:starts[row + 1]].

    An entry e names one end of pair e // 2: its row is pairs.flatten()[e], its partner [e ^ 1].
    """
    start = 0
    for first in range(0, 2 * n_pairs, BLOCK):
        e = first + tl.arange(0, BLOCK)
        end = tl.load(pairs + e, mask=e < 2 * n_pairs, other=row)
        start += tl.sum((end < row).to(tl.int32), 0)
    tl.store(starts + row, start)
    for first in range(0, 2 * n_pairs, BLOCK):
        e = first + tl.arange(0, BLOCK)
        mine = tl.load(pairs + e, mask=e < 2 * n_pairs, other=-1) == row
        slot = start + tl.cumsum(mine.to(tl.int32), 0) - 1
        tl.store(entries + slot, e, mask=mine)
        start += tl.sum(mine.to(tl.int32), 0)
    # The next row writes the same number here, except after the last row.
    tl.store(starts + row + 1, start)


@triton.jit
def row_gradient(
    row,
    mean,
    var,
    dims,
    pairs,
    starts,
    entries,
    weights,
    d,
    EPS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """dL/dmean[row] and dL/dvar[row] at dimensions d, for weights dL/dD of the pairs.

    With S = u_i + u_j and t = (mean_i - mean_j)/S: `t/2` and `((u_i - u_j)/(S u_i) - t^2)/4`; in
    terms of q = u/8, whose reciprocals are numbers for every u.
    """
    inside = d < dims
    mean_i = tl.load(mean + row * dims + d, mask=inside, other=0)
    q_i = eighth(tl.load(var + row * dims + d, mask=inside, other=1), EPS)
    inverse_i = 8 * fast_reciprocal(q_i, APPROXIMATE)
    by_mean = tl.zeros(d.shape, mean_i.dtype)
    by_var = tl.zeros(d.shape, mean_i.dtype)
    for slot in range(tl.load(starts + row), tl.load(starts + row + 1)):
        entry = tl.load(entries + slot)
        partner = tl.load(pairs + (entry ^ 1))
        weight = tl.load(weights + entry // 2)
        q_j = eighth(tl.load(var + partner * dims + d, mask=inside, other=1), EPS)
        inverse = fast_reciprocal(q_i + q_j, APPROXIMATE)
        t8 = (mean_i - tl.load(mean + partner * dims + d, mask=inside, other=0)) * inverse
        by_mean += weight * t8
        by_var += weight * ((q_i - q_j) * inverse * inverse_i - t8 * t8)
    return by_mean / 16, by_var / 256


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _list_kernel(pairs, n_pairs, starts, entries, BLOCK: tl.constexpr):
    """Program: one row."""
    list_pairs_of_row(tl.program_id(0), pairs, n_pairs, starts, entries, BLOCK)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _pair_distance_backward_kernel(
    mean,
    var,
    grad_mean,
    grad_var,
    dims,
    pairs,
    starts,
    entries,
    weights,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Program (row, block of dimensions)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    by_mean, by_var = row_gradient(
        row, mean, var, dims, pairs, starts, entries, weights, d, EPS, APPROXIMATE
    )
    tl.store(grad_mean + row * dims + d, by_mean, mask=d < dims)
    tl.store(grad_var + row * dims + d, by_var, mask=d < dims)


def pair_lists(pairs: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Memory for the lists of each row's pairs: starts (rows + 1,) and entries (2 M,)."""
    return (
        scratch(pairs, rows + 1, dtype=torch.int32),
        scratch(pairs, 2 * pairs.shape[0], dtype=torch.int32),
    )


def pair_distance(mean: Tensor, var: Tensor, pairs: Tensor, eps: float) -> Tensor:
    """Distances (M,) of pairs (M, 2) of the rows of mean and var (K, D)."""
    mean, var, pairs = mean.contiguous(), var.contiguous(), pairs.contiguous()
    distance = scratch(mean, pairs.shape[0])
    dims = mean.shape[1]
    launch(
        _pair_distance_kernel,
        (pairs.shape[0],),
        mean,
        var,
        pairs,
        distance,
        dims,
        EPS=eps,
        APPROXIMATE=approximate(mean),
        **tuning.pair_distance(dims, mean),
    )
    return distance


def pair_distance_backward(
    grad: Tensor, mean: Tensor, var: Tensor, pairs: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients (K, D) with respect to mean and var, for grad (M,)."""
    grad, mean, var, pairs = (x.contiguous() for x in (grad, mean, var, pairs))
    rows, dims = mean.shape
    starts, entries = pair_lists(pairs, rows)
    grad_mean, grad_var = scratch(mean, rows, dims), scratch(mean, rows, dims)
    launch(_list_kernel, (rows,), pairs, pairs.shape[0], starts, entries, BLOCK=LIST_BLOCK)
    options = tuning.pair_distance_backward(dims, mean)
    launch(
        _pair_distance_backward_kernel,
        (rows, triton.cdiv(dims, options["BLOCK"])),
        mean,
        var,
        grad_mean,
        grad_var,
        dims,
        pairs,
        starts,
        entries,
        grad,
        EPS=eps,
        APPROXIMATE=approximate(mean),
        **options,
    )
    return grad_mean, grad_var
