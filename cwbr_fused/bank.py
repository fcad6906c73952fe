"""What `CWBR` remembers of each layer: a mean for every class, and the variances they share."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# The moving average of the variances; about how many updates they remember is 1 / (1 - this).
VARIANCE_MOMENTUM = 0.95
# Keeps dimensions that hardly vary from dominating: a share of the mean variance of the layer.
VARIANCE_FLOOR = 1e-3


class Move(NamedTuple):
    """How far a batch's class means are from the bank's."""

    rows: Tensor  # (K,) classes
    size: Tensor  # (K,) their weights; 0 for those to leave alone
    difference: Tensor  # (K, D)


class ClassBank(nn.Module):
    """Exponential moving class means of one layer, for all C classes, and a pooled variance.

    Memory is C (D + 1) + D numbers; nothing is ever C x C. A class's mean is the plain average of
    its samples until that moves slower than `1 - momentum` per update. The variance is that of
    samples about the mean their class had before them, so one sample per class is enough. Samples
    that are not finite, or whose squares are not, change nothing.

    Args:
        num_classes: C.
        dims: D.
        momentum: how much of a mean is kept when its class occurs again.

    Buffers, float32 (float64 after `.double()`):
        mean: (C, D).
        count: (C,) samples seen of each class.
        var: (D,), 0 until a class occurs for the second time.
        updates: scalar, how often `var` was updated.
    """

    mean: Tensor
    count: Tensor
    var: Tensor
    updates: Tensor

    def __init__(self, num_classes: int, dims: int, momentum: float, **factory: Any) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(num_classes, dims, **factory))
        self.register_buffer("count", torch.zeros(num_classes, **factory))
        self.register_buffer("var", torch.zeros(dims, **factory))
        self.register_buffer("updates", torch.zeros((), **factory))

    def metric(self) -> Tensor:
        """(D,) the variances with a floor, all > 0; 1 while there are none."""
        level = self.var.mean()
        floor = VARIANCE_FLOOR * level + torch.finfo(self.var.dtype).tiny
        return torch.where(level > 0, self.var + floor, 1)

    @torch.no_grad()
    def observe(self, classes: Tensor, size: Tensor, mean: Tensor, var: Tensor) -> Move:
        """Updates the variance from the moments of a batch; the means move by `follow`.

        Args:
            classes: (K,) int64, distinct but for negative ones, which are left out.
            size: (K,) how many samples, or how much weight, of each.
            mean, var: (K, D) of the samples of each; variances may be 0.

        Returns:
            The moves of the means that are due.
        """
        # Nor may a later difference to this mean, whose square is at most 4 of these, overflow.
        finite = (4 * torch.addcmul(var, mean, mean).sum(1)).isfinite()
        usable = (classes >= 0) & (size > 0) & finite
        size = torch.where(usable, size, 0).to(self.count.dtype)
        rows = classes.clamp(min=0)
        difference = mean - self.mean.index_select(0, rows)
        difference.masked_fill_(~usable[:, None], 0)

        known = torch.where(self.count.index_select(0, rows) > 0, size, 0)
        total = known.sum()
        any_known = (total > 0).to(total.dtype)
        scatter = torch.addcmul(var, difference, difference)
        scatter.masked_fill_(known[:, None] == 0, 0)  # 0 times what is not finite is not 0
        now = (known / (total + (1 - any_known))) @ scatter
        self.updates += any_known
        pace = (1 / self.updates.clamp(min=1)).clamp(min=1 - VARIANCE_MOMENTUM)
        self.var.lerp_(now, any_known * pace)
        return Move(rows, size, difference)

    @torch.no_grad()
    def follow(self, move: Move) -> None:
        """Moves the means towards those of the batch."""
        size = move.size
        self.count.index_add_(0, move.rows, size)
        total = self.count[move.rows]
        rate = torch.where(size > 0, (size / total.clamp(min=1)).clamp(min=1 - self.momentum), 0)
        self.mean.index_add_(0, move.rows, rate[:, None] * move.difference)
