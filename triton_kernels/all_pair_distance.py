"""Distance of all pairs, in tiles of rows i x columns j of which only those with some i < j run.

Within a tile the sum of fractions is kept as one fraction, n/d + a/s = (n s + a d)/(d s), whose
denominator d = s_1 s_2 ... is also the argument of the logarithm: eight dimensions share one
reciprocal and one logarithm. After every four, d is brought back to [0.7, 1.4) by a power of two.

Three launches: `_pack_kernel` (transposed moments, so that a tile reads contiguous classes),
`_tile_kernel` (partial distances of slices of the dimensions, so that few classes still fill the
device) and a last one that adds up the slices.
"""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import approximate, fast_log2, fast_reciprocal, launch, scratch

GROUP = tl.constexpr(8)
PACK = 32
TILE = 32


@triton.jit
def _split_exponent(x):
    """x > 0 as (m, 2^-e, e) with x = m 2^e and m in [sqrt(1/2), sqrt(2))."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) & -0x10000000000000
        inverse = (0x3FF0000000000000 - exponent).to(tl.float64, bitcast=True)
        return (
            (bits - exponent).to(tl.float64, bitcast=True),
            inverse,
            (exponent >> 52).to(tl.int32),
        )
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    inverse = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
    return (bits - exponent).to(tl.float32, bitcast=True), inverse, exponent >> 23


@triton.jit
def _pack_kernel(
    mean,
    var,
    groups,
    dims,
    mean_t,
    u_t,
    mantissa_logs,
    exponents,
    counter,
    width,
    EPS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SLICE: tl.constexpr,
    PACK: tl.constexpr,
):
    """Program (slice of dimensions, block of classes): transpose, and sum log2 u over the slice.

    u is scaled by 2^EXPONENT, the mean by its root. Padding is neutral: mean 0 and u 1/2 make
    s = 1 and a term of 0. Logarithms are summed as (sum of log2 of mantissas, sum of exponents).
    """
    k = tl.program_id(1).to(tl.int64) * PACK + tl.arange(0, PACK)
    d = tl.program_id(0).to(tl.int64) * SLICE + tl.arange(0, SLICE)
    inside = (k < groups)[:, None] & (d < dims)[None, :]
    at = k[:, None] * dims + d[None, :]
    scale: tl.constexpr = 2.0**EXPONENT
    root: tl.constexpr = 2.0 ** (EXPONENT // 2)
    u = tl.where(inside, (tl.load(var + at, mask=inside, other=0) + EPS) * scale, 0.5)
    m = tl.load(mean + at, mask=inside, other=0) * root
    transposed = d[None, :] * width + k[:, None]
    tl.store(mean_t + transposed, m)
    tl.store(u_t + transposed, u)
    mantissa, _, exponent = _split_exponent(u)
    row = tl.program_id(0) * width + k
    tl.store(mantissa_logs + row, tl.sum(tl.log2(mantissa), 1))
    tl.store(exponents + row, tl.sum(exponent, 1))
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(counter, 0)


@triton.jit
def tile_is_needed(groups, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Whether tile (program 0, program 1) has a pair i <= j."""
    return tl.program_id(0) * ROWS < tl.minimum((tl.program_id(1) + 1) * COLUMNS, groups)


