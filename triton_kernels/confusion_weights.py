"""How much softmax mass the classes of the batch lend each other: streaming softmax, two launches.

The (B, C) probabilities are never made: a sample's logits are read once for their maximum and
sum, and right after, from the cache, at the K columns of the classes present.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .class_moments import accumulation_dtype
from .common import SIZES_OF_A_BATCH, launch, scratch, with_unit_stride

COLUMNS = 64
TILE = 32


@triton.jit
def _softmax_statistics(logits, row, inside, n_classes, ACC: tl.constexpr, BLOCK_C: tl.constexpr):
    """Maximum of each row, and sum of exp(x - maximum)."""
    peak = tl.full(inside.shape, float("-inf"), ACC)
    mass = tl.zeros(inside.shape, ACC)
    for first in range(0, n_classes, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        at = logits + row[:, None] + c[None, :]
        x = tl.load(at, mask=inside[:, None] & (c < n_classes)[None, :], other=float("-inf"))
        x = x.to(ACC)
        higher = tl.maximum(peak, tl.max(x, 1))
        # Where everything so far is -inf the sum is 0, not exp(-inf - -inf).
        shift = tl.where(higher == float("-inf"), 0, higher)
        mass = mass * tl.exp(peak - shift) + tl.sum(tl.exp(x - shift[:, None]), 1)
        peak = higher
    return peak, mass


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _mean_probs_kernel(
    logits,
    stride,
    n_classes,
    order,
    offsets,
    classes,
    groups,
    mean_probs,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program k: mean_probs[k, j] = mean over group k of softmax(logits)[:, classes[j]]."""
    ACC: tl.constexpr = mean_probs.dtype.element_ty
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    for first in range(start, end, ROWS):
        position = first + tl.arange(0, ROWS)
        inside = position < end
        row = tl.load(order + position, mask=inside, other=0) * stride
        peak, mass = _softmax_statistics(logits, row, inside, n_classes, ACC, BLOCK_C)
        for first_column in range(0, groups, COLUMNS):
            j = first_column + tl.arange(0, COLUMNS)
            column = tl.load(classes + j, mask=j < groups, other=-1)
            wanted = (column >= 0) & (column < n_classes)
            mask = inside[:, None] & wanted[None, :]
            x = tl.load(logits + row[:, None] + column[None, :], mask=mask, other=0).to(ACC)
            probs = tl.where(mask, tl.exp(x - peak[:, None]) / mass[:, None], 0)
            at = mean_probs + group * groups + j
            before = tl.where(first > start, tl.load(at, mask=j < groups, other=0), 0)
            share = tl.sum(probs, 0) / (end - start).to(ACC)
            tl.store(at, before + share, mask=j < groups)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _symmetrise_kernel(mean_probs, classes, groups, alpha, TILE: tl.constexpr):
    """alpha = (P + P^T)/2 with a zero diagonal; zero for empty groups, whose P is not read."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    row_used = tl.load(classes + i, mask=i < groups, other=-1) >= 0
    column_used = tl.load(classes + j, mask=j < groups, other=-1) >= 0
    used = row_used[:, None] & column_used[None, :] & (i[:, None] != j[None, :])
    here = tl.load(mean_probs + i[:, None] * groups + j[None, :], mask=used, other=0)
    there = tl.load(mean_probs + j[None, :] * groups + i[:, None], mask=used, other=0)
    inside = (i < groups)[:, None] & (j < groups)[None, :]
    tl.store(alpha + i[:, None] * groups + j[None, :], (here + there) / 2, mask=inside)


def launch_mean_probs(logits: Tensor, order: Tensor, offsets: Tensor, classes: Tensor) -> Tensor:
    """P (K, K) for contiguous classes; rows of empty groups are not written."""
    groups, n_classes = classes.shape[0], logits.shape[1]
    logits = with_unit_stride(logits)
    mean_probs = scratch(logits, groups, groups, dtype=accumulation_dtype(logits.dtype))
    launch(
        _mean_probs_kernel,
        (groups,),
        logits,
        logits.stride(0),
        n_classes,
        order.contiguous(),
        offsets.contiguous(),
        classes,
        groups,
        mean_probs,
        COLUMNS=COLUMNS,
        **tuning.mean_probs(n_classes),
    )
    return mean_probs


def confusion_weights(logits: Tensor, order: Tensor, offsets: Tensor, classes: Tensor) -> Tensor:
    """Confusion weights alpha (K, K) of logits (B, C)."""
    classes = classes.contiguous()
    mean_probs = launch_mean_probs(logits, order, offsets, classes)
    alpha = scratch(mean_probs, *mean_probs.shape)
    groups = classes.shape[0]
    tiles = triton.cdiv(groups, TILE)
    launch(_symmetrise_kernel, (tiles, tiles), mean_probs, classes, groups, alpha, TILE=TILE)
    return alpha
