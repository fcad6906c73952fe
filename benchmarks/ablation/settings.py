"""What is trained: data, network, optimizer and length, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from fgvc.data import GLYPHS
from torch import nn

from benchmarks.ablation import networks

DATA = Path(__file__).parent / "data"


class Source(NamedTuple):
    """A file of images in three parts, and how many classes they have."""

    path: Path
    classes: int


GLYPHS_200 = Source(GLYPHS, 200)
GLYPHS_1000 = Source(DATA / "glyphs1000.npz", 1000)
TYPEFACES = Source(DATA / "typefaces.npz", 400)


class Augmentation(NamedTuple):
    """Of each image for itself, uniformly up to these: radians, shares of the size, grey levels."""

    rotation: float
    shear: float
    scale: float
    stretch: float
    shift: float
    noise: float


# A character may lean, but whether letters lean, and how wide they are, tells typefaces apart.
CHARACTERS = Augmentation(0.15, 0.15, 0.12, 0.12, 0.1, 0.15)
WORDS = Augmentation(0.04, 0.0, 0.1, 0.0, 0.1, 0.15)


@dataclass(frozen=True)
class Setting:
    """A training task; batches are a function of the seed and the step alone."""

    name: str
    source: Source
    images_per_class: int
    augmentation: Augmentation
    steps: int
    batch_size: int
    network: Callable[[int], nn.Module] = networks.SmallResNet
    layers: tuple[str, ...] = ("layer2", "layer3", "layer4")
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = networks.sgd
    first_class: int = 0
    classes: int = 0

    def __post_init__(self) -> None:
        if not self.classes:
            object.__setattr__(self, "classes", self.source.classes)


# Rules were chosen on the first 120 typefaces, and are tested on the next.
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting("characters, 5 images", GLYPHS_200, 5, CHARACTERS, 368, 128),
        Setting("characters, 15 images", GLYPHS_200, 15, CHARACTERS, 700, 128),
        Setting("typefaces", TYPEFACES, 10, WORDS, 900, 64, first_class=120, classes=120),
        Setting("1000 characters, 5 images", GLYPHS_1000, 5, CHARACTERS, 700, 128),
    )
}
