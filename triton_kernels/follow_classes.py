"""Moves the class means of each layer's bank towards those of a batch, in one launch."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import SIZES_OF_A_BATCH, launch, require_contiguous, side_by_side


@triton.jit(debug=True, do_not_specialize=SIZES_OF_A_BATCH)
def _follow_classes_kernel(
    layers,
    n_classes,
    width,
    classes,
    weight,
    groups,
    batch_mean,
    LEAST_RATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (k, layer): class k, which no other program of the layer has."""
    k = tl.program_id(0).to(tl.int64)
    row = tl.load(classes + k)
    tl.device_assert(row < n_classes, "classes: expected classes below C")
    for layer in tl.static_range(len(layers)):
        if tl.program_id(1) == layer:
            mean, count, dims, first = layers[layer]
            ACC: tl.constexpr = mean.dtype.element_ty
            w = tl.load(weight + layer * groups + k)
            if (row >= 0) & (w > 0):
                seen = tl.load(count + row) + w
                tl.debug_barrier()  # all threads have read it
                tl.store(count + row, seen)
                rate = tl.maximum(w / tl.maximum(seen, 1), tl.full([], LEAST_RATE, ACC))
                target_at = batch_mean + k * width + first
                for start in range(0, dims, BLOCK):
                    d = start + tl.arange(0, BLOCK)
                    before = tl.load(mean + row * dims + d, mask=d < dims, other=0)
                    target = tl.load(target_at + d, mask=d < dims, other=0)
                    moved = before + rate * (target - before)
                    tl.store(mean + row * dims + d, moved, mask=d < dims)


def follow_classes(
    mean: Sequence[Tensor],
    count: Sequence[Tensor],
    classes: Tensor,
    weight: Tensor,
    batch_mean: Tensor,
    momentum: float,
) -> None:
    """Writes the rows of L means (C, D_l) and counts (C,) that classes (K,) names."""
    for m, c in zip(mean, count, strict=True):
        require_contiguous(mean=m, count=c)
    groups, width = batch_mean.shape
    if groups == 0:
        return
    layers = tuple(
        (m, c, m.shape[1], first) for (m, first), c in zip(side_by_side(mean), count, strict=True)
    )
    launch(
        _follow_classes_kernel,
        (groups, len(mean)),
        layers,
        mean[0].shape[0],
        width,
        classes.contiguous(),
        weight.contiguous(),
        groups,
        batch_mean.contiguous(),
        LEAST_RATE=1 - momentum,
        **tuning.class_rows(max(m.shape[1] for m in mean), batch_mean),
    )
