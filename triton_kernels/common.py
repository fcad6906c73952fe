"""What the kernels share: launch glue on the host, small arithmetic on the device.

The kernels index with int64 wherever a product of two sizes is formed, skip empty groups
themselves and have static launch grids, so nothing here or beside it waits for the device.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning

LOG_2 = tl.constexpr(0.6931471805599453)

# Arguments that differ from batch to batch. Triton would compile a kernel again where one of them
# is 1 or a multiple of 16; as it is, one binary serves all of them.
SIZES_OF_A_BATCH = (
    "batch",
    "blocks",
    "groups",
    "n_copies",
    "n_pairs",
    "n_tiles",
    "parts",
    "slices_per_program",
    "top_m",
)


def with_unit_stride(x: Tensor) -> Tensor:
    """x (N, D) itself where its rows are contiguous (whatever their stride), else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def require_contiguous(**written: Tensor) -> None:
    """Raises ValueError for a tensor, to be written in place, that is not contiguous."""
    for name, x in written.items():
        if not x.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor, got strides {x.stride()}")


def scratch(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised memory of `shape` on the device of `like`."""
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Start `kernel` on the device of its tensors, which need not be the current one.

    Products and sums are fused whatever this Triton's default is. Kernels with assertions do not
    get Triton's checks of integer overflow as well.
    """
    on = next(arg for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device_of(on):
        kernel[grid](*args, enable_fp_fusion=True, sanitize_overflow=False, **options)


def side_by_side(layers: Sequence[Tensor]) -> list[tuple[Tensor, int]]:
    """Each layer's matrix, and its first column in one that has the columns of all of them."""
    ends = list(itertools.accumulate(m.shape[1] for m in layers))
    return list(zip(layers, [0, *ends], strict=False))


@triton.jit
def last_to_arrive(counter):
    """Whether this is the last of all programs to get here; all they stored is then visible.

    `counter` must hold 0 when the kernel starts.
    """
    everyone = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    return last_of(everyone, counter)


@triton.jit
def last_of(programs, counter):
    """The same of so many programs that share a counter."""
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    return arrived == programs - 1


@triton.jit
def sum_of(values, size, BLOCK: tl.constexpr, CACHE: tl.constexpr):
    """The sum of `size` numbers, in an order that BLOCK alone decides; CACHE as in `tl.load`."""
    total = tl.zeros([BLOCK], values.dtype.element_ty)
    for first in range(0, size, BLOCK):
        i = first + tl.arange(0, BLOCK)
        total += tl.load(values + i, mask=i < size, other=0, cache_modifier=CACHE)
    return tl.sum(total, 0)


@triton.jit
def eighth(var, EPS: tl.constexpr):
    """u/8 for u = var + eps: the sum of two has a normal reciprocal however large var is."""
    return var * 0.125 + EPS * 0.125


def approximate(x: Tensor) -> bool:
    """Whether the hardware's approximate float32 reciprocal and logarithm are to be used."""
    return x.dtype == torch.float32 and tuning.architecture(x.device).startswith("cuda")


@triton.jit
def fast_reciprocal(x, APPROXIMATE: tl.constexpr):
    """1/x for a normal x; relative error at most 2^-23 where APPROXIMATE."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1 / x


@triton.jit
def fast_log2(x, APPROXIMATE: tl.constexpr):
    """log2(x) for x in [0.5, 2]; absolute error at most 2^-22 where APPROXIMATE."""
    if APPROXIMATE:
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.log2(x)


@triton.jit
def log1p_of_scaled(scaled, BITS: tl.constexpr, APPROXIMATE: tl.constexpr):
    """log(1 + x) for x = scaled * 2^BITS >= 0, also where 1 + x rounds or overflows.

    With y = 1 + x, (x - (y - 1))/y is what rounding lost.
    """
    x = scaled * 2.0**BITS
    y = 1 + x
    lost = tl.where(x < 1, (x - (y - 1)) * fast_reciprocal(y, APPROXIMATE), 0)
    is_large = scaled > 1
    return tl.log(tl.where(is_large, scaled, y)) + tl.where(is_large, BITS * LOG_2, lost)
