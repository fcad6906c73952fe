"""Energy of each sample between some class means of the bank, and its gradient, in one launch."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import SIZES_OF_A_BATCH, launch, scratch, with_unit_stride


@triton.jit(debug=True, do_not_specialize=SIZES_OF_A_BATCH)
def _class_attraction_kernel(
    z,
    stride,
    dims,
    mean,
    n_classes,
    var,
    index,
    coefficient,
    count,
    energy,
    gradient,
    BLOCK: tl.constexpr,
):
    """Program b: sample b. `debug` keeps the assertion in production, without a host sync."""
    ACC: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], ACC)
    for first in range(0, dims, BLOCK):
        d = first + tl.arange(0, BLOCK)
        x = tl.load(z + row * stride + d, mask=d < dims, other=0).to(ACC)
        variance = tl.load(var + d, mask=d < dims, other=1)
        pull = tl.zeros([BLOCK], ACC)
        squares = tl.zeros([BLOCK], ACC)
        for j in range(row * count, (row + 1) * count):
            k = tl.load(index + j)
            tl.device_assert(k < n_classes, "index: expected classes below C")
            c = tl.load(coefficient + j, mask=k >= 0, other=0)
            readable = tl.where(k >= 0, dims, 0)
            center = tl.load(mean + k * dims + d, mask=d < readable, other=0)
            difference = tl.where(k >= 0, x - center, 0)
            pull += c * difference
            squares += c * difference * difference
        tl.store(gradient + row * dims + d, pull / variance, mask=d < dims)
        total += squares / variance
    tl.store(energy + row, tl.sum(total, 0) / 2)


def class_attraction(
    z: Tensor, mean: Tensor, var: Tensor, index: Tensor, coefficient: Tensor
) -> tuple[Tensor, Tensor]:
    """Energy (B,) and gradient (B, D) of z (B, D) for the means (C, D) named by index (B, J)."""
    batch, dims = z.shape
    z = with_unit_stride(z)
    energy, gradient = scratch(mean, batch), scratch(mean, batch, dims)
    launch(
        _class_attraction_kernel,
        (batch,),
        z,
        z.stride(0),
        dims,
        mean.contiguous(),
        mean.shape[0],
        var.contiguous(),
        index.contiguous(),
        coefficient.contiguous(),
        index.shape[1],
        energy,
        gradient,
        **tuning.class_attraction(dims, mean),
    )
    return energy, gradient
