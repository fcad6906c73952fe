"""The optimizer, and what is done around its step: schedule, scaling, clipping, averaging."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fgvc.models import classifier
from fgvc.options import Options
from fgvc.packages import require
from fgvc.randomness import seeded

AMP = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def learning_rate_factor(step: int, total: int, warmup: int | None = None) -> float:
    """Linear warm-up, over a twentieth of the steps if not told, then half a cosine to zero."""
    warmup = max(1, total // 20 if warmup is None else warmup)
    if step < warmup:
        return (step + 1) / warmup
    return (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup))) / 2


class Optimization:
    """Turns gradients into steps of the model. Its state_dict is all that a resumed run needs."""

    def __init__(
        self, options: Options, model: nn.Module, total: int, device: torch.device
    ) -> None:
        self.model, self.clip, self._device = model, options.clip, device
        self._amp = options.amp
        self.optimizer = _optimizer(options, model)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, total, options.warmup)
        )
        self._scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")

    @property
    def rate(self) -> float:
        """The learning rate of the next step, of all layers but the head."""
        return float(self._schedule.get_last_lr()[0])

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the forward pass and the loss."""
        return torch.autocast(self._device.type, AMP[self._amp], enabled=self._amp != "none")

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self) -> None:
        """Moves the parameters by their gradients and clears these."""
        if self.clip is not None:
            self._scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._schedule.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "schedule": self._schedule,
            "scaler": self._scaler,
        }


def _optimizer(options: Options, model: nn.Module) -> torch.optim.Optimizer:
    sgd = options.optimizer == "sgd"
    lr, decay = (0.1, 5e-4) if sgd else (1e-3, 0.05)
    lr = lr if options.lr is None else options.lr
    decay = decay if options.weight_decay is None else options.weight_decay
    groups = _groups(model, lr, lr if options.head_lr is None else options.head_lr, decay, sgd)
    if sgd:
        return torch.optim.SGD(groups, lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr)


def _groups(
    model: nn.Module, lr: float, head_lr: float, decay: float, decay_vectors: bool
) -> list[dict[str, Any]]:
    """The parameters by learning rate and weight decay."""
    head = {id(parameter) for parameter in classifier(model).parameters()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            decays = decay_vectors or parameter.dim() > 1
            key = (head_lr if id(parameter) in head else lr, decay if decays else 0.0)
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": weight}
        for (rate, weight), parameters in groups.items()
    ]


class Mix:
    """timm's mixup and CutMix, each batch with random numbers of its own."""

    def __init__(self, options: Options, classes: int, *key: int) -> None:
        mixup = require("timm.data", "--mixup and --cutmix").Mixup
        self._mix = mixup(
            options.mixup,
            options.cutmix,
            prob=options.mix_prob,
            label_smoothing=0.0,
            num_classes=classes,
        )
        self._key = key

    def __call__(self, images: Tensor, targets: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """Images as they are or mixed, and soft targets (B, C). Of an odd batch one is left out."""
        even = len(images) // 2 * 2
        with seeded(*self._key, step):
            mixed, shares = self._mix(images[:even], targets[:even])
        return mixed, shares


def make_average(options: Options, model: nn.Module) -> Any:
    """timm's moving average of the weights, short at first; None where none is asked for."""
    if options.ema is None:
        return None
    utils = require("timm.utils", "--ema")
    return utils.ModelEmaV3(model, decay=options.ema, use_warmup=True)
