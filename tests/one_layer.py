"""The bank operations as for one layer, on plain tensors: what most of their tests need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_inputs import flat, map_tensors
from torch import Tensor

from cwbr_fused.operations import reference_bank

# How many arguments are lists of a tensor for each layer.
LISTS = {"observe_classes": 4, "follow_classes": 2}


@dataclass(frozen=True)
class OneLayer:
    """Takes one tensor where an operation takes a list, and leaves out the dimension of layers.

    Args:
        operations: called by name, `operations(name, *arguments)`.
        device: of its tensors.
    """

    operations: Any
    device: str = "cpu"

    def __call__(self, name: str, *arguments: Any) -> Any:
        if name == "class_attraction":
            return self._attraction(*arguments)
        if name not in LISTS:
            return self.operations(name, *arguments)
        lists, rest = arguments[: LISTS[name]], list(arguments[LISTS[name] :])
        if name == "follow_classes":
            rest[1] = rest[1][None]  # the weights
            return self.operations(name, *([a] for a in lists), *rest)
        weight, metric, _ = self.operations(name, *([a] for a in lists), *rest)
        return weight[0], metric

    def _attraction(
        self, z: Tensor, mean: Tensor, var: Tensor, index: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Energy (B,) and gradient (B, D) of classes that act with any coefficients."""
        nobody, no_share = index[:, :0], coefficient[:, :0]
        own = coefficient.new_zeros(len(index))
        seen = torch.ones(len(mean), dtype=torch.bool, device=mean.device)
        acting = nobody, no_share, own, index, coefficient, seen, -1.0
        unit = mean.new_ones(1)
        gradient, numbers = self.operations("class_attraction", z, [mean], var, unit, *acting)
        return numbers[0, 0] * z.shape[1], gradient

    def outcome(self, name: str, *arguments: Any) -> list[Tensor]:
        """The results, and copies of the arguments that operation `name` writes."""
        given = [map_tensors(Tensor.clone, a) for a in arguments]
        writes = {"observe_classes": (2, 3), "follow_classes": (0, 1)}.get(name, ())
        return [*flat(self(name, *given)), *(given[i] for i in writes)]


def _reference(name: str, *arguments: Any) -> Any:
    return getattr(reference_bank, name)(*arguments)


REFERENCE = OneLayer(_reference)
