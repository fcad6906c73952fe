"""Groups the samples of a batch by class: two launches, by counting instead of sorting.

The place of a sample in the order by (class, index) is the number of smaller (class, index)
pairs. B^2 comparisons in tiles are cheaper than a sort for the batch sizes of training, need one
pass and nothing but registers, and run on all multiprocessors. A second, single program lays out
the groups by prefix sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import SIZES_OF_A_BATCH, launch, scratch

TILE = 32
OTHERS = 128
BLOCK = 1024


@triton.jit(debug=True, do_not_specialize=SIZES_OF_A_BATCH)
def _rank_kernel(
    targets,
    stride,
    batch,
    n_classes,
    sample_at,
    size_at,
    is_first_at,
    TILE: tl.constexpr,
    OTHERS: tl.constexpr,
):
    """For each sample, at its place by (class, index): itself, its class's size, is it the first.

    `debug` keeps the assertion in production: it traps on the device, without a host sync.
    """
    index = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mine = tl.load(targets + index.to(tl.int64) * stride, mask=index < batch, other=0)
    tl.device_assert((mine >= 0) & (mine < n_classes), "targets: expected classes in [0, C)")
    smaller = tl.zeros([TILE], tl.int32)
    equal_before = tl.zeros([TILE], tl.int32)
    equal = tl.zeros([TILE], tl.int32)
    for first in range(0, batch, OTHERS):
        other_index = first + tl.arange(0, OTHERS)
        inside = other_index < batch
        other = tl.load(targets + other_index.to(tl.int64) * stride, mask=inside, other=0)
        same = (other[None, :] == mine[:, None]) & inside[None, :]
        less = (other[None, :] < mine[:, None]) & inside[None, :]
        before = same & (other_index[None, :] < index[:, None])
        smaller += tl.sum(less.to(tl.int32), 1)
        equal_before += tl.sum(before.to(tl.int32), 1)
        equal += tl.sum(same.to(tl.int32), 1)
    place = smaller + equal_before
    tl.store(sample_at + place, index, mask=index < batch)
    tl.store(size_at + place, equal, mask=index < batch)
    tl.store(is_first_at + place, (equal_before == 0).to(tl.int32), mask=index < batch)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _layout_kernel(
    targets,
    stride,
    batch,
    min_count,
    groups,
    sample_at,
    size_at,
    is_first_at,
    order,
    offsets,
    classes,
    BLOCK: tl.constexpr,
):
    """Prefix sums over the sorted samples: usable samples first, and where each group begins."""
    n_usable = 0
    for first in range(0, batch, BLOCK):
        place = first + tl.arange(0, BLOCK)
        size = tl.load(size_at + place, mask=place < batch, other=0)
        n_usable += tl.sum(((size >= min_count) & (place < batch)).to(tl.int32), 0)
    usable_before = 0
    groups_before = 0
    for first in range(0, batch, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < batch
        sample = tl.load(sample_at + place, mask=inside, other=0)
        usable = (tl.load(size_at + place, mask=inside, other=0) >= min_count) & inside
        begins = usable & (tl.load(is_first_at + place, mask=inside, other=0) != 0)
        position = usable_before + tl.cumsum(usable.to(tl.int32), 0) - usable.to(tl.int32)
        group = groups_before + tl.cumsum(begins.to(tl.int32), 0) - 1
        target = tl.load(targets + sample.to(tl.int64) * stride, mask=begins, other=0)
        destination = tl.where(usable, position, n_usable + place - position)
        tl.store(order + destination, sample.to(tl.int64), mask=inside)
        tl.store(offsets + group, position.to(tl.int64), mask=begins)
        tl.store(classes + group, target.to(tl.int64), mask=begins)
        usable_before += tl.sum(usable.to(tl.int32), 0)
        groups_before += tl.sum(begins.to(tl.int32), 0)
    for first in range(0, groups + 1, BLOCK):
        group = first + tl.arange(0, BLOCK)
        empty = group >= groups_before
        tl.store(offsets + group, tl.cast(n_usable, tl.int64), mask=empty & (group <= groups))
        tl.store(classes + group, -1, mask=empty & (group < groups))


def launch_group_by_class(
    targets: Tensor, min_count: int, n_classes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`group_by_class` that checks, on the device, that targets are in [0, n_classes)."""
    if targets.dtype == torch.bool:
        targets = targets.view(torch.uint8)
    batch = targets.shape[0]
    groups = batch // min_count
    order, offsets, classes = (
        scratch(targets, n, dtype=torch.int64) for n in (batch, groups + 1, groups)
    )
    # Rows of whole tiles, so that each is aligned, whatever the batch.
    sorted_samples = scratch(targets, 3, triton.cdiv(batch, TILE) * TILE, dtype=torch.int32)
    stride = targets.stride(0)
    launch(
        _rank_kernel,
        (triton.cdiv(batch, TILE),),
        targets,
        stride,
        batch,
        n_classes,
        *sorted_samples,
        TILE=TILE,
        OTHERS=OTHERS,
    )
    launch(
        _layout_kernel,
        (1,),
        targets,
        stride,
        batch,
        min_count,
        groups,
        *sorted_samples,
        order,
        offsets,
        classes,
        BLOCK=BLOCK,
        num_warps=8,
    )
    return order, offsets, classes


def group_by_class(targets: Tensor, min_count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order (B,), offsets (K + 1,) and classes (K,) of the class groups, as in the reference."""
    return launch_group_by_class(targets, min_count, n_classes=torch.iinfo(torch.int64).max)
