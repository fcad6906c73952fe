"""Energy of each sample between class means of each layer's bank, and its gradient: one launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .common import SIZES_OF_A_BATCH, launch, scratch, side_by_side, with_unit_stride

INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _own_class(labels, shares, at, read, EQUAL: tl.constexpr, ACC: tl.constexpr):
    """An own class where `read`, negative for none, and its share."""
    k = tl.load(labels + at, mask=read, other=-1)
    if EQUAL:
        share = tl.where(read, tl.full([], 1, ACC), 0)
    else:
        share = tl.load(shares + at, mask=read, other=0)
    return tl.where(share > 0, k, -1), share


@triton.jit
def _acts(labels, shares, own, seen, row, EQUAL: tl.constexpr, ACC: tl.constexpr):
    """Whether a sample has a main class, if any, and something is known of all its own classes."""
    unknown = 0
    for s in range(own):
        k, _ = _own_class(labels, shares, row * own + s, True, EQUAL, ACC)
        known = tl.load(seen + k, mask=k >= 0, other=0) != 0
        unknown += tl.where(known | ((k < 0) & (s > 0)), 0, 1)
    return unknown == 0


@triton.jit
def _acting(
    labels,
    shares,
    own,
    rivals,
    weight,
    others,
    row,
    j,
    PUSH: tl.constexpr,
    EQUAL: tl.constexpr,
    ACC: tl.constexpr,
):
    """Classes j of a sample, its own ones first, negative for none; their coefficients; the weight
    of those that are rivals, else 0."""
    own_class, share = _own_class(labels, shares, row * own + j, j < own, EQUAL, ACC)
    is_rival = (j >= own) & (j < own + others)
    at = row * others + j - own
    rival = tl.load(rivals + at, mask=is_rival, other=-1)
    strength = tl.load(weight + at, mask=is_rival & (rival >= 0), other=0)
    for s in range(own):
        k, _ = _own_class(labels, shares, row * own + s, True, EQUAL, ACC)
        rival = tl.where(rival == k, -1, rival)
    strength = tl.where(rival >= 0, strength, 0)
    coefficient = tl.where(is_rival, -tl.full([], PUSH, ACC) * strength, share)
    return tl.where(is_rival, rival, own_class), coefficient, strength


@triton.jit
def _attract(
    z,
    mean,
    dims,
    var,
    k,
    coefficient,
    unit,
    gradient,
    adds,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Distances of one sample to classes k, and its gradient's squares; addresses of the layer's.

    Adds to the gradient of the classes before them.
    """
    ACC: tl.constexpr = mean.dtype.element_ty
    distances = tl.zeros([CHUNK, BLOCK], ACC)
    squares = tl.zeros([BLOCK], ACC)
    tl.debug_barrier()  # other threads may have stored the gradient
    for start in range(0, dims, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(z + d, mask=d < dims, other=0).to(ACC)
        inverse = 1 / tl.load(var + d, mask=d < dims, other=1)
        readable = tl.where(k >= 0, dims, 0)[:, None]
        center = tl.load(mean + k[:, None] * dims + d[None, :], mask=d[None, :] < readable, other=0)
        difference = tl.where((k >= 0)[:, None], x[None, :] - center, 0)
        pull = tl.sum(coefficient[:, None] * difference, 0) * inverse * unit
        pull += tl.load(gradient + d, mask=d < tl.where(adds, dims, 0), other=0)
        tl.store(gradient + d, pull, mask=d < dims)
        distances += difference * difference * inverse[None, :]
        squares += pull * pull
    return tl.sum(distances, 1), tl.sum(squares, 0)


@triton.jit(debug=True, do_not_specialize=SIZES_OF_A_BATCH)
def _class_attraction_kernel(
    layers,
    z,
    stride,
    width,
    batch,
    n_classes,
    var,
    unit,
    labels,
    shares,
    own,
    main_weight,
    rivals,
    weight,
    others,
    seen,
    numbers,
    gradient,
    PUSH: tl.constexpr,
    TINY: tl.constexpr,
    EQUAL: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (sample, layer). `debug` keeps the assertion in production, without a host sync."""
    row = tl.program_id(0).to(tl.int64)
    for layer in tl.static_range(len(layers)):
        if tl.program_id(1) == layer:
            mean, dims, first = layers[layer]
            ACC: tl.constexpr = mean.dtype.element_ty
            known = _acts(labels, shares, own, seen, row, EQUAL, ACC)
            energy = tl.zeros([], ACC)
            squares = tl.zeros([], ACC)
            main = tl.full([], INFINITY, ACC)
            rival = tl.full([], INFINITY, ACC)
            largest = tl.zeros([], ACC)
            has_main = 0
            for chunk in range(0, tl.maximum(own + others, 1), CHUNK):
                j = chunk + tl.arange(0, CHUNK)
                k, c, w = _acting(
                    labels, shares, own, rivals, weight, others, row, j, PUSH, EQUAL, ACC
                )
                is_main = (j == 0) & (own > 0) & (k >= 0)
                has_main += tl.sum(is_main.to(tl.int32), 0)
                # One that is not a number is larger than any.
                w = tl.where(w == w, w, INFINITY)
                largest = tl.maximum(largest, tl.max(w, 0))
                tl.device_assert(k < n_classes, "labels, rivals: expected classes below C")
                k = tl.where(known, k, -1)
                c = tl.where(k >= 0, c, 0)
                distance, squares = _attract(
                    z + row * stride + first,
                    mean,
                    dims,
                    var + first,
                    k,
                    c,
                    tl.load(unit + layer),
                    gradient + row * width + first,
                    chunk > 0,
                    CHUNK,
                    BLOCK,
                )
                energy += tl.sum(c * distance, 0)
                # One that is not a number is nearer than any.
                near = tl.where(distance == distance, distance, -INFINITY)
                near = tl.where(k >= 0, near, INFINITY)
                rival = tl.minimum(rival, tl.min(tl.where(j < own, INFINITY, near), 0))
                is_main = is_main & known
                main = tl.minimum(main, tl.min(tl.where(is_main, distance, INFINITY), 0))
            at = numbers + layer * batch + row
            step = len(layers) * batch
            nearest = (main < rival) & (rival < INFINITY)
            tl.store(at, energy / 2 / tl.maximum(dims, 1))
            tl.store(at + step, tl.where(nearest, 1, 0).to(ACC))
            right = (has_main > 0) & (tl.load(main_weight + row) > largest)
            tl.store(at + 2 * step, tl.where(right, 1, 0).to(ACC))
            tl.store(at + 3 * step, tl.where(squares < TINY, tl.full([], TINY, ACC), squares))


def class_attraction(
    z: Tensor,
    mean: Sequence[Tensor],
    var: Tensor,
    unit: Tensor,
    labels: Tensor,
    shares: Tensor,
    own: Tensor,
    rivals: Tensor,
    weight: Tensor,
    seen: Tensor,
    push: float,
) -> tuple[Tensor, Tensor]:
    """Gradient (B, D) and numbers (4, L, B) of z (B, D), as in the reference."""
    batch, width = z.shape
    owners, others = labels.shape[1], rivals.shape[1]
    z = with_unit_stride(z)
    gradient, numbers = scratch(mean[0], batch, width), scratch(mean[0], 4, len(mean), batch)
    if batch == 0:
        return gradient, numbers
    layers = tuple((m.contiguous(), m.shape[1], first) for m, first in side_by_side(mean))
    launch(
        _class_attraction_kernel,
        (batch, len(mean)),
        layers,
        z,
        z.stride(0),
        width,
        batch,
        mean[0].shape[0],
        var.contiguous(),
        unit.contiguous(),
        labels.contiguous(),
        shares.contiguous(),
        owners,
        own.contiguous(),
        rivals.contiguous(),
        weight.contiguous(),
        others,
        seen.contiguous(),
        numbers,
        gradient,
        PUSH=push,
        TINY=torch.finfo(gradient.dtype).tiny,
        EQUAL=shares.shape[1] == 0,
        **tuning.class_attraction(max(m.shape[1] for m in mean), owners + others, mean[0]),
    )
    return gradient, numbers
