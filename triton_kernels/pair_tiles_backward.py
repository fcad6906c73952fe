"""Gradients of all pairs of rows, each pair visited once for both of its rows.

A lane keeps one dimension of a block of rows i while it goes through the rows j of another block,
so every sum stays in a lane: that over j in registers, that over i in memory of the program's own.
In turn t block b meets block b + t (mod n), so that the blocks of one turn write to different rows
and t = 0 ... n/2 are all pairs of blocks. In turns 0 and, of an even n, n/2 two blocks meet twice:
there each visit counts for its rows i alone.

Two launches: `_pairs_backward_kernel` (some copies of both gradients, one for each share of the
turns) and `_sum_copies_kernel`. No sum depends on the order in which programs run.
"""

from __future__ import annotations

from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import SIZES_OF_A_BATCH, approximate, eighth, fast_reciprocal, launch, scratch

# Gradients of pairs are padded with zeros to whole blocks of rows.
PITCH = 16


@triton.jit
def _visit_block(
    grad,
    pitch,
    mean,
    var,
    groups,
    dims,
    sums,
    width,
    plane,
    i,
    first_j,
    counts_for_j,
    mean_i,
    q_i,
    read_d,
    d,
    by_mean,
    by_excess,
    by_square,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Rows i (ROWS, TILES) meet the ROWS rows from first_j (TILES,) on.

    With G = grad[j, i], r = 1/(u_i + u_j), t = r (mean_i - mean_j) and x = r (u_i - u_j), a pair
    adds 8 G t, G x and 64 G t^2 to the sums of i, and -8 G t and -G (x + u_j t^2) to those of j:
    in terms of q = u/8, whose sums and reciprocals do not leave the number format.
    """
    at = tl.minimum(first_j, groups - 1).to(tl.int64)[:, None] * dims + read_d
    mean_at, var_at = mean + at, var + at
    # Sums that are not stored are not loaded from where another warp may store its own: the last
    # rows are nobody's.
    rows_j = tl.where(counts_for_j, first_j.to(tl.int64)[:, None] * width, plane - ROWS * width)
    mean_sum = sums + rows_j + d
    log_sum = mean_sum + plane
    weight_at = grad + first_j.to(tl.int64)[None, :] * pitch + i
    for row in range(ROWS):
        weight = tl.load(weight_at)[:, :, None]
        mean_j = tl.load(mean_at)
        q_j = eighth(tl.load(var_at), EPS)
        mean_sum_j, log_sum_j = tl.load(mean_sum), tl.load(log_sum)
        r8 = fast_reciprocal(q_i + q_j[None], APPROXIMATE)
        t8 = r8 * (mean_i - mean_j[None])
        x = r8 * (q_i - q_j[None])
        weighted = weight * t8
        by_mean += weighted
        by_excess += weight * x
        by_square += weighted * t8
        mean_sum_j -= tl.sum(weighted, 0)
        log_sum_j -= tl.sum(weight * x, 0) + q_j / 8 * tl.sum(weighted * t8, 0)
        tl.store(mean_sum, mean_sum_j, mask=counts_for_j)
        tl.store(log_sum, log_sum_j, mask=counts_for_j)
        # Beyond the last row the weights are 0: any row will do.
        to_next = tl.where(first_j + row < groups - 1, dims, 0)[:, None]
        mean_at += to_next
        var_at += to_next
        mean_sum += width
        log_sum += width
        weight_at += pitch
    return by_mean, by_excess, by_square


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _pairs_backward_kernel(
    grad,
    pitch,
    mean,
    var,
    groups,
    dims,
    copies,
    width,
    plane,
    blocks,
    EPS: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):
    """Program (block of dimensions, share of the turns): its copy of the sums.

    A copy has, `plane` elements apart, the sums of 8 G t and of G (r (u_i - u_j) - u_i t^2), and at
    the end of both a block of rows that no sum belongs to. Each warp has a block of rows; between
    turns, which may write to the same rows, all wait.
    """
    # Were adjacent dimensions known to be adjacent in memory, Triton would give a lane four of
    # them and spread the rows over lanes, which then had to exchange their sums.
    d = tl.max_contiguous(tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), 1)
    read_d = tl.max_contiguous(tl.minimum(d, dims - 1), 1)
    sums = copies + tl.program_id(1).to(tl.int64) * 2 * plane
    tile = tl.arange(0, TILES)
    in_block = tl.arange(0, ROWS)[:, None]
    zeros = tl.zeros([ROWS, TILES, BLOCK], mean.dtype.element_ty)
    for first in range(0, blocks, TILES):
        i = ((first + tile)[None, :] * ROWS + in_block).to(tl.int64)[:, :, None]
        mine = ((first + tile) < blocks)[None, :, None]
        tl.store(sums + i * width + d, zeros, mask=mine)
        tl.store(sums + plane + i * width + d, zeros, mask=mine)
    tl.debug_barrier()
    for first in range(0, blocks, TILES):
        block = tl.minimum(first + tile, blocks - 1)
        mine = first + tile < blocks
        i = block[None, :] * ROWS + in_block
        at = tl.minimum(i, groups - 1).to(tl.int64)[:, :, None] * dims + read_d
        mean_i = tl.load(mean + at)
        q_i = eighth(tl.load(var + at), EPS)
        by_mean, by_excess, by_square = zeros, zeros, zeros
        for turn in range(tl.program_id(1), blocks // 2 + 1, tl.num_programs(1)):
            # Where blocks meet twice the sums of j are left to the other visit.
            end = tl.where(2 * turn % blocks == 0, 0, blocks)
            by_mean, by_excess, by_square = _visit_block(
                grad,
                pitch,
                mean,
                var,
                groups,
                dims,
                sums,
                width,
                plane,
                i,
                (block + turn) % blocks * ROWS,
                (first + tile < end)[:, None],
                mean_i,
                q_i,
                read_d,
                d,
                by_mean,
                by_excess,
                by_square,
                EPS,
                ROWS,
                APPROXIMATE,
            )
            tl.debug_barrier()
        here = sums + i.to(tl.int64)[:, :, None] * width + d
        by_log = by_excess - q_i / 8 * by_square
        there = mine[None, :, None]
        tl.store(here, tl.load(here, mask=there, other=0) + by_mean, mask=there)
        by_log += tl.load(here + plane, mask=there, other=0)
        tl.store(here + plane, by_log, mask=there)
        tl.debug_barrier()


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _sum_copies_kernel(
    copies,
    n_copies,
    width,
    plane,
    var,
    dims,
    grad_mean,
    grad_var,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, block of dimensions): adds the copies in order.

    By mean: a sixteenth of their first sum; by var: a eighth of their second over u.
    """
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = d < dims
    by_mean = tl.zeros([BLOCK], copies.dtype.element_ty)
    by_log = tl.zeros([BLOCK], copies.dtype.element_ty)
    for copy in range(n_copies):
        at = copies + tl.cast(copy, tl.int64) * 2 * plane + row * width + d
        by_mean += tl.load(at, mask=inside, other=0)
        by_log += tl.load(at + plane, mask=inside, other=0)
    at = row * dims + d
    u = tl.load(var + at, mask=inside, other=1) + EPS
    tl.store(grad_mean + at, by_mean / 16, mask=inside)
    tl.store(grad_var + at, by_log / u / 4, mask=inside)


def pair_gradients(mean: Tensor) -> Tensor:
    """Memory for a gradient (K, K) of each pair of rows of mean (K, D), padded to whole blocks."""
    padded = triton.cdiv(mean.shape[0], PITCH) * PITCH
    return scratch(mean, padded, padded)


def launch_pairs_backward(
    grad: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients (K, D) for `pair_gradients` that are symmetric, and 0 on the diagonal and beyond K.

    Takes memory for a few copies of the gradients: as many as fill the device, see `tuning.copies`.
    """
    mean, var = mean.contiguous(), var.contiguous()
    start = partial(_launch_pairs_backward, grad, mean, var, eps)
    candidates = tuning.all_pairs_backward(mean)
    return start(tuning.choose("all pairs backward", mean, candidates, start))


def _launch_pairs_backward(
    grad: Tensor, mean: Tensor, var: Tensor, eps: float, options: tuning.Options
) -> tuple[Tensor, Tensor]:
    groups, dims = mean.shape
    blocks = triton.cdiv(groups, options["ROWS"])
    dim_blocks = triton.cdiv(dims, options["BLOCK"])
    rows, width = (blocks + 1) * options["ROWS"], dim_blocks * options["BLOCK"]
    number = tuning.copies(blocks, dim_blocks, options["num_warps"], tuning.processors(mean.device))
    copies = scratch(mean, number, 2, rows, width)
    launch(
        _pairs_backward_kernel,
        (dim_blocks, copies.shape[0]),
        grad,
        grad.stride(0),
        mean,
        var,
        groups,
        dims,
        copies,
        width,
        rows * width,
        blocks,
        EPS=eps,
        APPROXIMATE=approximate(mean),
        **options,
    )
    grad_mean, grad_var = scratch(mean, groups, dims), scratch(mean, groups, dims)
    adding = tuning.sum_of_copies(dims, mean)
    launch(
        _sum_copies_kernel,
        (groups, triton.cdiv(dims, adding["BLOCK"])),
        copies,
        copies.shape[0],
        width,
        rows * width,
        var,
        dims,
        grad_mean,
        grad_var,
        EPS=eps,
        **adding,
    )
    return grad_mean, grad_var
