"""A small network with two features, and CWBR on it, for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cwbr_fused import CWBR

CLASSES = 6


class Network(nn.Module):
    """Two layers that give their features away: a map and a vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3)
        self.body = nn.Linear(5, 8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        feature_map = self.conv(x)
        vector = self.body(feature_map.mean((2, 3)).relu())
        return self.head(vector.relu()), {"conv": feature_map, "body": vector}


def batch(seed: int = 0, size: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (size,), generator=generator)
    return torch.randn(size, 1, 6, 6, generator=generator) + targets[:, None, None, None], targets


def warmed_up(network: Network, **options: float) -> CWBR:
    """A regularizer that has seen a few batches."""
    cwbr = CWBR(CLASSES, **options)  # type: ignore[arg-type]
    for seed in range(1, 5):
        images, targets = batch(seed)
        logits, features = network(images)
        cwbr(features, logits, targets)
        cross_entropy(logits, targets).backward()
    network.zero_grad()
    return cwbr


def feature_gradients(network: Network, cwbr: CWBR | None, scale: float = 1) -> dict[str, Tensor]:
    images, targets = batch()
    logits, features = network(images)
    for feature in features.values():
        feature.retain_grad()
    if cwbr is not None:
        cwbr(features, logits, targets)
    (scale * cross_entropy(logits, targets)).backward()
    return {name: f.grad for name, f in features.items() if f.grad is not None}
