"""The networks of the ablation: small, because every method is trained many times."""

from __future__ import annotations

import torch
from fgvc.models import BasicBlock
from torch import Tensor, nn


class SmallResNet(nn.Module):
    """Three stages of one block, at a quarter, an eighth and a sixteenth of the image's size.

    `embed` gives the vectors that `fc` classifies, so that a base may put another head on them.
    """

    def __init__(self, classes: int, width: int = 24) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width // 2, 5, 2, 2, bias=False), nn.BatchNorm2d(width // 2), nn.ReLU()
        )
        self.layer2 = BasicBlock(width // 2, width, 2)
        self.layer3 = BasicBlock(width, 2 * width, 2)
        self.layer4 = BasicBlock(2 * width, 4 * width, 2)
        self.fc = nn.Linear(4 * width, classes)

    def embed(self, x: Tensor) -> Tensor:
        maps: Tensor = self.layer4(self.layer3(self.layer2(self.stem(x))))
        return maps.mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.embed(x))
        return logits


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
