"""What a method is put on top of: the losses and tricks that people train with already."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear, normalize, one_hot


class Base(NamedTuple):
    """A recipe: cross-entropy with some of these.

    `scale` makes the head a cosine head, `margin` adds ArcFace's angle to it; `average` is the
    decay of the moving average of the weights that is tested in their place; `times` multiplies the
    steps.
    """

    what: str
    smoothing: float = 0.0
    mixup: float = 0.0
    scale: float = 0.0
    margin: float = 0.0
    average: float = 0.0
    times: int = 1


BASES = {
    "cross-entropy": Base("cross-entropy"),
    "label smoothing": Base("label smoothing, 0.1", smoothing=0.1),
    "mixup": Base("mixup, alpha 0.2", mixup=0.2),
    "cosine": Base("cosine head, scale 16", scale=16),
    "ArcFace": Base("ArcFace, scale 16, margin 0.2", scale=16, margin=0.2),
    "averaged": Base("moving average of the weights, 0.99", average=0.99),
    "three times the steps": Base("cross-entropy, three times as long", times=3),
    "smoothing, mixup, EMA": Base(
        "label smoothing, mixup and averaged weights", smoothing=0.1, mixup=0.2, average=0.99
    ),
}


class CosineHead(nn.Linear):
    """`scale` times the cosines between the embedding and a vector for each class."""

    def __init__(self, dims: int, classes: int, scale: float) -> None:
        super().__init__(dims, classes, bias=False)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * linear(normalize(x), normalize(self.weight))


def with_head(network: nn.Module, base: Base) -> nn.Module:
    """The network, its last layer `fc` replaced where the base wants another head."""
    fc = network.fc
    assert isinstance(fc, nn.Linear)
    if base.scale:
        network.fc = CosineHead(fc.in_features, fc.out_features, base.scale)
    return network


def mixed(
    base: Base, inputs: Tensor, targets: Tensor, classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs and targets as the base trains on them; soft targets with mixup."""
    if not base.mixup:
        return inputs, targets
    alpha = torch.full((2,), base.mixup)
    first, second = torch._standard_gamma(alpha, generator=generator).clamp(min=1e-6).tolist()
    share = first / (first + second)
    soft = one_hot(targets, classes).float()
    return (
        share * inputs + (1 - share) * inputs.roll(1, 0),
        share * soft + (1 - share) * soft.roll(1, 0),
    )


def loss(base: Base, logits: Tensor, targets: Tensor) -> Tensor:
    """Of the logits, which are without the margin."""
    if base.margin:
        logits = _with_margin(logits, targets, base)
    return cross_entropy(logits, targets, label_smoothing=base.smoothing)


def _with_margin(logits: Tensor, targets: Tensor, base: Base) -> Tensor:
    """ArcFace (Deng 2019): the margin added to the angle of the own class."""
    own = targets[:, None]
    cosine = (logits.gather(1, own) / base.scale).clamp(-1 + 1e-6, 1 - 1e-6)
    shifted = (cosine.acos() + base.margin).cos()
    past_pi = cosine - base.margin * math.sin(base.margin)
    shifted = torch.where(cosine > math.cos(math.pi - base.margin), shifted, past_pi)
    return logits.scatter(1, own, base.scale * shifted)


class MovingAverage:
    """Of the weights and buffers of a network; a plain average of the first few steps."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network, self.decay, self.steps = network, decay, 0
        self.state = {name: value.clone() for name, value in network.state_dict().items()}

    @torch.no_grad()
    def follow(self) -> None:
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, value in self.network.state_dict().items():
            if value.is_floating_point():
                self.state[name].lerp_(value, 1 - decay)
            else:
                self.state[name].copy_(value)

    def take_over(self) -> None:
        self.network.load_state_dict(self.state)
