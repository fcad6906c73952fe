"""Moves the class means of a bank towards those of a batch, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import SIZES_OF_A_BATCH, launch, require_contiguous


@triton.jit(debug=True, do_not_specialize=SIZES_OF_A_BATCH)
def _follow_classes_kernel(
    mean,
    count,
    n_classes,
    dims,
    classes,
    weight,
    batch_mean,
    LEAST_RATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program k: class k, which no other program has."""
    ACC: tl.constexpr = mean.dtype.element_ty
    k = tl.program_id(0).to(tl.int64)
    row, w = tl.load(classes + k), tl.load(weight + k)
    tl.device_assert(row < n_classes, "classes: expected classes below C")
    if (row >= 0) & (w > 0):
        seen = tl.load(count + row) + w
        tl.debug_barrier()  # all threads have read it
        tl.store(count + row, seen)
        rate = tl.maximum(w / tl.maximum(seen, 1), tl.full([], LEAST_RATE, ACC))
        for first in range(0, dims, BLOCK):
            d = first + tl.arange(0, BLOCK)
            before = tl.load(mean + row * dims + d, mask=d < dims, other=0)
            target = tl.load(batch_mean + k * dims + d, mask=d < dims, other=0)
            tl.store(mean + row * dims + d, before + rate * (target - before), mask=d < dims)


def follow_classes(
    mean: Tensor,
    count: Tensor,
    classes: Tensor,
    weight: Tensor,
    batch_mean: Tensor,
    momentum: float,
) -> None:
    """Writes the rows of mean (C, D) and count (C,) that classes (K,) names."""
    require_contiguous(mean=mean, count=count)
    groups, dims = batch_mean.shape
    if groups == 0:
        return
    launch(
        _follow_classes_kernel,
        (groups,),
        mean,
        count,
        mean.shape[0],
        dims,
        classes.contiguous(),
        weight.contiguous(),
        batch_mean.contiguous(),
        LEAST_RATE=1 - momentum,
        **tuning.class_rows(dims, mean),
    )
