"""The banks of all layers in one go: what they measure of a batch, and how they learn from it.

The layers share classes, sizes and probabilities; only their widths differ. So their vectors stand
side by side, and each operation runs once whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cwbr_fused.balanced.bank import VARIANCE_FLOOR, VARIANCE_MOMENTUM, ClassBank
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.operations.reference import accumulation_dtype


class Acting(NamedTuple):
    """The classes that act on each sample; see `reference_bank.class_attraction`."""

    labels: Tensor
    shares: Tensor
    own: Tensor
    rivals: Tensor
    weight: Tensor
    seen: Tensor

    def to(self, dtype: torch.dtype) -> Acting:
        """The same with weights of this dtype."""
        weights = {name: getattr(self, name).to(dtype) for name in ("shares", "own", "weight")}
        return self._replace(**weights)


class Moments(NamedTuple):
    """What a batch has of its classes.

    classes, size: (K,) int64, -1 for none, and how many samples or how much weight of each.
    mean, var: (K, D) all layers side by side.
    """

    classes: Tensor
    size: Tensor
    mean: Tensor
    var: Tensor


class Together:
    """Layers whose banks have one dtype.

    Args:
        banks: the bank of each layer by its name.
        vectors: (B, D_l) of each layer.

    Attributes:
        z: (B, D) all of them side by side, in a dtype that is accumulated in that of the banks.
    """

    def __init__(self, banks: Mapping[str, ClassBank], vectors: Mapping[str, Tensor]) -> None:
        self.names, self.banks = list(banks), list(banks.values())
        parts = [vectors[name].detach() for name in banks]
        z = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        dtype = self.banks[0].mean.dtype
        self.z = z if accumulation_dtype(z.dtype) == dtype else z.to(dtype)

    def measure(
        self, acting: Acting, push: float, moments: Moments | None, momentum: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        """The gradients of the energies (B, D), and numbers (4, L, B) of layers and samples.

        As of `reference_bank.class_attraction`, without units. With moments the banks learn from
        them, the variances first and the means last.
        """
        operations = OPERATIONS[backend]
        mean, count = [b.mean for b in self.banks], [b.count for b in self.banks]
        if moments is None:
            var = torch.cat([bank.metric() for bank in self.banks])
            unit = var.new_ones(len(mean))
        else:
            classes, size, *of_batch = moments
            settings = VARIANCE_MOMENTUM, VARIANCE_FLOOR
            moves, var, unit = operations.observe_classes(
                mean,
                count,
                [b.var for b in self.banks],
                [b.updates for b in self.banks],
                classes,
                size.to(mean[0].dtype),
                *of_batch,
                *settings,
            )
        acting = acting.to(mean[0].dtype)
        pull, numbers = operations.class_attraction(self.z, mean, var, unit, *acting, push)
        if moments is not None:
            operations.follow_classes(mean, count, classes, moves, moments.mean, momentum)
        return pull, numbers

    def split(self, matrix: Tensor, factor: Tensor | None = None) -> tuple[Tensor, ...]:
        """The columns of each layer in a matrix (B, D), times its factor (L,)."""
        widths = [bank.mean.shape[1] for bank in self.banks]
        if factor is not None:
            # Views side by side: one launch, where a product for each layer would be several.
            parts = zip(factor.unbind(), widths, strict=True)
            matrix = matrix * torch.cat([f.expand(width) for f, width in parts])
        columns: tuple[Tensor, ...] = matrix.split(widths, 1)
        return columns


def grouped(banks: Mapping[str, ClassBank], vectors: Mapping[str, Tensor]) -> list[Together]:
    """The layers by the dtype of their banks, which is one as a rule."""
    dtypes = dict.fromkeys(bank.mean.dtype for bank in banks.values())
    return [
        Together({name: b for name, b in banks.items() if b.mean.dtype == dtype}, vectors)
        for dtype in dtypes
    ]
