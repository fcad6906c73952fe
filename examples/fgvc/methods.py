"""The training objectives by name. A new one is a module with this forward and a line in METHODS.

A method may hold state (buffers): it is saved with the checkpoint. Its `forward` gets the raw
features by layer, which the model itself goes on with, between forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import cwbr_fused


class Terms(NamedTuple):
    """The loss to differentiate, and what it is made of."""

    total: Tensor
    regularizer: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Setting:
    """What a method may depend on."""

    num_classes: int
    layers: tuple[str, ...]
    pool: Callable[[Tensor], Tensor]
    top_m: int | None
    backend: str


class CrossEntropy(nn.Module):
    """Cross-entropy alone: the baseline."""

    def forward(
        self, features: Mapping[str, Tensor], logits: Tensor, targets: Tensor, ce: Tensor
    ) -> Terms:
        zero = torch.zeros_like(ce)
        return Terms(ce, zero, zero)


class Bhattacharyya(nn.Module):
    """The published regularizer, weighted to the value of the cross-entropy."""

    def __init__(self, setting: Setting, objective: str) -> None:
        super().__init__()
        self.objective, self.pool = objective, setting.pool
        self.regularizer = cwbr_fused.ConfusionWeightedBhatReg(
            setting.layers, setting.top_m, objective=objective, backend=setting.backend
        )

    def forward(
        self, features: Mapping[str, Tensor], logits: Tensor, targets: Tensor, ce: Tensor
    ) -> Terms:
        vectors = {name: self.pool(feature) for name, feature in features.items()}
        reg = self.regularizer(vectors, logits, targets)
        total = cwbr_fused.scale_match(ce, reg, objective=self.objective)
        scale = ce / (reg + 1e-6) if self.objective == "overlap" else ce
        return Terms(total, reg, scale)


class Balanced(nn.Module):
    """The recommended form: cross-entropy, with gradients added on its way back."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.regularizer = cwbr_fused.CWBR(
            setting.num_classes, pool=setting.pool, backend=setting.backend
        )

    def forward(
        self, features: Mapping[str, Tensor], logits: Tensor, targets: Tensor, ce: Tensor
    ) -> Terms:
        energy = self.regularizer(features, logits, targets)
        return Terms(ce, energy, torch.zeros_like(ce))


METHODS: dict[str, Callable[[Setting], nn.Module]] = {
    "ce": lambda setting: CrossEntropy(),
    "cwbr": Balanced,
    "plain": lambda setting: Bhattacharyya(setting, "overlap"),
    "log_overlap": lambda setting: Bhattacharyya(setting, "log_overlap"),
}
