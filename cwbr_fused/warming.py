"""Compiles the Triton kernels of a training step ahead of the first one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cwbr_fused.balanced.module import CWBR
from cwbr_fused.inputs import validation
from cwbr_fused.operations.backends import Backend
from cwbr_fused.overlap.loss import loss

# Compiled kernels serve every batch size, so a small one will do.
BATCH = 4


def warm_up(
    num_classes: int,
    widths: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cuda",
    backend: Backend = "auto",
    published: bool = False,
) -> None:
    """Takes a step of `CWBR` on random features, so that training compiles nothing any more.

    The step has a module and tensors of its own: no model, no bank and no random generator changes.
    Triton keeps what it compiled on the disk as well, for later processes. Other batch sizes and
    numbers of groups or pairs need no compilation. Other widths, dtypes and numbers of layers do.

    Args:
        num_classes: C, the columns of the logits.
        widths: D of each layer's vectors, those that one call is given.
        dtype: of features and logits.
        device: of both, with its index where it is not the current one.
        backend: see `cwbr_fused.loss`; all but "triton" have nothing to compile.
        published: the step of `loss`, with its default options, instead of that of `CWBR`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    validation.check_positive_int("num_classes", num_classes)
    for width in widths:
        validation.check_positive_int("widths", width)
    generator = torch.Generator().manual_seed(0)

    def random(columns: int) -> Tensor:
        drawn = torch.randn(BATCH, columns, generator=generator)
        return drawn.to(device, dtype).requires_grad_()

    features = [random(width) for width in widths]
    targets = torch.arange(BATCH, device=device) // 2 % num_classes
    logits = random(num_classes) + sum(z.sum(1, keepdim=True) for z in features)
    if published:
        loss(features, logits, targets, backend=backend).backward()
        return
    cwbr = CWBR(num_classes, backend=backend)
    cwbr(features, logits, targets)
    logits.logsumexp(1).sum().backward()
