"""The scatter of a batch's classes about the means of a bank updates its variances: three launches.

The weight of every class; the scatter of a few classes per program; the sum over these parts, after
which the last program of a layer to finish forms its metric.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import (
    SIZES_OF_A_BATCH,
    last_of,
    launch,
    require_contiguous,
    scratch,
    side_by_side,
    sum_of,
)

SUM_BLOCK = 1024


@triton.jit(debug=True, do_not_specialize=SIZES_OF_A_BATCH)
def _class_weights_kernel(
    layers,
    n_classes,
    classes,
    size,
    batch_mean,
    batch_var,
    groups,
    width,
    weight,
    known,
    counter,
    BLOCK: tl.constexpr,
):
    """Program (k, layer): the weight of class k, and in `known` the same if the bank has its mean.

    Also sets the layer's `counter` to 0 for a later kernel.
    """
    k = tl.program_id(0).to(tl.int64)
    for layer in tl.static_range(len(layers)):
        if tl.program_id(1) == layer:
            _, count, _, _, dims, first = layers[layer]
            if k == 0:
                tl.store(counter + layer, 0)
            if k < groups:
                row = tl.load(classes + k)
                tl.device_assert(row < n_classes, "classes: expected classes below C")
                w = tl.load(size + k)
                used = (row >= 0) & (w > 0)
                at = k * width + first
                squares = tl.zeros([BLOCK], w.dtype)
                for start in range(0, tl.where(used, dims, 0), BLOCK):
                    d = start + tl.arange(0, BLOCK)
                    m = tl.load(batch_mean + at + d, mask=d < dims, other=0)
                    v = tl.load(batch_var + at + d, mask=d < dims, other=0)
                    squares += v + m * m
                # Nor may a later difference to this mean, whose square is at most 4 of these,
                # overflow.
                w = tl.where(used & (4 * tl.sum(squares, 0) < float("inf")), w, 0)
                seen = tl.load(count + row, mask=w > 0, other=0)
                tl.store(weight + layer * groups + k, w)
                tl.store(known + layer * groups + k, tl.where(seen > 0, w, 0))


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _scatter_kernel(
    layers,
    classes,
    known,
    batch_mean,
    batch_var,
    groups,
    width,
    partial,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """Program (part, block of dimensions, layer): ROWS classes' weighted mean scatter."""
    part = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for layer in tl.static_range(len(layers)):
        if (tl.program_id(2) == layer) & (tl.program_id(1) * BLOCK < layers[layer][4]):
            mean, _, _, _, dims, first = layers[layer]
            total = sum_of(known + layer * groups, groups, SUM_BLOCK, "")
            k = part * ROWS + tl.arange(0, ROWS)
            w = tl.load(known + layer * groups + k, mask=k < groups, other=0)
            row = tl.load(classes + k, mask=w > 0, other=0)
            # Nothing is read where the weight is 0: 0 times what is not finite is not 0.
            read = (w > 0)[:, None] & (d < dims)[None, :]
            at = k[:, None] * width + first + d[None, :]
            center = tl.load(mean + row[:, None] * dims + d[None, :], mask=read, other=0)
            difference = tl.load(batch_mean + at, mask=read, other=0) - center
            scatter = tl.load(batch_var + at, mask=read, other=0) + difference * difference
            share = tl.where(w > 0, w / total, 0)
            result = tl.sum(share[:, None] * scatter, 0)
            tl.store(partial + part * width + first + d, result, mask=d < dims)


@triton.jit
def _interpolate(x, y, share):
    """x moved towards y by a share of the way, exactly y at the end of it."""
    return tl.where(share < 0.5, x + share * (y - x), y - (y - x) * (1 - share))


