"""Distances of all pairs, and their gradient.

Forward, the tiles' parts are added up. Backward, a gradient that need not be symmetric is made so.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .common import SIZES_OF_A_BATCH, launch, scratch
from .pair_tiles import launch_partial, store_symmetric, tile_distance, tile_is_needed
from .pair_tiles_backward import launch_pairs_backward, pair_gradients

TILE = 32


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _distance_kernel(
    partial, n_tiles, parts, groups, distance, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (row tile, column tile): the matrix of distances."""
    if not tile_is_needed(groups, ROWS, COLUMNS):
        return
    x = tile_distance(partial, n_tiles, parts, ROWS, COLUMNS)
    store_symmetric(distance, groups, x, ROWS, COLUMNS)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _symmetric_backward_kernel(grad, groups, out, pitch, TILE: tl.constexpr):
    """Program (tile of rows, tile of columns): grad + grad^T with a zero diagonal.

    `out` is (pitch, pitch), with zeros beyond grad.
    """
    i = (tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE))[:, None]
    j = (tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE))[None, :]
    inside = (i < groups) & (j < groups)
    here = tl.load(grad + i * groups + j, mask=inside, other=0)
    there = tl.load(grad + j * groups + i, mask=inside, other=0)
    sums = tl.where(inside & (i != j), here + there, 0)
    tl.store(out + i * pitch + j, sums, mask=(i < pitch) & (j < pitch))


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
    if groups == 0:
        return mean.new_zeros(mean.shape), var.new_zeros(var.shape)
    tiles = triton.cdiv(symmetric.shape[0], TILE)
    launch(
        _symmetric_backward_kernel,
        (tiles, tiles),
        grad.contiguous(),
        groups,
        symmetric,
        symmetric.stride(0),
        TILE=TILE,
    )
    return launch_pairs_backward(symmetric, mean, var, eps)
