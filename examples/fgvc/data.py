"""What training needs of a dataset: batches of its three parts, and the embedded glyphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from fgvc.listing import PARTS
from fgvc.randomness import generator_of
from fgvc.sampling import Schedule, first_per_class, spread

GLYPHS = Path(__file__).parents[1] / "data" / "glyphs200.npz"
EVAL_BATCH = 256


class Batch(NamedTuple):
    """Images (B, channels, height, width), their classes (B,) and their places in the part (B,)."""

    images: Tensor
    targets: Tensor
    indices: Tensor


class Images(Protocol):
    """A classification dataset in three parts."""

    name: str
    class_names: list[str]
    channels: int
    train_targets: Tensor
    unreadable: dict[str, str]

    def train(self, schedule: Schedule, seed: int) -> Iterable[Batch]:
        """Each iteration gives the augmented batches that the schedule then has."""

    def plain(
        self, part: str, at_most: int | None = None, rank: int = 0, processes: int = 1
    ) -> Iterator[Batch]:
        """The images of a part, not augmented: all, or `at_most` spread evenly over them; of N
        processes each gets every N-th."""

    def classes_of(self, part: str) -> Tensor:
        """The classes that occur in a part, ascending."""

    def picture(self, part: str, index: int) -> Any:
        """An image to look at: uint8 (height, width) or (height, width, 3)."""


class Glyphs:
    """200 look-alike Chinese characters in typefaces that differ from part to part."""

    name, channels, max_shift = "glyphs", 1, 2

    def __init__(self, images_per_class: int | None, seed: int) -> None:
        with np.load(GLYPHS) as arrays:
            self.class_names = [str(char) for char in arrays["chars"]]
            self._targets = {p: torch.from_numpy(arrays[f"y{p}"]).long() for p in PARTS}
            self._grey = {p: torch.from_numpy(arrays[f"x{p}"]) for p in PARTS}
        chosen = first_per_class(self._targets["train"], images_per_class, seed)
        self._grey["train"] = self._grey["train"][chosen]
        self._targets["train"] = self.train_targets = self._targets["train"][chosen]
        grey = self._grey["train"].float()
        self._mean, self._std = grey.mean(), grey.std()
        self._images = {p: self._normalized(images) for p, images in self._grey.items()}
        self._background = float(self._normalized(torch.zeros(())))
        self.unreadable: dict[str, str] = {}

    def _normalized(self, grey: Tensor) -> Tensor:
        return (grey.float().unsqueeze(-3 if grey.dim() else 0) - self._mean) / self._std

    def train(self, schedule: Schedule, seed: int) -> Iterable[Batch]:
        """Shifted by up to `max_shift` pixels each way."""
        return _ShiftedGlyphs(self, schedule, seed)

    def shifted(self, index: Tensor, generator: torch.Generator) -> Batch:
        m, size = self.max_shift, self._images["train"].shape[-1]
        dx, dy = torch.randint(2 * m + 1, (2, len(index)), generator=generator)
        padded = pad(self._images["train"][index, 0], (m, m, m, m), value=self._background)
        rows = (dy[:, None] + torch.arange(size))[:, :, None]
        columns = (dx[:, None] + torch.arange(size))[:, None, :]
        shifted = padded[torch.arange(len(index))[:, None, None], rows, columns]
        return Batch(shifted[:, None], self.train_targets[index], index)

    def plain(
        self, part: str, at_most: int | None = None, rank: int = 0, processes: int = 1
    ) -> Iterator[Batch]:
        images, targets = self._images[part], self._targets[part]
        for index in spread(len(targets), at_most)[rank::processes].split(EVAL_BATCH):
            yield Batch(images[index], targets[index], index)

    def classes_of(self, part: str) -> Tensor:
        present: Tensor = self._targets[part].unique()
        return present

    def picture(self, part: str, index: int) -> Any:
        return 255 - self._grey[part][index].numpy()


class _ShiftedGlyphs:
    def __init__(self, glyphs: Glyphs, schedule: Schedule, seed: int) -> None:
        self.glyphs, self.schedule, self.seed = glyphs, schedule, seed

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.schedule:
            (epoch, first), index = batch[0], torch.tensor([index for _, index in batch])
            yield self.glyphs.shifted(index, generator_of(self.seed, epoch, first))
