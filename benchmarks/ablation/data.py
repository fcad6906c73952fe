"""Images and texts in three parts, and the training batches of a seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from fgvc.sampling import first_per_class
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from benchmarks.ablation import networks

PARTS = ("train", "val", "test")


class Source(NamedTuple):
    """A file of samples in three parts, and how many classes they have."""

    path: Path
    classes: int


class Augmentation(NamedTuple):
    """Of each image for itself, uniformly up to these: radians, shares of the size, grey levels."""

    rotation: float
    shear: float
    scale: float
    stretch: float
    shift: float
    noise: float


class Data:
    """Inputs and targets by part; `per_class` of each class, which depend on the seed, train."""

    def __init__(
        self, inputs: dict[str, Tensor], targets: dict[str, Tensor], per_class: int, seed: int
    ) -> None:
        self.inputs, self.targets, self.seed = inputs, targets, seed
        chosen = first_per_class(targets["train"], per_class, seed)
        for part in (inputs, targets):
            part["train"] = part["train"][chosen]

    def prepared(self, inputs: Tensor) -> Tensor:
        """As the network takes them."""
        return inputs

    def augmented(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        """For training."""
        return inputs

    def batches(self, steps: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches, a function of the seed and the step alone."""
        generator = torch.Generator().manual_seed(self.seed)
        indices = self._shuffled(size, generator)
        for _ in range(steps):
            index = next(indices)
            inputs = self.augmented(self.inputs["train"][index], generator)
            yield self.prepared(inputs), self.targets["train"][index]

    def _shuffled(self, size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Every sample once before any comes again; batches may cross that border."""
        count, order = len(self.targets["train"]), torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < size:
                order = torch.cat([order, torch.randperm(count, generator=generator)])
            yield order[:size]
            order = order[size:]


class Images(Data):
    """Those of `classes` classes of a file, from `first_class` on; augmented for training."""

    def __init__(
        self,
        source: Source,
        augmentation: Augmentation,
        classes: int,
        seed: int,
        *,
        per_class: int,
        first_class: int = 0,
    ) -> None:
        images, targets = {}, {}
        with np.load(source.path) as arrays:
            for part in PARTS:
                target = torch.from_numpy(arrays[f"y{part}"]).long() - first_class
                kept = (target >= 0) & (target < classes)
                images[part] = torch.from_numpy(arrays[f"x{part}"]).float()[kept]
                targets[part] = target[kept]
        super().__init__(images, targets, per_class, seed)
        mean, std = images["train"].mean(), images["train"].std()
        self.background, self.augmentation = float(-mean / std), augmentation
        self.inputs = {part: ((x - mean) / std)[:, None] for part, x in images.items()}

    def prepared(self, inputs: Tensor) -> Tensor:
        return inputs.contiguous(memory_format=torch.channels_last)

    def augmented(self, inputs: Tensor, generator: torch.Generator) -> Tensor:
        return augmented(inputs, self.background, self.augmentation, generator)


class Texts(Data):
    """Token indices of a file of lines `part, class, text`; of its first `classes` classes."""

    def __init__(
        self, source: Source, classes: int, seed: int, *, per_class: int, length: int
    ) -> None:
        rows = [line.split("\t") for line in source.path.read_text(encoding="utf-8").splitlines()]
        names = sorted({name for _, name, _ in rows})[:classes]
        targets, texts = defaultdict(list), defaultdict(list)
        for part, name, text in rows:
            if name in names:
                targets[part].append(names.index(name))
                texts[part].append(text)
        tokenizer = networks.tokenizer(length)
        super().__init__(
            {p: torch.tensor([e.ids for e in tokenizer.encode_batch(texts[p])]) for p in PARTS},
            {part: torch.tensor(targets[part]) for part in PARTS},
            per_class,
            seed,
        )

    def prepared(self, inputs: Tensor) -> Tensor:
        """No longer than the longest text."""
        return inputs[:, : int((inputs != networks.PADDING).sum(1).max())]


def augmented(
    images: Tensor, background: float, limits: Augmentation, generator: torch.Generator
) -> Tensor:
    """(B, 1, H, W), each rotated, sheared, scaled, stretched, shifted and noisy by chance."""
    count, _, height, width = images.shape

    def up_to(limit: float) -> Tensor:
        return limit * (2 * torch.rand(count, generator=generator) - 1)

    angle, shear = up_to(limits.rotation), up_to(limits.shear)
    wide = 1 + up_to(limits.scale)
    high = wide * (1 + up_to(limits.stretch))
    dx, dy = up_to(limits.shift), up_to(limits.shift)
    aspect = height / width
    rows = (
        torch.stack([angle.cos() / wide, (angle.sin() + shear) / wide * aspect, dx], 1),
        torch.stack([-angle.sin() / high / aspect, angle.cos() / high, dy], 1),
    )
    grid = affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    moved = grid_sample(images - background, grid, align_corners=False) + background
    return moved + limits.noise * torch.randn(images.shape, generator=generator)
