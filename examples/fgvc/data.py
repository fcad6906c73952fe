"""Images in three disjoint parts: the embedded glyphs, or a folder of images per class.

Which images are in a batch, and how they are augmented, is a pure function of the seed, the epoch
and the image: two methods see the same batches, and a resumed run goes on with those it missed.
"""

from __future__ import annotations

import importlib
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, Subset

from cwbr_fused import PKSampler

GLYPHS = Path(__file__).parents[1] / "data" / "glyphs200.npz"
PARTS = ("train", "val", "test")
EVAL_BATCH = 256
Batches = Iterator[tuple[Tensor, Tensor]]


class Images(Protocol):
    """A classification dataset in three parts."""

    name: str
    class_names: list[str]
    channels: int
    train_targets: Tensor

    def train(self, batches: Iterable[list[int]], epoch: int) -> Batches:
        """The augmented training images of each list of indices."""

    def plain(self, part: str, at_most: int | None = None) -> Batches:
        """The images of a part, not augmented: all, or `at_most` spread evenly over them."""


def require(package: str, purpose: str) -> Any:
    """An optional package, or a message that says what it is for and how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        name = package.split(".")[0]
        raise SystemExit(f"{purpose} needs the package {name}: pip install {name}") from error


def first_per_class(targets: Tensor, count: int | None, seed: int) -> Tensor:
    """Indices of `count` random samples of each class (all of them for None), ascending."""
    if count is None:
        return torch.arange(len(targets))
    shuffled = torch.randperm(len(targets), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[targets[shuffled].argsort(stable=True)]
    sizes = targets.bincount()
    place = torch.arange(len(targets)) - (sizes.cumsum(0) - sizes)[targets[by_class]]
    return by_class[place < count].sort().values


def spread(size: int, at_most: int | None) -> Tensor:
    """Indices of at most that many of `size` items, evenly spaced."""
    count = size if at_most is None else min(size, at_most)
    return torch.arange(count) * size // count


class ShuffledBatches(Sampler[list[int]]):
    """Full batches of a fresh permutation every epoch, a function of (seed, epoch)."""

    def __init__(self, size: int, batch_size: int, seed: int) -> None:
        if batch_size > size:
            raise ValueError(f"--batch-size is {batch_size}, but there are {size} training images")
        self.size, self.batch_size, self.seed, self.epoch = size, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.size, generator=generator_of(self.seed, self.epoch))
        yield from BatchSampler(order.tolist(), self.batch_size, drop_last=True)


def seed_of(seed: int, epoch: int, item: int = 0) -> int:
    """A seed of its own for each (seed, epoch, item)."""
    return int(np.random.SeedSequence([seed, epoch, item]).generate_state(1, np.uint64)[0])


def generator_of(seed: int, epoch: int, item: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(seed, epoch, item))


def make_sampler(
    kind: str, targets: Tensor, batch_size: int, classes: int, samples: int, seed: int
) -> PKSampler | ShuffledBatches:
    """`shuffle`: ordinary batches of `batch_size`; `pk`: `classes` times `samples` images."""
    if kind == "pk":
        return PKSampler(targets, classes, samples, seed=seed)
    return ShuffledBatches(len(targets), batch_size, seed)


class Glyphs:
    """200 look-alike Chinese characters in typefaces that differ from part to part."""

    name, channels, max_shift = "glyphs", 1, 2

    def __init__(self, images_per_class: int | None, seed: int) -> None:
        with np.load(GLYPHS) as arrays:
            self.class_names = [str(char) for char in arrays["chars"]]
            self._targets = {p: torch.from_numpy(arrays[f"y{p}"]).long() for p in PARTS}
            images = {p: torch.from_numpy(arrays[f"x{p}"]) for p in PARTS}
        chosen = first_per_class(self._targets["train"], images_per_class, seed)
        images["train"] = images["train"][chosen]
        self._targets["train"] = self.train_targets = self._targets["train"][chosen]
        self._seed = seed
        grey = images["train"].float()
        self._mean, self._std = grey.mean(), grey.std()
        self._images = {p: self._normalized(images[p]) for p in PARTS}
        self._background = float(self._normalized(torch.zeros(())))

    def _normalized(self, grey: Tensor) -> Tensor:
        return (grey.float().unsqueeze(-3 if grey.dim() else 0) - self._mean) / self._std

    def train(self, batches: Iterable[list[int]], epoch: int) -> Batches:
        """Shifted by up to `max_shift` pixels each way."""
        m, size = self.max_shift, self._images["train"].shape[-1]
        for batch in batches:
            index = torch.tensor(batch)
            generator = generator_of(self._seed, epoch, batch[0])
            dx, dy = torch.randint(2 * m + 1, (2, len(batch)), generator=generator)
            padded = pad(self._images["train"][index, 0], (m, m, m, m), value=self._background)
            rows = (dy[:, None] + torch.arange(size))[:, :, None]
            columns = (dx[:, None] + torch.arange(size))[:, None, :]
            shifted = padded[torch.arange(len(batch))[:, None, None], rows, columns]
            yield shifted[:, None], self.train_targets[index]

    def plain(self, part: str, at_most: int | None = None) -> Batches:
        images, targets = self._images[part], self._targets[part]
        for index in spread(len(targets), at_most).split(EVAL_BATCH):
            yield images[index], targets[index]


class Folder:
    """Images in one folder per class, read by torchvision's `ImageFolder`.

    `root` holds train/, val/ and test/; a part that is missing is split off, class by class and by
    the seed: 15 % of the training images. Without train/, `root` itself holds the classes.
    """

    channels = 3

    def __init__(
        self, root: Path, image_size: int, images_per_class: int | None, workers: int, seed: int
    ) -> None:
        datasets = require("torchvision.datasets", f"--data {root}")
        if not root.is_dir():
            raise ValueError(f"--data: {root} is not a directory")
        self.name, self._workers, self._seed = root.name, workers, seed
        augment, plain = _transforms(image_size)
        has_parts = (root / "train").is_dir()
        source = root / "train" if has_parts else root
        augmented = datasets.ImageFolder(str(source), augment)
        unchanged = datasets.ImageFolder(str(source), plain)
        self.class_names = list(augmented.classes)
        targets = torch.tensor(augmented.targets)

        self._parts: dict[str, Dataset[Any]] = {}
        free = torch.ones(len(targets), dtype=torch.bool)
        for number, part in enumerate(PARTS[1:], 1):
            if has_parts and (root / part).is_dir():
                found = datasets.ImageFolder(str(root / part), plain)
                if list(found.classes) != self.class_names:
                    raise ValueError(f"--data: {root / part} has other classes than {source}")
                self._parts[part] = found
            else:
                taken = self._share(targets, free, 0.15, generator_of(seed, 0, number))
                free[taken] = False
                self._parts[part] = Subset(unchanged, taken.tolist())
        left = free.nonzero().squeeze(1)
        left = left[first_per_class(targets[left], images_per_class, seed)]
        self.train_targets = targets[left]
        self._augmented = _Seeded(augmented, left.tolist(), seed)
        self._parts["train"] = Subset(unchanged, left.tolist())

    @staticmethod
    def _share(targets: Tensor, free: Tensor, share: float, generator: torch.Generator) -> Tensor:
        """Indices of a share of the free samples of each class, at least one."""
        index = free.nonzero().squeeze(1)
        sizes = targets.bincount()
        counts = (sizes * share).round().clamp(min=1).long()
        shuffled = index[torch.randperm(len(index), generator=generator)]
        return torch.cat([shuffled[targets[shuffled] == k][: counts[k]] for k in range(len(sizes))])

    def _load(self, dataset: Dataset[Any], **options: Any) -> Batches:
        # A generator of its own: by default a loader draws from the one that training draws from.
        yield from DataLoader(
            dataset,
            num_workers=self._workers,
            worker_init_fn=_ignore_interrupt,
            generator=torch.Generator(),
            **options,
        )

    def train(self, batches: Iterable[list[int]], epoch: int) -> Batches:
        self._augmented.epoch = epoch
        return self._load(self._augmented, batch_sampler=list(batches))

    def plain(self, part: str, at_most: int | None = None) -> Batches:
        images = self._parts[part]
        index = spread(len(images), at_most).tolist()  # type: ignore[arg-type]
        return self._load(Subset(images, index), batch_size=EVAL_BATCH)


class _Seeded(Dataset[Any]):
    """A subset whose random transforms draw from a stream of their own for every image."""

    def __init__(self, dataset: Dataset[Any], indices: list[int], seed: int) -> None:
        self.dataset, self.indices, self.seed, self.epoch = dataset, indices, seed, 0

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, item: int) -> Any:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, self.epoch, item))
            return self.dataset[self.indices[item]]


def _ignore_interrupt(worker: int) -> None:
    """Ctrl-C reaches every process of the terminal; the main one decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _transforms(size: int) -> tuple[Any, Any]:
    """torchvision's usual recipe for training and for evaluation, with ImageNet's statistics."""
    t = require("torchvision.transforms", "--data DIR")
    end = [t.ToTensor(), t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
    augment = [t.RandomResizedCrop(size), t.RandomHorizontalFlip(), *end]
    return t.Compose(augment), t.Compose([t.Resize(size * 8 // 7), t.CenterCrop(size), *end])
