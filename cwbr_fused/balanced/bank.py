"""What `CWBR` remembers of each layer: a mean for every class, and the variances they share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cwbr_fused.operations.reference import accumulation_dtype
from cwbr_fused.operations.reference_bank import floored

# The moving average of the variances; about how many updates they remember is 1 / (1 - this).
VARIANCE_MOMENTUM = 0.95
# Keeps dimensions that hardly vary from dominating: a share of the mean variance of the layer.
VARIANCE_FLOOR = 1e-3


class ClassBank(nn.Module):
    """Exponential moving class means of one layer, for all C classes, and a pooled variance.

    Memory is C (D + 1) + D numbers; nothing is ever C x C. A class's mean is the plain average of
    its samples until that moves slower than `1 - momentum` per update. The variance is that of
    samples about the mean their class had before them, so one sample per class is enough. Samples
    that are not finite, or whose squares are not, change nothing.

    Args:
        num_classes: C.
        dims: D.
        factory: device and dtype.

    Buffers, float32 (float64 after `.double()`; `.half()` and `.bfloat16()` leave them as they
    are, since what they sum up would be lost):
        mean: (C, D).
        count: (C,) samples seen of each class.
        var: (D,), 0 until a class occurs for the second time.
        updates: scalar, how often `var` was updated.
    """

    mean: Tensor
    count: Tensor
    var: Tensor
    updates: Tensor

    def __init__(self, num_classes: int, dims: int, **factory: Any) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_classes, dims, **factory))
        self.register_buffer("count", torch.zeros(num_classes, **factory))
        self.register_buffer("var", torch.zeros(dims, **factory))
        self.register_buffer("updates", torch.zeros((), **factory))

    def is_empty(self) -> bool:
        """Whether it has seen no sample; waits for the device."""
        return self.count.is_meta or not bool(self.count.any())

    @torch.no_grad()
    def clear(self) -> None:
        """Forgets everything."""
        for buffer in self.buffers():
            buffer.zero_()

    def metric(self) -> Tensor:
        """(D,) the variances with a floor, all > 0; 1 while there are none."""
        return floored(self.var, VARIANCE_FLOOR)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassBank:
        def in_accumulation_dtype(buffer: Tensor) -> Tensor:
            changed = fn(buffer)
            sufficient = accumulation_dtype(changed.dtype) == changed.dtype
            return changed if sufficient else buffer.to(changed.device)

        super()._apply(in_accumulation_dtype, recurse)
        return self
