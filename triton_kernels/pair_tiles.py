"""Tiles of pairs of rows i x columns j, of which only those with some i < j run.

Within a tile the sum of fractions is kept as one fraction, n/d + a/s = (n s + a d)/(d s), whose
denominator d = s_1 s_2 ... is also the argument of the logarithm: eight dimensions share one
reciprocal and one logarithm. After every four, d is brought back to [0.7, 1.4) by a power of two.
A tile in which a product of four might leave the number format goes one dimension at a time.

Two launches: `_pack_kernel` (transposed moments, so that a tile reads contiguous classes) and
`_tile_kernel` (partial distances of slices of the dimensions, so that few classes still fill the
device). Whoever needs the distances adds up the slices with `tile_distance`.
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
from .common import SIZES_OF_A_BATCH, approximate, fast_log2, fast_reciprocal, launch, scratch

GROUP = tl.constexpr(8)
PACK = 32


@triton.jit
def _split_exponent(x):
    """x > 0 as (m, 2^-e, e) with x = m 2^e and m in [sqrt(1/2), sqrt(2))."""
    if x.dtype == tl.float64:
        bits = x.to(tl.int64, bitcast=True)
        exponent = (bits - 0x3FE6A09E667F3BCD) & -0x10000000000000
        inverse = (0x3FF0000000000000 - exponent).to(tl.float64, bitcast=True)
        mantissa = (bits - exponent).to(tl.float64, bitcast=True)
        exponent = (exponent >> 52).to(tl.int32)
    else:
        bits = x.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) & -0x800000
        inverse = (0x3F800000 - exponent).to(tl.float32, bitcast=True)
        mantissa = (bits - exponent).to(tl.float32, bitcast=True)
        exponent = exponent >> 23
    return mantissa, inverse, exponent


@triton.jit
def _is_wide(mean, u):
    """Whether products of four sums of u, or the fractions they divide, might leave the range."""
    SPAN: tl.constexpr = 8 if u.dtype == tl.float64 else 1  # float64's exponents are 8 times wider
    u_is_outside = (u < 2.0 ** (-25 * SPAN)) | (u > 2.0 ** (24 * SPAN))
    outside = u_is_outside | (tl.abs(mean) > 2.0 ** (23 * SPAN))
    return tl.max(tl.max(outside.to(tl.int32), 1), 0)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _pack_kernel(
    mean,
    var,
    groups,
    dims,
    mean_t,
    u_t,
    mantissa_logs,
    exponents,
    wide,
    counter,
    width,
    EPS: tl.constexpr,
    EXPONENT: tl.constexpr,
    SLICE: tl.constexpr,
    PACK: tl.constexpr,
):
    """Program (slice of dimensions, block of PACK classes): transpose, and sum log2 u of the slice.

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
    tl.store(wide + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), _is_wide(m, u))
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


# Sums over dimensions are kept in units of log(2)/2: `acc` holds the a/s and the logarithms of what
# is left of the s, or of their products, when powers of two are taken out; `exponent_sum` counts
# those.
HALF_PER_LOG2 = tl.constexpr(0.7213475204444817)


@triton.jit
def _difference_and_sum(mean_t, u_t, i, j, dim, width):
    """Of the means, and of the u, of all pairs of rows i and columns j in one dimension."""
    row = tl.cast(dim, tl.int64) * width
    delta = tl.load(mean_t + row + i)[:, None] - tl.load(mean_t + row + j)[None, :]
    return delta, tl.load(u_t + row + i)[:, None] + tl.load(u_t + row + j)[None, :]


@triton.jit
def _add_dims(
    mean_t,
    u_t,
    i,
    j,
    first_dim,
    end_dim,
    width,
    acc,
    exponent_sum,
    GROUP: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Add the dimensions of all pairs of rows i and columns j, GROUP at a time."""
    for first in range(first_dim, end_dim, GROUP):
        n = tl.zeros(acc.shape, acc.dtype)
        d = tl.full(acc.shape, 1.0, acc.dtype)
        for half in tl.static_range(2):
            for dim in tl.static_range(GROUP // 2):
                this = first + half * (GROUP // 2) + dim
                delta, s = _difference_and_sum(mean_t, u_t, i, j, this, width)
                n = n * s + (delta * delta) * d
                d = d * s
            d, inverse, exponent = _split_exponent(d)
            n = n * inverse
            exponent_sum += exponent
        acc += n * fast_reciprocal(d, APPROXIMATE) * HALF_PER_LOG2 + fast_log2(d, APPROXIMATE)
    return acc, exponent_sum


@triton.jit
def _add_wide_dims(
    mean_t,
    u_t,
    i,
    j,
    first_dim,
    end_dim,
    width,
    acc,
    exponent_sum,
    APPROXIMATE: tl.constexpr,
):
    """The same for any s of the number format, one dimension at a time."""
    for dim in range(first_dim, end_dim):
        delta, s = _difference_and_sum(mean_t, u_t, i, j, dim, width)
        s, inverse, exponent = _split_exponent(s)
        exponent_sum += exponent
        a = delta * (delta * inverse)
        acc += a * fast_reciprocal(s, APPROXIMATE) * HALF_PER_LOG2 + fast_log2(s, APPROXIMATE)
    return acc, exponent_sum


@triton.jit
def _any_wide(
    wide,
    first_slice,
    end_slice,
    width,
    PACK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Whether a row or column of tile (program 0, program 1) is wide in any of the slices."""
    found = 0
    for s in range(first_slice, end_slice):
        flags = wide + s * (width // PACK)
        found += tl.load(flags + tl.program_id(0) * ROWS // PACK)
        for block in tl.static_range(COLUMNS // PACK):
            found += tl.load(flags + tl.program_id(1) * (COLUMNS // PACK) + block)
    return found > 0


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _tile_kernel(
    mean_t,
    u_t,
    mantissa_logs,
    exponents,
    wide,
    groups,
    slices,
    slices_per_program,
    width,
    partial,
    n_tiles,
    SLICE: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
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
    acc = tl.zeros([ROWS, COLUMNS], mean_t.dtype.element_ty)
    exponent_sum = tl.zeros([ROWS, COLUMNS], tl.int32)
    first_dim, end_dim = first_slice * SLICE, end_slice * SLICE
    if _any_wide(wide, first_slice, end_slice, width, PACK, ROWS, COLUMNS):
        acc, exponent_sum = _add_wide_dims(
            mean_t, u_t, i, j, first_dim, end_dim, width, acc, exponent_sum, APPROXIMATE
        )
    else:
        acc, exponent_sum = _add_dims(
            mean_t, u_t, i, j, first_dim, end_dim, width, acc, exponent_sum, GROUP, APPROXIMATE
        )
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
def store_symmetric(matrix, pitch, x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store a tile's pairs i < j of `x` at (i, j) and at (j, i), and 0 on the diagonal.

    The matrix is (pitch, pitch).
    """
    i = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    j = (tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    x = tl.where(i < j, x, 0)
    inside = (i <= j) & (j < pitch)
    tl.store(matrix + i * pitch + j, x, mask=inside)
    tl.store(matrix + j * pitch + i, x, mask=inside)


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
    return start(tuning.choose("all pairs", mean, tuning.all_pairs(mean), start))


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
    wide = scratch(mean, slices, width // PACK, dtype=torch.int32)
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
        wide,
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
        wide,
        groups,
        slices,
        slices_per_program,
        width,
        values,
        n_tiles,
        SLICE=slice_dims,
        GROUP=GROUP,
        PACK=PACK,
        APPROXIMATE=approximate(mean),
        **options,
    )
    return Partial(values, n_tiles, parts, grid, options, counter)