@triton.jit
def tile_index(ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Place of the needed tile (program 0, program 1) among the needed ones, column by column."""
    column = tl.program_id(1)
    return (COLUMNS // ROWS) * (column * (column + 1) // 2) + tl.program_id(0)


@triton.jit
def _tile_kernel(
    mean_t,
    u_t,
    mantissa_logs,
    exponents,
    groups,
    slices,
    slices_per_program,
    width,
    partial,
    n_tiles,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Program (row tile, column tile, run of slices): its part of the distances of its pairs."""
    if not tile_is_needed(groups, ROWS, COLUMNS):
        return
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    first_slice = tl.program_id(2) * slices_per_program
    end_slice = tl.minimum(first_slice + slices_per_program, slices)
    # In units of log(2)/2: sum of a/s and of the logarithms of the denominators' mantissas.
    acc = tl.zeros([ROWS, COLUMNS], mean_t.dtype.element_ty)
    exponent_sum = tl.zeros([ROWS, COLUMNS], tl.int32)
    for first in range(first_slice * SLICE, end_slice * SLICE, GROUP):
        n = tl.zeros([ROWS, COLUMNS], mean_t.dtype.element_ty)
        d = tl.full([ROWS, COLUMNS], 1.0, mean_t.dtype.element_ty)
        for half in tl.static_range(2):
            for dim in tl.static_range(GROUP // 2):
                row = tl.cast(first + half * (GROUP // 2) + dim, tl.int64) * width
                delta = tl.load(mean_t + row + i)[:, None] - tl.load(mean_t + row + j)[None, :]
                s = tl.load(u_t + row + i)[:, None] + tl.load(u_t + row + j)[None, :]
                n = n * s + (delta * delta) * d
                d = d * s
            d, inverse, exponent = _split_exponent(d)
            n = n * inverse
            exponent_sum += exponent
        HALF_PER_LOG2: tl.constexpr = 0.7213475204444817
        acc += n * fast_reciprocal(d, APPROXIMATE) * HALF_PER_LOG2 + fast_log2(d, APPROXIMATE)
    acc *= 2
    exponent_sum = 2 * exponent_sum - 2 * SLICE * (end_slice - first_slice)
    for s in range(first_slice, end_slice):
        row = s * width
        exponent_sum -= (
            tl.load(exponents + row + i)[:, None] + tl.load(exponents + row + j)[None, :]
        )
        acc -= tl.load(mantissa_logs + row + i)[:, None]
        acc -= tl.load(mantissa_logs + row + j)[None, :]
    QUARTER_LOG2: tl.constexpr = 0.17328679513998632
    part = (acc + exponent_sum.to(acc.dtype)) * QUARTER_LOG2
    tile = (tl.program_id(2).to(tl.int64) * n_tiles + tile_index(ROWS, COLUMNS)) * (ROWS * COLUMNS)
    inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    tl.store(partial + tile + inner, part)


@triton.jit
def tile_distance(partial, n_tiles, parts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The distances of this program's tile: its parts in order; rounding may not go below 0."""
    tile = partial + tile_index(ROWS, COLUMNS).to(tl.int64) * (ROWS * COLUMNS)
    inner = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros([ROWS, COLUMNS], partial.dtype.element_ty)
    for part in range(parts):
        total += tl.load(tile + tl.cast(part, tl.int64) * n_tiles * (ROWS * COLUMNS) + inner)
    return tl.where(total < 0, 0, total)


@triton.jit
def store_symmetric(matrix, groups, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a tile's pairs i < j of `x` at (i, j) and at (j, i), and 0 on the diagonal."""
    i = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    x = tl.where(i < j, x, 0)
    inside = (i <= j) & (j < groups)
    tl.store(matrix + i * groups + j, x, mask=inside)
    tl.store(matrix + j * groups + i, x, mask=inside)


@triton.jit
def _distance_kernel(
    partial, n_tiles, parts, groups, distance, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (row tile, column tile): the matrix of distances."""
    if not tile_is_needed(groups, ROWS, COLUMNS):
        return
    x = tile_distance(partial, n_tiles, parts, ROWS, COLUMNS)
    store_symmetric(distance, groups, x, ROWS, COLUMNS)


@triton.jit
def _symmetric_backward_kernel(grad, groups, out, TILE: tl.constexpr):
    """Program (tile of rows, tile of columns): grad + grad^T with a zero diagonal."""
    i = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    j = (tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE))[None, :]
    inside = (i < groups) & (j < groups)
    here = tl.load(grad + i * groups + j, mask=inside, other=0)
    there = tl.load(grad + j * groups + i, mask=inside, other=0)
    tl.store(out + i * groups + j, tl.where(i == j, 0, here + there), mask=inside)


@triton.jit
def _rows_backward_kernel(
    grad,
    mean,
    var,
    groups,
    dims,
    grad_mean,
    grad_var,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Program (block of rows i, block of dimensions): sums over all j, in order.

    With G = grad[i, j], symmetric, r = 1/(u_i + u_j) and delta = mean_i - mean_j:
    by mean: sum G r delta / 2; by var: (sum G r (u_i - u_j) / u_i - sum G (r delta)^2) / 4.
    """
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < groups)[:, None] & (d < dims)[None, :]
    at = i[:, None] * dims + d[None, :]
    mean_i = tl.load(mean + at, mask=inside, other=0)
    u_i = tl.load(var + at, mask=inside, other=1) + EPS
    by_mean = tl.zeros([ROWS, BLOCK], mean_i.dtype)
    by_excess = tl.zeros([ROWS, BLOCK], mean_i.dtype)
    by_square = tl.zeros([ROWS, BLOCK], mean_i.dtype)
    # Lanes beyond the last row or dimension read nothing and are not stored: any value will do.
    for j in range(groups):
        g = tl.load(grad + tl.cast(j, tl.int64) * groups + i, mask=i < groups)[:, None]
        row = tl.cast(j, tl.int64) * dims + d
        u_j = (tl.load(var + row, mask=d < dims) + EPS)[None, :]
        delta = mean_i - tl.load(mean + row, mask=d < dims)[None, :]
        r = fast_reciprocal(u_i + u_j, APPROXIMATE)
        g_r = g * r
        moved = g_r * delta
        by_mean += moved
        by_excess += g_r * (u_i - u_j)
        by_square += moved * (r * delta)
    tl.store(grad_mean + at, by_mean / 2, mask=inside)
    tl.store(grad_var + at, (by_excess / u_i - by_square) / 4, mask=inside)


class Partial(NamedTuple):
    """Parts of the distances of all needed tiles, and how to find them."""

    values: Tensor
    n_tiles: int
    parts: int
    grid: tuple[int, int]
    options: tuning.Options
    counter: Tensor


def _scale_exponent(eps: float) -> int:
    """Even e for which the smallest u, 2 eps, becomes about 2^-23.

    Four factors s of 2^-22 and more, and of less than 2^30, then stay inside float32's range.
    """
    return 2 * round((-24 - math.log2(eps)) / 2) if eps > 0 else 0


def launch_partial(mean: Tensor, var: Tensor, eps: float) -> Partial:
    """The distances in parts, and a counter that is 0."""
    mean, var = mean.contiguous(), var.contiguous()
    start = partial(_launch_tiles, mean, var, eps)
    return start(tuning.choose("all pairs", (*mean.shape,), tuning.all_pairs(mean.shape[0]), start))


def _launch_tiles(mean: Tensor, var: Tensor, eps: float, options: tuning.Options) -> Partial:
    groups, dims = mean.shape
    rows, columns = options["ROWS"], options["COLUMNS"]
    grid = (triton.cdiv(groups, rows), triton.cdiv(groups, columns))
    n_tiles = columns // rows * (grid[1] * (grid[1] - 1) // 2) + grid[0]
    slice_dims, parts = tuning.slices_of_dims(dims, n_tiles * options["num_warps"], mean.device)
    slices = triton.cdiv(dims, slice_dims)
    slices_per_program = triton.cdiv(slices, parts)
    parts = triton.cdiv(slices, slices_per_program)
    width = grid[1] * columns
    packed = scratch(mean, 2, slices * slice_dims, width)
    mantissa_logs = scratch(mean, slices, width)
    exponents = scratch(mean, slices, width, dtype=torch.int32)
    counter = scratch(mean, 1, dtype=torch.int32)
    launch(
        _pack_kernel,
        (slices, width // PACK),
        mean,
        var,
        groups,
        dims,
        packed[0],
        packed[1],
        mantissa_logs,
        exponents,
        counter,
        width,
        EPS=eps,
        EXPONENT=_scale_exponent(eps),
        SLICE=slice_dims,
        PACK=PACK,
    )
    values = scratch(mean, parts, n_tiles, rows, columns)
    launch(
        _tile_kernel,
        (*grid, parts),
        packed[0],
        packed[1],
        mantissa_logs,
        exponents,
        groups,
        slices,
        slices_per_program,
        width,
        values,
        n_tiles,
        SLICE=slice_dims,
        GROUP=GROUP,
        APPROXIMATE=approximate(mean),
        **options,
    )
    return Partial(values, n_tiles, parts, grid, options, counter)


def launch_rows_backward(
    grad: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients (K, D) for the gradient (K, K) of each pair, symmetric with a zero diagonal."""
    mean, var = mean.contiguous(), var.contiguous()
    start = partial(_launch_rows_backward, grad, mean, var, eps)
    return start(
        tuning.choose("all pairs backward", (*mean.shape,), tuning.all_pairs_backward(), start)
    )


def _launch_rows_backward(
    grad: Tensor, mean: Tensor, var: Tensor, eps: float, options: tuning.Options
) -> tuple[Tensor, Tensor]:
    groups, dims = mean.shape
    grad_mean, grad_var = scratch(mean, groups, dims), scratch(mean, groups, dims)
    launch(
        _rows_backward_kernel,
        (triton.cdiv(groups, options["ROWS"]), triton.cdiv(dims, options["BLOCK"])),
        grad,
        mean,
        var,
        groups,
        dims,
        grad_mean,
        grad_var,
        EPS=eps,
        APPROXIMATE=approximate(mean),
        **options,
    )
    return grad_mean, grad_var


def all_pair_distance(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """Distances (K, K) of all rows of mean and var (K, D)."""
    groups = mean.shape[0]
    if groups == 0:
        return mean.new_empty(0, 0)
    tiles = launch_partial(mean, var, eps)
    distance = scratch(mean, groups, groups)
    launch(
        _distance_kernel,
        tiles.grid,
        tiles.values,
        tiles.n_tiles,
        tiles.parts,
        groups,
        distance,
        **tiles.options,
    )
    return distance


def all_pair_distance_backward(
    grad: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients (K, D) with respect to mean and var, for grad (K, K)."""
    groups = mean.shape[0]
    symmetric = scratch(mean, groups, groups)
    tiles = triton.cdiv(groups, TILE)
    launch(
        _symmetric_backward_kernel, (tiles, tiles), grad.contiguous(), groups, symmetric, TILE=TILE
    )
    return launch_rows_backward(symmetric, mean, var, eps)
