"""Image files: read in worker processes, augmented by timm's transforms, broken ones left out."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from fgvc.data import EVAL_BATCH, Batch
from fgvc.listing import PARTS, Listing, Samples
from fgvc.packages import require
from fgvc.randomness import seeded
from fgvc.sampling import Draw, Schedule, first_per_class, spread


class UnreadableImageError(Exception):
    """An image file that cannot be decoded, where that shall end the run."""


class Unreadable(NamedTuple):
    """In place of the image that a file does not hold."""

    path: str
    reason: str


class Reading(NamedTuple):
    """How image files are read. `preprocessing` are timm's mean, std, interpolation, crop_pct."""

    size: int
    preprocessing: dict[str, Any]
    randaugment: str | None = None
    erase: float = 0.0
    min_crop: float = 0.08
    workers: int = 0
    pin: bool = False
    stop_at_unreadable: bool = False


class ImageFiles:
    """A listing's images, each a square of `reading.size` pixels."""

    channels = 3

    def __init__(
        self, listing: Listing, reading: Reading, images_per_class: int | None = None, seed: int = 0
    ) -> None:
        self.name, self.class_names, self.reading = listing.name, listing.class_names, reading
        targets = torch.tensor([target for _, target in listing.parts["train"]])
        kept = first_per_class(targets, images_per_class, seed)
        self.train_targets = targets[kept]
        train = [listing.parts["train"][k] for k in kept.tolist()]
        self._samples = {"train": train} | {p: listing.parts[p] for p in PARTS[1:]}
        self.unreadable: dict[str, str] = {}
        self._augment, self._plain = _transforms(reading)

    def train(self, schedule: Schedule, seed: int) -> Iterable[Batch]:
        """One loader for the whole training, whose workers are kept from epoch to epoch."""
        files = _AugmentedFiles(self._samples["train"], self._augment, seed)
        loader = self._loader(files, batch_sampler=schedule, persistent_workers=self._workers > 0)
        return _Readable(loader, self._note)

    def plain(
        self, part: str, at_most: int | None = None, rank: int = 0, processes: int = 1
    ) -> Iterator[Batch]:
        samples = self._samples[part]
        indices = spread(len(samples), at_most)[rank::processes].tolist()
        files = _Files(samples, self._plain)
        loader = self._loader(files, batch_size=EVAL_BATCH, sampler=indices)
        return iter(_Readable(loader, self._note, may_be_empty=True))

    def classes_of(self, part: str) -> Tensor:
        present: Tensor = torch.tensor([target for _, target in self._samples[part]]).unique()
        return present

    def picture(self, part: str, index: int) -> Any:
        with Image.open(self._samples[part][index][0]) as image:
            small = image.convert("RGB")
        small.thumbnail((self.reading.size, self.reading.size))
        return np.asarray(small)

    @property
    def _workers(self) -> int:
        return self.reading.workers

    def _loader(self, files: Dataset[Any], **options: Any) -> DataLoader[Any]:
        # A generator of its own: by default a loader draws from the one that training draws from.
        return DataLoader(
            files,
            num_workers=self._workers,
            worker_init_fn=_start_worker,
            collate_fn=_collate,
            pin_memory=self.reading.pin,
            generator=torch.Generator(),
            **options,
        )

    def _note(self, broken: list[Unreadable]) -> None:
        """Each file is reported once."""
        for path, reason in broken:
            if self.reading.stop_at_unreadable:
                raise UnreadableImageError(f"{path} is not a readable image: {reason}")
            if path not in self.unreadable:
                self.unreadable[path] = reason
                print(f"Skipped {path}, which is not a readable image: {reason}", flush=True)


class _Readable:
    """The batches of a loader, without what could not be read."""

    def __init__(
        self,
        loader: DataLoader[Any],
        note: Callable[[list[Unreadable]], None],
        may_be_empty: bool = False,
    ) -> None:
        self.loader, self.note, self.may_be_empty = loader, note, may_be_empty

    def __iter__(self) -> Iterator[Batch]:
        for batch, broken in self.loader:
            self.note(broken)
            if batch is not None:
                yield batch
            elif not self.may_be_empty:
                raise UnreadableImageError(
                    f"none of the {len(broken)} images of a batch is readable; the first is "
                    f"{broken[0].path}: {broken[0].reason}"
                )


class _Files(Dataset[Any]):
    """(image, class, index), or why there is none."""

    def __init__(self, samples: Samples, transform: Callable[[Any], Tensor]) -> None:
        self.samples, self.transform = samples, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int, int] | Unreadable:
        path, target = self.samples[index]
        image = read_image(path)
        if isinstance(image, Unreadable):
            return image
        return self.transform(image), target, index


class _AugmentedFiles(_Files):
    """Each image draws its augmentation from a stream of its own, by the seed and the epoch."""

    def __init__(self, samples: Samples, transform: Callable[[Any], Tensor], seed: int) -> None:
        super().__init__(samples, transform)
        self.seed = seed

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, int] | Unreadable:  # type: ignore[override]
        epoch, index = draw
        with seeded(self.seed, epoch, index):
            return super().__getitem__(index)


def read_image(path: Path) -> Image.Image | Unreadable:
    """The image in RGB."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a decoder may raise anything where the data are broken
        return Unreadable(str(path), f"{type(error).__name__}: {error}")


def _collate(items: list[Any]) -> tuple[Batch | None, list[Unreadable]]:
    broken = [item for item in items if isinstance(item, Unreadable)]
    good = [item for item in items if not isinstance(item, Unreadable)]
    return (Batch(*default_collate(good)) if good else None), broken


def _start_worker(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the main one decides what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _transforms(reading: Reading) -> tuple[Any, Any]:
    """timm's transforms for training and for evaluation."""
    create = require("timm.data", "--data").create_transform
    shape = (3, reading.size, reading.size)
    common = {k: v for k, v in reading.preprocessing.items() if k != "crop_pct"}
    augment = create(
        shape,
        is_training=True,
        scale=(reading.min_crop, 1.0),
        color_jitter=None,
        auto_augment=reading.randaugment,
        re_prob=reading.erase,
        **common,
    )
    return augment, create(shape, is_training=False, **reading.preprocessing)
