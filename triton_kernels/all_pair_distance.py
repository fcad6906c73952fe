"""Distances of all pairs, and their gradient.

Forward, the tiles' parts are added up. Backward, a program owns some rows and visits all others: so
(i, j) and (j, i) are visited, and each sum is made in one place, in order.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import approximate, fast_reciprocal, launch, scratch
from .pair_tiles import launch_partial, store_symmetric, tile_distance, tile_is_needed

TILE = 32
# The backward kernel reads at most this many rows of a gradient's column at once.
PITCH = 16


@triton.jit
def _distance_kernel(
    partial, n_tiles, parts, groups, distance, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (row tile, column tile): the matrix of distances."""
    if not tile_is_needed(groups, ROWS, COLUMNS):
        return
    x = tile_distance(partial, n_tiles, parts, ROWS, COLUMNS)
    store_symmetric(distance, groups, groups, x, ROWS, COLUMNS)


@triton.jit
def _symmetric_backward_kernel(grad, groups, out, pitch, TILE: tl.constexpr):
    """Program (tile of rows, tile of columns): grad + grad^T with a zero diagonal.

    Rows of `out` are `pitch` elements apart.
    """
    i = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    j = (tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE))[None, :]
    inside = (i < groups) & (j < groups)
    here = tl.load(grad + i * groups + j, mask=inside, other=0)
    there = tl.load(grad + j * groups + i, mask=inside, other=0)
    tl.store(out + i * pitch + j, tl.where(i == j, 0, here + there), mask=inside)


@triton.jit
def _rows_backward_kernel(
    grad,
    pitch,
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

    With G = grad[j, i], symmetric, r = 1/(u_i + u_j) and t = r (mean_i - mean_j):
    by mean: sum G t / 2; by var: sum G (r (u_i - u_j) - u_i t^2) / (4 u_i).
    """
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (i < groups)[:, None] & (d < dims)[None, :]
    at = i.to(tl.int64)[:, None] * dims + d[None, :]
    mean_i = tl.load(mean + at, mask=inside, other=0)
    u_i = tl.load(var + at, mask=inside, other=1) + EPS
    by_mean = tl.zeros([ROWS, BLOCK], mean_i.dtype)
    by_log = tl.zeros([ROWS, BLOCK], mean_i.dtype)
    # Lanes beyond the last row or dimension are not stored: whatever they read will do.
    for j in range(groups):
        g = tl.load(grad + tl.cast(j, tl.int64) * pitch + i)[:, None]
        row = tl.cast(j, tl.int64) * dims + d
        u_j = (tl.load(var + row, mask=d < dims) + EPS)[None, :]
        delta = mean_i - tl.load(mean + row, mask=d < dims)[None, :]
        r = fast_reciprocal(u_i + u_j, APPROXIMATE)
        t = r * delta
        by_mean += g * t
        by_log += g * (r * (u_i - u_j) - (u_i * t) * t)
    tl.store(grad_mean + at, by_mean / 2, mask=inside)
    tl.store(grad_var + at, by_log / u_i / 4, mask=inside)


def pair_gradients(mean: Tensor) -> Tensor:
    """Memory for a gradient (K, K) of each pair of rows of mean (K, D), in padded rows."""
    groups = mean.shape[0]
    return scratch(mean, groups, triton.cdiv(groups, PITCH) * PITCH)


def launch_rows_backward(
    grad: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients (K, D) for `pair_gradients` that are symmetric with a zero diagonal."""
    mean, var = mean.contiguous(), var.contiguous()
    start = partial(_launch_rows_backward, grad, mean, var, eps)
    candidates = tuning.all_pairs_backward(mean)
    return start(tuning.choose("all pairs backward", (*mean.shape,), candidates, start))


def _launch_rows_backward(
    grad: Tensor, mean: Tensor, var: Tensor, eps: float, options: tuning.Options
) -> tuple[Tensor, Tensor]:
    groups, dims = mean.shape
    grad_mean, grad_var = scratch(mean, groups, dims), scratch(mean, groups, dims)
    launch(
        _rows_backward_kernel,
        (triton.cdiv(groups, options["ROWS"]), triton.cdiv(dims, options["BLOCK"])),
        grad,
        grad.stride(0),
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
    groups, symmetric = mean.shape[0], pair_gradients(mean)
    tiles = triton.cdiv(groups, TILE)
    launch(
        _symmetric_backward_kernel,
        (tiles, tiles),
        grad.contiguous(),
        groups,
        symmetric,
        symmetric.stride(0),
        TILE=TILE,
    )
    return launch_rows_backward(symmetric, mean, var, eps)
