"""The scatter of a batch's classes about the means of a bank updates its variances: three launches.

The weight of every class; the scatter of a few classes per program; the sum over these parts, after
which the last program to finish forms the metric.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import SIZES_OF_A_BATCH, last_to_arrive, launch, require_contiguous, scratch, sum_of

SUM_BLOCK = 1024


@triton.jit(debug=True, do_not_specialize=SIZES_OF_A_BATCH)
def _class_weights_kernel(
    count,
    n_classes,
    classes,
    size,
    batch_mean,
    batch_var,
    groups,
    dims,
    weight,
    known,
    counter,
    BLOCK: tl.constexpr,
):
    """Program k: the weight of class k, and in `known` the same if the bank has a mean of it.

    Also sets `counter` to 0 for a later kernel.
    """
    ACC: tl.constexpr = weight.dtype.element_ty
    k = tl.program_id(0).to(tl.int64)
    if k == 0:
        tl.store(counter, 0)
    if k < groups:
        row = tl.load(classes + k)
        tl.device_assert(row < n_classes, "classes: expected classes below C")
        w = tl.load(size + k)
        used = (row >= 0) & (w > 0)
        squares = tl.zeros([BLOCK], ACC)
        for first in range(0, tl.where(used, dims, 0), BLOCK):
            d = first + tl.arange(0, BLOCK)
            m = tl.load(batch_mean + k * dims + d, mask=d < dims, other=0)
            squares += tl.load(batch_var + k * dims + d, mask=d < dims, other=0) + m * m
        # Nor may a later difference to this mean, whose square is at most 4 of these, overflow.
        w = tl.where(used & (4 * tl.sum(squares, 0) < float("inf")), w, 0)
        seen = tl.load(count + row, mask=w > 0, other=0)
        tl.store(weight + k, w)
        tl.store(known + k, tl.where(seen > 0, w, 0))


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _scatter_kernel(
    mean,
    classes,
    known,
    batch_mean,
    batch_var,
    groups,
    dims,
    partial,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """Program (part, block of dimensions): what ROWS classes add to the weighted mean scatter."""
    part = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = sum_of(known, groups, SUM_BLOCK, "")
    k = part * ROWS + tl.arange(0, ROWS)
    w = tl.load(known + k, mask=k < groups, other=0)
    row = tl.load(classes + k, mask=w > 0, other=0)
    # Nothing is read where the weight is 0: 0 times what is not finite is not 0.
    read = (w > 0)[:, None] & (d < dims)[None, :]
    at = k[:, None] * dims + d[None, :]
    center = tl.load(mean + row[:, None] * dims + d[None, :], mask=read, other=0)
    difference = tl.load(batch_mean + at, mask=read, other=0) - center
    scatter = tl.load(batch_var + at, mask=read, other=0) + difference * difference
    share = tl.where(w > 0, w / total, 0)
    tl.store(partial + part * dims + d, tl.sum(share[:, None] * scatter, 0), mask=d < dims)


@triton.jit
def _interpolate(x, y, share):
    """x moved towards y by a share of the way, exactly y at the end of it."""
    return tl.where(share < 0.5, x + share * (y - x), y - (y - x) * (1 - share))


@triton.jit
def _store_metric(var, dims, metric, FLOOR: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr):
    # Not from the first-level cache: other programs of the same launch may have stored it.
    level = sum_of(var, dims, BLOCK, ".cg") / dims
    least = FLOOR * level + TINY
    for first in range(0, dims, BLOCK):
        d = first + tl.arange(0, BLOCK)
        raised = tl.load(var + d, mask=d < dims, other=0, cache_modifier=".cg") + least
        tl.store(metric + d, tl.where(level > 0, raised, 1), mask=d < dims)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _variances_kernel(
    partial,
    parts,
    known,
    groups,
    dims,
    var,
    updates,
    metric,
    counter,
    LEAST_PACE: tl.constexpr,
    FLOOR: tl.constexpr,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """Program: a block of variances. `updates` is raised by the last one, when all have read it."""
    ACC: tl.constexpr = var.dtype.element_ty
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros([ROWS, BLOCK], ACC)
    for first in range(0, parts, ROWS):
        part = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (part < parts) & (d < dims)[None, :]
        sums += tl.load(partial + part * dims + d[None, :], mask=inside, other=0)
    any_known = sum_of(known, groups, SUM_BLOCK, "") > 0
    number = tl.load(updates) + tl.where(any_known, 1, 0)
    pace = tl.maximum(1 / tl.maximum(number, 1), tl.full([], LEAST_PACE, ACC))
    before = tl.load(var + d, mask=d < dims, other=0)
    now = _interpolate(before, tl.sum(sums, 0), pace)
    tl.store(var + d, tl.where(any_known, now, before), mask=d < dims)
    if last_to_arrive(counter):
        tl.store(updates, number)
        _store_metric(var, dims, metric, FLOOR, TINY, SUM_BLOCK)


def observe_classes(
    mean: Tensor,
    count: Tensor,
    var: Tensor,
    updates: Tensor,
    classes: Tensor,
    size: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    momentum: float,
    floor: float,
) -> tuple[Tensor, Tensor]:
    """Weight (K,) of each class and metric (D,); writes var (D,) and updates ()."""
    require_contiguous(var=var, updates=updates)
    groups, dims = batch_mean.shape
    classes, batch_mean, batch_var = (t.contiguous() for t in (classes, batch_mean, batch_var))
    weight, known, metric = scratch(mean, groups), scratch(mean, groups), scratch(mean, dims)
    counter = scratch(mean, 1, dtype=torch.int32)
    launch(
        _class_weights_kernel,
        (max(1, groups),),
        count.contiguous(),
        mean.shape[0],
        classes,
        size.contiguous(),
        batch_mean,
        batch_var,
        groups,
        dims,
        weight,
        known,
        counter,
        **tuning.class_rows(dims, mean),
    )
    tiles = tuning.observe_classes(mean)
    parts, blocks = triton.cdiv(groups, tiles["ROWS"]), triton.cdiv(dims, tiles["BLOCK"])
    partial = scratch(mean, parts, dims)
    if parts * blocks:
        launch(
            _scatter_kernel,
            (parts, blocks),
            mean.contiguous(),
            classes,
            known,
            batch_mean,
            batch_var,
            groups,
            dims,
            partial,
            SUM_BLOCK=SUM_BLOCK,
            **tiles,
        )
    launch(
        _variances_kernel,
        (max(1, blocks),),
        partial,
        parts,
        known,
        groups,
        dims,
        var,
        updates,
        metric,
        counter,
        LEAST_PACE=1 - momentum,
        FLOOR=floor,
        TINY=torch.finfo(mean.dtype).tiny,
        SUM_BLOCK=SUM_BLOCK,
        **tiles,
    )
    return weight, metric
