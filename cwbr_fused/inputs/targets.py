"""Targets in one form, read once when a call begins: the classes of each sample, their shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cwbr_fused.inputs import validation
from cwbr_fused.operations.reference import accumulation_dtype

MOST = 4  # Classes of one sample: mixup and CutMix mix two images, mosaics four.
LEAST = 0.1  # A row with a smaller part of its mass above its floor is unlabelled.


class Targets(NamedTuple):
    """Which classes each sample belongs to.

    labels: (B, S) int64; S = 1 for class indices.
    shares: (B, S) >= 0 in an accumulation dtype, in falling order; zeros for an unlabelled sample.
        None for class indices, where each sample belongs to its class alone.
    """

    labels: Tensor
    shares: Tensor | None

    @property
    def main(self) -> Tensor:
        """(B,) the class of largest share of each sample."""
        # Indexing with [:, 0] asks fake CUDA tensors for a device.
        return self.labels.select(1, 0)


def read_targets(logits: Tensor, targets: Tensor) -> Targets:
    """The targets of a batch, checked against its logits (B, C).

    Args:
        targets: (B,) integer classes in [0, C), or soft targets (B, C); see `read_soft`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(targets, Tensor) and targets.dim() == 2 and targets.dtype.is_floating_point:
        validation.check_soft_batch(logits, targets)
        return read_soft(targets)
    validation.check_batch(logits, targets)
    return Targets(targets.long().unsqueeze(1), None)


def read_soft(targets: Tensor) -> Targets:
    """What soft targets (B, C) say: the classes above the uniform floor of each row.

    Label smoothing raises all classes of a row alike, which says nothing about any of them. So the
    floor of the row is subtracted, at most `MOST` classes are kept, and these share the mass of the
    row in proportion to what they had above the floor. Smoothed labels become the labels again, and
    rows of mixup and CutMix remain what they are. A row that is all floor, or nearly all, is an
    unlabelled sample.
    """
    given = targets.detach().to(accumulation_dtype(targets.dtype))
    columns = given.shape[1]
    values, labels = given.topk(min(MOST + 1, columns), dim=1)
    most = min(MOST, max(columns - 1, 1))
    # The smallest value of the row, or the largest that is not kept, so that a tie is kept whole
    # or not at all.
    floor = values[:, -1:] if columns > 1 else torch.zeros_like(values)
    rounding = 8 * torch.finfo(targets.dtype).eps * floor
    above = values[:, :most] - floor
    above = torch.where(above > rounding, above, 0)
    mass, total = given.sum(1, keepdim=True), above.sum(1, keepdim=True)
    share = torch.where(total > LEAST * mass, mass / total, 0)
    return Targets(labels[:, :most], above * share)
