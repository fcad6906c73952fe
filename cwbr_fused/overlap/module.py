"""The regularizer as a module, for features caught by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from cwbr_fused.inputs import validation
from cwbr_fused.operations.backends import Backend
from cwbr_fused.operations.distributed import Group
from cwbr_fused.overlap.loss import loss_with
from cwbr_fused.overlap.options import Objective, OverlapOptions, Shrinkage, Temperature
from cwbr_fused.overlap.silence import SilenceCheck, causes_in_batch


class ConfusionWeightedBhatReg(nn.Module):
    """The published regularizer: faithful to its formula, not recommended for training; use `CWBR`.

    This module computes `cwbr_fused.loss` of the named layers in a mapping of features, for study
    and comparison. Training with it lowered accuracy in every setting that was measured.

        catcher = FeatureCatcher()
        catcher.add(model.layer3, "layer3").add(model.layer4, "layer4")
        regularizer = ConfusionWeightedBhatReg(["layer3", "layer4"])
        logits = model(images)
        reg = regularizer(catcher.feats, logits, targets)

    Args:
        layer_names: keys of the features to use; others are ignored.
        top_m, eps, min_count, objective, backend, group, temperature, shrinkage, noise_floor: see
            `cwbr_fused.loss`. Give group="world" to a module that will be copied or pickled: a
            ProcessGroup is bound to its process.
        check_every: how often a training call is examined for a regularizer without effect
            (`cwbr_fused.overlap.silence`): the first call and every `check_every`-th after it. Only
            these calls wait for the device. None for no examination; there is none under
            torch.compile and in CUDA graphs either.
    """

    def __init__(
        self,
        layer_names: Sequence[str],
        top_m: int | None = 64,
        eps: float = 1e-6,
        *,
        min_count: int = 2,
        objective: Objective = "overlap",
        backend: Backend = "auto",
        group: Group = None,
        temperature: Temperature = None,
        shrinkage: Shrinkage = None,
        noise_floor: bool = False,
        check_every: int | None = 100,
    ) -> None:
        super().__init__()
        if isinstance(layer_names, str) or not all(isinstance(n, str) for n in layer_names):
            raise TypeError(f"layer_names: expected a sequence of names, got {layer_names!r}")
        if len(layer_names) == 0 or len(set(layer_names)) != len(layer_names):
            raise ValueError(f"layer_names: expected distinct names, got {layer_names!r}")
        self.layer_names = tuple(layer_names)
        self.options = OverlapOptions(
            top_m, min_count, eps, objective, backend, group, temperature, shrinkage, noise_floor
        ).check()
        self._silence = SilenceCheck(check_every)

    def forward(self, features: Mapping[str, Tensor], logits: Tensor, y: Tensor) -> Tensor:
        """The regularizer, a scalar.

        Args:
            features: raw layer outputs by name, such as `FeatureCatcher().feats`.
            logits: (B, C).
            y: (B,) integer classes, or (B, C) soft targets.

        Raises:
            ValueError: a layer is missing from `features`.
        """
        if not isinstance(features, Mapping):
            raise TypeError(
                f"features: expected a mapping of tensors, got {validation.describe(features)}"
            )
        missing = [name for name in self.layer_names if name not in features]
        if missing:
            raise ValueError(f"features: expected layers {missing}, got {sorted(features)}")
        layers = {name: features[name] for name in self.layer_names}
        value = loss_with(layers, logits, y, self.options)
        if self.training and self._silence.due(value):
            self._silence.warn(causes_in_batch(value, layers, logits, y, self.options))
        return value

    def extra_repr(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self.options).items())
        return f"{self.layer_names}, {options}, check_every={self._silence.check_every}"
