"""The training objectives by name. A new one is a `Method` and a line in METHODS.

A method may hold state in buffers: it is saved with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor, nn

import cwbr_fused


class Terms(NamedTuple):
    """The loss to differentiate, and what the log shows of it."""

    total: Tensor
    logged: dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What a method may depend on. `shared`: all processes measure the same class statistics."""

    num_classes: int
    layers: tuple[str, ...]
    pool: Callable[[Tensor], Tensor]
    top_m: int | None
    backend: Literal["auto", "cpu", "cuda", "triton", "reference"]
    shared: bool = False


class Method(nn.Module):
    """Cross-entropy alone: the baseline, and what the others build on."""

    columns: tuple[str, ...] = ()

    def catch(self, model: nn.Module, layers: Sequence[str]) -> cwbr_fused.FeatureCatcher:
        """Catches what `forward` gets; called once, before the model is compiled."""
        return cwbr_fused.FeatureCatcher(model, layers)

    def forward(
        self, features: Mapping[str, Tensor], logits: Tensor, targets: Tensor, ce: Tensor
    ) -> Terms:
        """Called between forward and backward pass.

        Args:
            features: the raw outputs of the layers, which the model itself goes on with.
            logits: (B, C).
            targets: (B,) classes, or (B, C) of mixed images.
            ce: the cross-entropy.
        """
        return Terms(ce, {})

    def after_backward(self) -> dict[str, float]:
        """What the log shows of the latest backward pass."""
        return {}


class Balanced(Method):
    """The recommended form: cross-entropy, with gradients added on its way back."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.columns = ("energy", *(f"pull {layer}" for layer in setting.layers))
        self.regularizer = cwbr_fused.CWBR(
            setting.num_classes,
            pool=setting.pool,
            backend=setting.backend,
            group="world" if setting.shared else None,
        )

    def catch(self, model: nn.Module, layers: Sequence[str]) -> cwbr_fused.FeatureCatcher:
        return self.regularizer.catch(model, layers)

    def forward(
        self, features: Mapping[str, Tensor], logits: Tensor, targets: Tensor, ce: Tensor
    ) -> Terms:
        return Terms(ce, {"energy": self.regularizer(features, logits, targets)})

    def after_backward(self) -> dict[str, float]:
        """The length of the gradient that was added at each layer, as a share of the loss's own."""
        return {
            f"pull {layer}": norms["reg_norm"] / norms["ce_norm"] if norms["ce_norm"] > 0 else 0.0
            for layer, norms in self.regularizer.health().items()
        }


class Published(Method):
    """The published regularizer, weighted to the value of the cross-entropy."""

    columns = ("regularizer", "scale")

    def __init__(self, setting: Setting, objective: Literal["overlap", "log_overlap"]) -> None:
        super().__init__()
        self.objective, self.pool = objective, setting.pool
        self.regularizer = cwbr_fused.ConfusionWeightedBhatReg(
            setting.layers,
            setting.top_m,
            objective=objective,
            backend=setting.backend,
            group="world" if setting.shared else None,
        )

    def forward(
        self, features: Mapping[str, Tensor], logits: Tensor, targets: Tensor, ce: Tensor
    ) -> Terms:
        vectors = {name: self.pool(feature) for name, feature in features.items()}
        reg = self.regularizer(vectors, logits, targets)
        total = cwbr_fused.scale_match(ce, reg, objective=self.objective)
        scale = ce / (reg + 1e-6) if self.objective == "overlap" else ce
        return Terms(total, {"regularizer": reg, "scale": scale})


METHODS: dict[str, Callable[[Setting], Method]] = {
    "ce": lambda setting: Method(),
    "cwbr": Balanced,
    "published": lambda setting: Published(setting, "overlap"),
    "published_log": lambda setting: Published(setting, "log_overlap"),
}
MEANINGS = (
    "ce: cross-entropy alone. cwbr: the recommended form. published, and with a logarithm "
    "published_log: the published form, which harms training; here to be compared with"
)
