"""Mean and variance of each class group in one read of the features, and the gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import SIZES_OF_A_BATCH, launch, scratch, with_unit_stride


@triton.jit
def group_moments(z, stride, dims, order, start, end, d, ACC: tl.constexpr, ROWS: tl.constexpr):
    """Mean and sum of squared deviations of samples order[start:end] at dimensions d.

    Two passes over a tile of ROWS samples in registers; tiles are merged by the formula of Chan,
    Golub and LeVeque (1983): M2 = M2a + M2b + delta^2 n_a n_b / n. All are taken relative to the
    group's first sample, so that a mean far from 0 costs no digits.
    """
    first_sample = tl.load(order + start, mask=start < end, other=0)
    readable = tl.where(start < end, dims, 0)  # An empty group may belong to an empty batch.
    origin = tl.load(z + first_sample * stride + d, mask=d < readable, other=0).to(ACC)
    mean = tl.zeros(d.shape, ACC)
    squares = tl.zeros(d.shape, ACC)
    for first in range(start, end, ROWS):
        position = first + tl.arange(0, ROWS)
        inside = (position < end)[:, None]
        sample = tl.load(order + position, mask=position < end, other=0)
        at = z + sample[:, None] * stride + d[None, :]
        x = tl.load(at, mask=inside & (d < dims)[None, :], other=0).to(ACC)
        x = tl.where(inside, x - origin[None, :], 0)
        before = (first - start).to(ACC)
        count = tl.minimum(end - first, ROWS).to(ACC)
        share = count / (before + count)
        tile_mean = tl.sum(x, 0) / count
        deviation = tl.where(inside, x - tile_mean[None, :], 0)
        delta = tile_mean - mean
        mean += delta * share
        squares += tl.sum(deviation * deviation, 0) + delta * delta * (before * share)
    return tl.where(start < end, origin + mean, 0), squares


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _moments_kernel(
    layers, order, offsets, counter, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program (group, block of dimensions, layer); also sets `counter` to 0 for a later kernel."""
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    start = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    for layer in tl.static_range(len(layers)):
        if tl.program_id(2) == layer and tl.program_id(1) * BLOCK < layers[layer][2]:
            z, stride, dims, mean_at, var_at = layers[layer]
            ACC: tl.constexpr = mean_at.dtype.element_ty
            mean, squares = group_moments(z, stride, dims, order, start, end, d, ACC, ROWS)
            var = squares / tl.maximum(end - start, 1).to(ACC)
            tl.store(mean_at + group * dims + d, mean, mask=d < dims)
            tl.store(var_at + group * dims + d, tl.where(var < EPS, EPS, var), mask=d < dims)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0) & (tl.program_id(2) == 0):
        tl.store(counter, 0)


@triton.jit
def store_feature_gradient(
    grad_mean, grad_var, z, stride, dims, mean, var, grad_z, order, start, end, d, EPS: tl.constexpr
):
    """`(g_mean + 2 g_var (z - mean))/n` for the samples of one group; nothing where var == eps."""
    ACC: tl.constexpr = mean.dtype
    size = tl.maximum(end - start, 1).to(ACC)
    through_mean = grad_mean / size
    through_var = tl.where(var > EPS, 2 * grad_var / size, 0)
    for position in range(start, end):
        sample = tl.load(order + position)
        x = tl.load(z + sample * stride + d, mask=d < dims, other=0).to(ACC)
        gradient = through_mean + through_var * (x - mean)
        tl.store(grad_z + sample * dims + d, gradient, mask=d < dims)


@triton.jit
def store_ungrouped_zeros(grad_z, dims, order, offsets, groups, batch, d):
    """Zero gradient for the samples of no group, which are shared out among the groups."""
    group = tl.program_id(0)
    for position in range(tl.load(offsets + groups) + group, batch, groups):
        sample = tl.load(order + position)
        tl.store(grad_z + sample * dims + d, tl.zeros(d.shape, grad_z.dtype.element_ty), d < dims)


@triton.jit(do_not_specialize=SIZES_OF_A_BATCH)
def _moments_backward_kernel(
    grad_mean,
    grad_var,
    z,
    stride,
    dims,
    mean,
    var,
    grad_z,
    order,
    offsets,
    groups,
    batch,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (group, block of dimensions)."""
    group = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = group * dims + d
    store_feature_gradient(
        tl.load(grad_mean + row, mask=d < dims, other=0),
        tl.load(grad_var + row, mask=d < dims, other=0),
        z,
        stride,
        dims,
        tl.load(mean + row, mask=d < dims, other=0),
        tl.load(var + row, mask=d < dims, other=0),
        grad_z,
        order,
        tl.load(offsets + group),
        tl.load(offsets + group + 1),
        d,
        EPS,
    )
    store_ungrouped_zeros(grad_z, dims, order, offsets, groups, batch, d)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the moments of features of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def launch_moments(
    features: Sequence[Tensor], order: Tensor, offsets: Tensor, eps: float, counter: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Moments of all layers in one launch; `counter` (1,) int32 is 0 after it."""
    groups = offsets.shape[0] - 1
    features = [with_unit_stride(z) for z in features]
    order, offsets = order.contiguous(), offsets.contiguous()
    widths = [z.shape[1] for z in features]
    mean, var = (
        [scratch(z, groups, z.shape[1], dtype=accumulation_dtype(z.dtype)) for z in features]
        for _ in range(2)
    )
    layers = tuple(
        (z, z.stride(0), z.shape[1], m, v) for z, m, v in zip(features, mean, var, strict=True)
    )
    options = tuning.moments(max(widths), features[0])
    grid = (groups, triton.cdiv(max(widths), options["BLOCK"]), len(layers))
    launch(_moments_kernel, grid, layers, order, offsets, counter, EPS=eps, **options)
    return mean, var


def class_moments(z: Tensor, order: Tensor, offsets: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and clamped biased variance (K, D) of each class group of z (B, D)."""
    counter = scratch(z, 1, dtype=torch.int32)
    (mean,), (var,) = launch_moments([z], order, offsets, eps, counter)
    return mean, var


def class_moments_backward(
    grad_mean: Tensor,
    grad_var: Tensor,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    order: Tensor,
    offsets: Tensor,
    eps: float,
) -> Tensor:
    """Gradient (B, D) of `class_moments` with respect to z, in the dtype of z."""
    batch, dims = z.shape
    groups = offsets.shape[0] - 1
    if groups == 0:
        return torch.zeros_like(z, memory_format=torch.contiguous_format)
    z = with_unit_stride(z)
    grad_z = scratch(z, batch, dims)
    options = tuning.moments_backward(dims, z)
    launch(
        _moments_backward_kernel,
        (groups, triton.cdiv(dims, options["BLOCK"])),
        grad_mean.contiguous(),
        grad_var.contiguous(),
        z,
        z.stride(0),
        dims,
        mean.contiguous(),
        var.contiguous(),
        grad_z,
        order.contiguous(),
        offsets.contiguous(),
        groups,
        batch,
        EPS=eps,
        **options,
    )
    return grad_z
