"""CWBR as a Lightning callback.

    trainer = Trainer(callbacks=[CWBRCallback(num_classes=200, logits="model")])

A callback cannot change the loss that `training_step` returns, and CWBR does not need to: it acts
on the gradients at the features. So `training_step` stays as it is. The class means are in the
callback's part of the checkpoint; the weights of the LightningModule stay as they were.

Needs the package `lightning` or `pytorch_lightning`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cwbr_fused.balanced.module import CWBR
from cwbr_fused.inputs import validation
from cwbr_fused.inputs.features import FeatureCatcher
from cwbr_fused.integrations import FORMS, Form
from cwbr_fused.overlap.loss import loss as published_loss
from cwbr_fused.overlap.loss import scale_match

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ModuleNotFoundError:
        from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["CWBRCallback"]


def second_of(batch: Any) -> Tensor:
    """The targets of a batch `(inputs, targets)`."""
    targets: Tensor = batch[1]
    return targets


def add_published(
    features: Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    loss: Tensor,
    options: Mapping[str, Any],
) -> Tensor:
    """Adds the gradient of `scale_match(loss, reg)` less that of `loss`, at the features.

    A loss that was scaled, for mixed precision or accumulation, scales the addition as well.

    Returns:
        reg, a scalar without gradient.
    """
    leaves = {name: layer.detach().requires_grad_() for name, layer in features.items()}
    with torch.enable_grad():
        reg = published_loss(leaves, logits, targets, **options)
        objective = options.get("objective", "overlap")
        total = scale_match(loss.detach(), reg, objective=objective)
    added = torch.autograd.grad(total, list(leaves.values()))
    for layer, gradient in zip(features.values(), added, strict=True):
        layer.register_hook(partial(torch.add, gradient))
    return reg.detach()


class CWBRCallback(Callback):
    """Calls `CWBR` before every backward pass of `Trainer.fit`.

    Args:
        num_classes: C, the number of columns of the logits.
        logits: dotted name, in the LightningModule, of the module whose output the logits are.
        layers: dotted names, in the LightningModule, of the layers to regularize. None chooses
            them within the module that `logits` names, as `CWBR.catch` does.
        targets: takes the targets, (B,) classes or (B, C) soft targets, out of the batch that
            `training_step` gets. Default: the second element.
        form: "cwbr", or "published" for the published form, which lowers accuracy where it was
            measured: the gradients are then those of `scale_match(loss, cwbr_fused.loss(...))`.
            It needs `layers`.
        options: keywords of `cwbr_fused.CWBR`, or of `cwbr_fused.loss` for the published form. With
            several processes give `group="world"`.

    The last forward pass before a backward pass counts. Logs `cwbr/energy`, or
    `cwbr/published`, on the module's behalf.

    Raises:
        ValueError: `form` is unknown, or "published" without `layers`.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        logits: str,
        layers: Sequence[str] | None = None,
        targets: Callable[[Any], Tensor] = second_of,
        form: Form = "cwbr",
        **options: Any,
    ) -> None:
        validation.check_choice("form", form, FORMS)
        if form == "published" and layers is None:
            raise ValueError("layers: expected names of layers for the published form, got None")
        self.form, self.options = form, options
        self.cwbr = CWBR(num_classes, **(options if form == "cwbr" else {}))
        self.logits, self.layers, self.targets = logits, layers, targets
        self.features: FeatureCatcher | None = None
        self.outputs: FeatureCatcher | None = None
        self.batch: Any = None

    def state_dict(self) -> dict[str, Any]:
        """What the checkpoint keeps: the class means."""
        return self.cwbr.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes the class means of a checkpoint."""
        self.cwbr.load_state_dict(state_dict)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.outputs = FeatureCatcher(pl_module, [self.logits])
        if self.layers is None:
            self.features = self.cwbr.catch(pl_module.get_submodule(self.logits))
        elif self.form == "cwbr":
            self.features = self.cwbr.catch(pl_module, self.layers)
        else:
            self.features = FeatureCatcher(pl_module, self.layers)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.batch = batch

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        assert self.features is not None
        assert self.outputs is not None
        caught = self.outputs.feats
        if not caught:  # a second backward pass of one forward pass
            return
        logits, targets = caught[self.logits], self.targets(self.batch)
        if self.form == "cwbr":
            pl_module.log_dict({"cwbr/energy": self.cwbr(self.features, logits, targets)})
        else:
            reg = add_published(self.features.feats, logits, targets, loss, self.options)
            pl_module.log_dict({"cwbr/published": reg})
        self._forget()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._forget()

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self._forget()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _forget(self) -> None:
        self.batch = None
        for catcher in (self.features, self.outputs):
            if catcher is not None:
                catcher.clear()

    def _release(self) -> None:
        self._forget()
        for catcher in (self.features, self.outputs):
            if catcher is not None:
                catcher.remove()
        self.features = self.outputs = None
