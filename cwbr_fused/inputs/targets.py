"""Targets in one form, made once at the door: the classes of each sample and their shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cwbr_fused.inputs import validation
from cwbr_fused.operations.reference import accumulation_dtype

MOST = 4  # Classes of one sample: mixup and CutMix mix two images, mosaics four.
LEAST = 0.1  # Of a row's mass, what must lie above its floor to say anything.


class Targets(NamedTuple):
    """Which classes each sample belongs to.

    labels: (B, S) int64; S = 1 for class indices.
    shares: (B, S) >= 0 in an accumulation dtype, of falling size; zeros for an unlabelled sample.
        None for class indices, where each sample belongs to its class alone.
    """

    labels: Tensor
    shares: Tensor | None


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
    return Targets(targets.long()[:, None], None)


def read_soft(targets: Tensor) -> Targets:
    """What soft targets (B, C) say: the classes above the uniform floor of each row.

    Label smoothing raises all classes of a row alike, which says nothing of any of them. So the
    floor is taken off, up to `MOST` classes are left, and they share the mass of the row in
    proportion to what they had above the floor: smoothed labels become the labels, and rows of
    mixup and CutMix stay what they are. A row that is all floor, or nearly, is an unlabelled
    sample.
    """
    given = targets.detach().to(accumulation_dtype(targets.dtype))
    columns = given.shape[1]
    values, labels = given.topk(min(MOST + 1, columns), dim=1)
    most = min(MOST, max(columns - 1, 1))
    # The smallest value of the row, or the largest of those that have no place: none of a tie has.
    floor = values[:, -1:] if columns > 1 else torch.zeros_like(values)
    rounding = 8 * torch.finfo(targets.dtype).eps * floor
    above = values[:, :most] - floor
    above = torch.where(above > rounding, above, 0)
    mass, total = given.sum(1, keepdim=True), above.sum(1, keepdim=True)
    share = torch.where(total > LEAST * mass, mass / total, 0)
    return Targets(labels[:, :most], above * share)
