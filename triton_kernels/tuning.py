"""Tile sizes and warps of every kernel, in one place."""

from __future__ import annotations

import triton
from torch import Tensor

Options = dict[str, int]


def block_of_dims(dims: int, itemsize: int, most_warps: int) -> Options:
    """A block in which each lane reads 16 contiguous bytes of a row, and its warps.

    With all warps along the row the sum over the rows of a tile stays inside a thread.
    """
    per_warp = 32 * 16 // itemsize
    warps = min(most_warps, triton.next_power_of_2(triton.cdiv(dims, per_warp)))
    return {"BLOCK": per_warp * warps, "num_warps": warps}


def moments(dims: int, z: Tensor) -> Options:
    """Four samples at a time: classes of a balanced batch rarely have more."""
    return {"ROWS": 4, **block_of_dims(dims, z.element_size(), most_warps=4)}


def moments_backward(dims: int, z: Tensor) -> Options:
    return block_of_dims(dims, z.element_size(), most_warps=4)


def pair_distance(dims: int, mean: Tensor) -> Options:
    return block_of_dims(dims, mean.element_size(), most_warps=8)


def pair_distance_backward(dims: int, mean: Tensor) -> Options:
    return block_of_dims(dims, mean.element_size(), most_warps=4)


def mean_probs(classes: int) -> Options:
    """Tiles of about 4096 logits, of many samples where classes are few."""
    block = min(1024, triton.next_power_of_2(classes))
    return {"ROWS": max(4, min(64, 4096 // block)), "BLOCK_C": block, "num_warps": 4}
