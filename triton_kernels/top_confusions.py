"""The most probable other seen classes of each sample: one pass over the logits, one launch.

A program reads a row block by block. It keeps a running maximum and sum of exp(x - maximum), and
the largest candidates so far: while the largest left in a block exceeds the smallest kept, it takes
that one's place. After the first few blocks a comparison is nearly all that this costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .class_moments import accumulation_dtype
from .common import SIZES_OF_A_BATCH, launch, scratch, with_unit_stride


@triton.jit
def _replace_smallest(kept, kept_class, x, chosen):
    """x in the place of the smallest value kept, of those the one of the largest class."""
    smallest = tl.min(kept, 0)
    out = kept_class == tl.max(tl.where(kept == smallest, kept_class, -1), 0)
    return tl.where(out, x, kept), tl.where(out, chosen, kept_class)


@triton.jit(debug=True, do_not_specialize=SIZES_OF_A_BATCH)
def _top_confusions_kernel(
    logits,
    stride,
    n_classes,
    targets,
    target_stride,
    seen,
    top,
    index,
    weight,
    own,
    KEPT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program b: row b. `debug` keeps the assertion in production, without a host sync."""
    ACC: tl.constexpr = own.dtype.element_ty
    INF: tl.constexpr = float("inf")
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    target = tl.load(targets + row * target_stride).to(tl.int64)
    tl.device_assert((target >= 0) & (target < n_classes), "targets: expected classes in [0, C)")

    slot = tl.arange(0, KEPT)
    # What is beyond `top` no candidate replaces.
    kept = tl.where(slot < top, -INF, INF).to(ACC)
    kept_class = n_classes + slot
    peak = tl.full([], -INF, ACC)
    mass = tl.zeros([], ACC)
    flaw = tl.zeros([], tl.int32)  # 1 where some logit is infinity, 2 where one is NaN
    for first in range(0, n_classes, BLOCK):
        c = first + tl.arange(0, BLOCK)
        x = tl.load(logits + c, mask=c < n_classes, other=-INF).to(ACC)
        flaw = tl.maximum(flaw, tl.max(tl.where(x < INF, 0, tl.where(x == INF, 1, 2)), 0))
        x = tl.where(x < INF, x, -INF)
        largest = tl.max(x, 0)
        higher = tl.maximum(peak, largest)
        # Where everything so far is -inf the sum is 0, not exp(-inf - -inf).
        shift = tl.where(higher == -INF, 0, higher)
        mass = mass * tl.exp(peak - shift) + tl.sum(tl.exp(x - shift), 0)
        peak = higher
        if largest > tl.min(kept, 0):
            candidate = tl.load(seen + c, mask=c < n_classes, other=0) & (c != target)
            x = tl.where(candidate, x, -INF)
            largest = tl.max(x, 0)
            while largest > tl.min(kept, 0):
                chosen = tl.min(tl.where(x == largest, c, n_classes), 0)
                kept, kept_class = _replace_smallest(kept, kept_class, largest, chosen)
                x = tl.where(c == chosen, -INF, x)
                largest = tl.max(x, 0)

    at_own = tl.load(logits + target).to(ACC)
    probability = tl.exp(at_own - peak) / mass
    # A finite logit has probability 0 beside infinity; nothing is known of any other.
    beside = tl.where(at_own < INF, 0.0, float("nan"))
    probability = tl.where(flaw == 1, beside, probability)
    tl.store(own + row, tl.where(flaw == 2, float("nan"), probability))

    kept = tl.where((slot < top) & (flaw == 0), kept, -INF)
    for j in range(0, top):
        largest = tl.max(kept, 0)
        chosen = tl.min(tl.where(kept == largest, kept_class, n_classes + KEPT), 0)
        found = largest > -INF
        tl.store(index + row * top + j, tl.where(found, chosen, -1).to(tl.int64))
        tl.store(weight + row * top + j, tl.where(found, tl.exp(largest - peak) / mass, 0))
        kept = tl.where(kept_class == chosen, -INF, kept)


def top_confusions(
    logits: Tensor, targets: Tensor, seen: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Classes (B, J) of logits (B, C), their probabilities, and those of the targets (B,)."""
    batch, n_classes = logits.shape
    top = max(0, min(top, n_classes - 1))
    logits = with_unit_stride(logits)
    dtype = accumulation_dtype(logits.dtype)
    index = scratch(logits, batch, top, dtype=torch.int64)
    weight = scratch(logits, batch, top, dtype=dtype)
    own = scratch(logits, batch, dtype=dtype)
    launch(
        _top_confusions_kernel,
        (batch,),
        logits,
        logits.stride(0),
        n_classes,
        targets,
        targets.stride(0),
        seen.contiguous(),
        top,
        index,
        weight,
        own,
        KEPT=triton.next_power_of_2(max(top, 1)),
        **tuning.top_confusions(n_classes),
    )
    return index, weight, own
