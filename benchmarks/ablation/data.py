"""Images in three parts, and the augmented batches of a seed."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from fgvc.data import first_per_class
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from benchmarks.ablation.settings import Augmentation, Setting

PARTS = ("train", "val", "test")


class Images:
    """The images of a setting; what is trained on depends on the seed."""

    def __init__(self, setting: Setting, seed: int) -> None:
        self.setting, self.seed = setting, seed
        images, self.targets = {}, {}
        with np.load(setting.source.path) as arrays:
            for part in PARTS:
                targets = torch.from_numpy(arrays[f"y{part}"]).long() - setting.first_class
                kept = (targets >= 0) & (targets < setting.classes)
                images[part] = torch.from_numpy(arrays[f"x{part}"]).float()[kept]
                self.targets[part] = targets[kept]
        chosen = first_per_class(self.targets["train"], setting.images_per_class, seed)
        images["train"] = images["train"][chosen]
        self.targets["train"] = self.targets["train"][chosen]
        mean, std = images["train"].mean(), images["train"].std()
        self.background = float(-mean / std)
        self.images = {part: ((x - mean) / std)[:, None] for part, x in images.items()}

    def prepared(self, images: Tensor) -> Tensor:
        """As the network takes them."""
        return images.contiguous(memory_format=torch.channels_last)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The training batches: shuffled, every image augmented for itself."""
        generator = torch.Generator().manual_seed(self.seed)
        indices = self._shuffled(generator)
        for _ in range(self.setting.steps):
            index = next(indices)
            images = self.images["train"][index]
            images = augmented(images, self.background, self.setting.augmentation, generator)
            yield self.prepared(images), self.targets["train"][index]

    def _shuffled(self, generator: torch.Generator) -> Iterator[Tensor]:
        """Every image once before any comes again; batches may cross that border."""
        size, order = len(self.targets["train"]), torch.empty(0, dtype=torch.long)
        while True:
            while len(order) < self.setting.batch_size:
                order = torch.cat([order, torch.randperm(size, generator=generator)])
            yield order[: self.setting.batch_size]
            order = order[self.setting.batch_size :]


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
