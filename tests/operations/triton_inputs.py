"""`kernel_inputs` for the Triton kernels: on the GPU where there is one."""

from __future__ import annotations

from functools import partial

import kernel_inputs
import torch
from kernel_inputs import ACCUMULATION_DTYPES, DTYPES, EPS, assert_near

from cwbr_fused.operations import extension

__all__ = [
    "ACCUMULATION_DTYPES",
    "DEVICE",
    "DTYPES",
    "EPS",
    "TRITON",
    "assert_near",
    "classes",
    "planned",
    "rand",
    "randn",
    "symmetric",
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = extension.triton_kernels()

randn = partial(kernel_inputs.randn, device=DEVICE)
rand = partial(kernel_inputs.rand, device=DEVICE)
classes = partial(kernel_inputs.classes, device=DEVICE)
planned = partial(kernel_inputs.planned, device=DEVICE)
symmetric = partial(kernel_inputs.symmetric, device=DEVICE)