@triton.jit
def _store_metric(
    var, dims, metric, unit, FLOOR: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr
):
    # Not from the first-level cache: other programs of the same launch may have stored it.
    level = sum_of(var, dims, BLOCK, ".cg") / dims
    tl.store(unit, tl.where(level > 0, tl.sqrt(tl.maximum(level, 0)), 1))
    least = FLOOR * level + TINY
    for first in range(0, dims, BLOCK):
        d = first + tl.arange(0, BLOCK)
        raised = tl.load(var + d, mask=d < dims, other=0, cache_modifier=".cg") + least
        tl.store(metric + d, tl.where(level > 0, raised, 1), mask=d < dims)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _variances_kernel(
    layers,
    partial,
    parts,
    width,
    known,
    groups,
    metric,
    unit,
    counter,
    LEAST_PACE: tl.constexpr,
    FLOOR: tl.constexpr,
    TINY: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    SUM_BLOCK: tl.constexpr,
):
    """Program (block of variances, layer). A layer's last one, when all have read `updates`,
    raises it and forms the metric."""
    block = tl.program_id(0)
    d = block * BLOCK + tl.arange(0, BLOCK)
    for layer in tl.static_range(len(layers)):
        if (tl.program_id(1) == layer) & ((block == 0) | (block * BLOCK < layers[layer][4])):
            _, _, var, updates, dims, first = layers[layer]
            ACC: tl.constexpr = var.dtype.element_ty
            sums = tl.zeros([ROWS, BLOCK], ACC)
            for start in range(0, parts, ROWS):
                part = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
                inside = (part < parts) & (d < dims)[None, :]
                at = part * width + first + d[None, :]
                sums += tl.load(partial + at, mask=inside, other=0)
            any_known = sum_of(known + layer * groups, groups, SUM_BLOCK, "") > 0
            number = tl.load(updates) + tl.where(any_known, 1, 0)
            pace = tl.maximum(1 / tl.maximum(number, 1), tl.full([], LEAST_PACE, ACC))
            before = tl.load(var + d, mask=d < dims, other=0)
            now = _interpolate(before, tl.sum(sums, 0), pace)
            tl.store(var + d, tl.where(any_known, now, before), mask=d < dims)
            if last_of(tl.maximum(tl.cdiv(dims, BLOCK), 1), counter + layer):
                tl.store(updates, number)
                _store_metric(var, dims, metric + first, unit + layer, FLOOR, TINY, SUM_BLOCK)


def observe_classes(
    mean: Sequence[Tensor],
    count: Sequence[Tensor],
    var: Sequence[Tensor],
    updates: Sequence[Tensor],
    classes: Tensor,
    size: Tensor,
    batch_mean: Tensor,
    batch_var: Tensor,
    momentum: float,
    floor: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (L, K), metric (D,) and units (L,); writes L variances (D_l,) and updates ()."""
    for v, u in zip(var, updates, strict=True):
        require_contiguous(var=v, updates=u)
    layers = tuple(
        (m.contiguous(), c.contiguous(), v, u, m.shape[1], first)
        for (m, first), c, v, u in zip(side_by_side(mean), count, var, updates, strict=True)
    )
    groups, width = batch_mean.shape
    widest = max(m.shape[1] for m in mean)
    classes, batch_mean, batch_var = (t.contiguous() for t in (classes, batch_mean, batch_var))
    weight, known = (scratch(batch_mean, len(mean), groups) for _ in range(2))
    metric, unit = scratch(batch_mean, width), scratch(batch_mean, len(mean))
    counter = scratch(batch_mean, len(mean), dtype=torch.int32)
    launch(
        _class_weights_kernel,
        (max(1, groups), len(mean)),
        layers,
        mean[0].shape[0],
        classes,
        size.contiguous(),
        batch_mean,
        batch_var,
        groups,
        width,
        weight,
        known,
        counter,
        **tuning.class_rows(widest, batch_mean),
    )
    tiles = tuning.observe_classes(batch_mean)
    parts, blocks = triton.cdiv(groups, tiles["ROWS"]), triton.cdiv(widest, tiles["BLOCK"])
    partial = scratch(batch_mean, parts, width)
    if parts * blocks:
        launch(
            _scatter_kernel,
            (parts, blocks, len(mean)),
            layers,
            classes,
            known,
            batch_mean,
            batch_var,
            groups,
            width,
            partial,
            SUM_BLOCK=SUM_BLOCK,
            **tiles,
        )
    launch(
        _variances_kernel,
        (max(1, blocks), len(mean)),
        layers,
        partial,
        parts,
        width,
        known,
        groups,
        metric,
        unit,
        counter,
        LEAST_PACE=1 - momentum,
        FLOOR=floor,
        TINY=torch.finfo(batch_mean.dtype).tiny,
        SUM_BLOCK=SUM_BLOCK,
        **tiles,
    )
    return weight, metric, unit
