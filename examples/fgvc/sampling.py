"""Which images form which batch: a pure function of the seed and the epoch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, Sampler

from cwbr_fused import PKSampler
from fgvc.options import Options
from fgvc.randomness import generator_of

# An image of the training part as it is drawn in one epoch: (epoch, index).
Draw = tuple[int, int]


class ShuffledBatches(Sampler[list[int]]):
    """Full batches of a fresh permutation every epoch."""

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


def make_batches(options: Options, targets: Tensor) -> PKSampler | ShuffledBatches:
    """`shuffle`: ordinary batches; `pk`: some images each of some classes."""
    if options.sampler == "pk":
        return PKSampler(
            targets,
            options.classes_per_batch,
            options.samples_per_class,
            seed=options.seed,
            num_replicas=1,
            rank=0,
        )
    return ShuffledBatches(len(targets), options.batch_size, options.seed)


class Schedule(Sampler[list[Draw]]):
    """One process's share of the batches of one epoch, those from `start` on.

    The draws carry their epoch, so that the workers of a loader may outlive it. With N processes
    each takes every N-th image of each batch.
    """

    def __init__(
        self, batches: PKSampler | ShuffledBatches, rank: int = 0, processes: int = 1
    ) -> None:
        if batches.batch_size % processes:
            raise ValueError(
                f"a batch has {batches.batch_size} images, which {processes} processes cannot share"
            )
        self.batches, self.rank, self.processes = batches, rank, processes
        self.epoch, self._first, self._last = 0, 0, len(batches)

    def start(self, step: int, total: int) -> None:
        """Next come the batches from that step to the end of its epoch, or of the training."""
        self.epoch, self._first = divmod(step, len(self.batches))
        self._last = min(len(self.batches), self._first + total - step)
        self.batches.set_epoch(self.epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch = self.epoch
        for batch in islice(self.batches, self._first, self._last):
            yield [(epoch, index) for index in batch[self.rank :: self.processes]]


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
