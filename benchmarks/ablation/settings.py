"""What is trained: data, network, optimizer and length, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from fgvc.data import GLYPHS
from torch import nn

from benchmarks.ablation import networks
from benchmarks.ablation.data import Augmentation, Data, Images, Source, Texts

DATA = Path(__file__).parent / "data"
GLYPHS_200 = Source(GLYPHS, 200)
GLYPHS_1000 = Source(DATA / "glyphs1000.npz", 1000)
TYPEFACES = Source(DATA / "typefaces.npz", 400)
PACKAGES = Source(DATA / "packages.tsv", 37)

# A character may lean, but whether letters lean, and how wide they are, tells typefaces apart.
CHARACTERS = Augmentation(0.15, 0.15, 0.12, 0.12, 0.1, 0.15)
WORDS = Augmentation(0.04, 0.0, 0.1, 0.0, 0.1, 0.15)


@dataclass(frozen=True)
class Setting:
    """A training task; `data(classes, seed)` is what a run trains on."""

    name: str
    data: Callable[..., Data]
    classes: int
    steps: int
    batch_size: int
    network: Callable[[int], nn.Module] = networks.SmallResNet
    layers: tuple[str, ...] = ("layer2", "layer3", "layer4")
    optimizer: Callable[[nn.ModuleList], torch.optim.Optimizer] = networks.sgd


# Rules were chosen on the first 120 typefaces, and are tested on the next.
SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            "characters, 5 images",
            partial(Images, GLYPHS_200, CHARACTERS, per_class=5),
            *(200, 368, 128),
        ),
        Setting(
            "characters, 15 images",
            partial(Images, GLYPHS_200, CHARACTERS, per_class=15),
            *(200, 700, 128),
        ),
        Setting(
            "typefaces",
            partial(Images, TYPEFACES, WORDS, per_class=10, first_class=120),
            *(120, 900, 64),
        ),
        Setting(
            "1000 characters, 5 images",
            partial(Images, GLYPHS_1000, CHARACTERS, per_class=5),
            *(1000, 700, 128),
        ),
        Setting(
            "package sections",
            partial(Texts, PACKAGES, per_class=50, length=16),
            *(37, 348, 32),
            networks.MiniLM,
            ("body.encoder.layer.1", "body.encoder.layer.3", "body.encoder.layer.5"),
            partial(networks.adamw, rate=2e-4, head=1e-3),
        ),
        Setting(
            "typefaces, fine-tuned",
            partial(Images, TYPEFACES, WORDS, per_class=10, first_class=240),
            *(60, 450, 32),
            networks.Lite0,
            ("body.blocks.2", "body.blocks.4", "body.blocks.6"),
            partial(networks.adamw, rate=6e-3, head=6e-3),
        ),
    )
}
