"""The regularizer as a module, for features caught by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from cwbr_fused.inputs import validation
from cwbr_fused.operations import backends
from cwbr_fused.overlap.adjustments import Shrinkage, Temperature
from cwbr_fused.overlap.loss import loss
from cwbr_fused.overlap.silence import HealthCheck, causes_in_batch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ConfusionWeightedBhatReg(nn.Module):
    """`cwbr_fused.loss` over the named layers of a mapping of features.

        catcher = FeatureCatcher()
        catcher.add(model.layer3, "layer3").add(model.layer4, "layer4")
        regularizer = ConfusionWeightedBhatReg(["layer3", "layer4"])
        logits = model(images)
        reg = regularizer(catcher.feats, logits, targets)

    Args:
        layer_names: keys of the features to use; others are ignored.
        top_m, eps, min_count, objective, backend, group, temperature, shrinkage, noise_floor: see
            `cwbr_fused.loss`. A module that is to be copied or pickled wants group="world": a
            ProcessGroup is bound to its process.
        check_every: warns of a regularizer without effect (`cwbr_fused.overlap.silence`) by a look
            at the first training call and at every so-many-th, which alone wait for the device;
            None for no look. Under torch.compile and in CUDA graphs there is none.
    """

    def __init__(
        self,
        layer_names: Sequence[str],
        top_m: int | None = 64,
        eps: float = 1e-6,
        *,
        min_count: int = 2,
        objective: str = "overlap",
        backend: str = "auto",
        group: ProcessGroup | Literal["world"] | None = None,
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
        validation.check_options(top_m, eps, objective, min_count)
        validation.check_adjustment(temperature, shrinkage, noise_floor, min_count)
        validation.check_group(group)
        backends.check(backend)
        self.layer_names = tuple(layer_names)
        self.top_m, self.eps, self.min_count = top_m, eps, min_count
        self.objective, self.backend, self.group = objective, backend, group
        self.temperature, self.shrinkage, self.noise_floor = temperature, shrinkage, noise_floor
        self._health = HealthCheck(check_every)

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
        options: dict[str, Any] = {
            "top_m": self.top_m,
            "min_count": self.min_count,
            "eps": self.eps,
            "objective": self.objective,
            "backend": self.backend,
            "group": self.group,
            "temperature": self.temperature,
            "shrinkage": self.shrinkage,
            "noise_floor": self.noise_floor,
        }
        value = loss(layers, logits, y, **options)
        if self.training and self._health.due(value):
            self._health.warn(causes_in_batch(value, layers, logits, y, **options))
        return value

    def extra_repr(self) -> str:
        return (
            f"layer_names={self.layer_names}, top_m={self.top_m}, eps={self.eps}, "
            f"min_count={self.min_count}, objective={self.objective!r}, backend={self.backend!r}, "
            f"temperature={self.temperature!r}, shrinkage={self.shrinkage!r}, "
            f"noise_floor={self.noise_floor}, check_every={self._health.check_every}"
        )
