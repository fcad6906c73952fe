"""Batches of P classes with K samples each, which cover the epoch."""

from __future__ import annotations

import bisect
import operator
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from cwbr_fused.inputs import validation
from cwbr_fused.operations.warning import CWBRWarning

LEFT_OUT = 0.1  # of the samples: what an epoch may leave out without a warning


class PKSampler(Sampler[list[int]]):
    """Batches of `classes_per_batch` distinct classes with `samples_per_class` samples each.

        sampler = PKSampler(dataset.targets, classes_per_batch=32, samples_per_class=4)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=8)
        for epoch in range(epochs):
            for images, targets in loader:
                ...

    **An epoch covers the data.** Each class shuffles its samples and deals them out K at a time,
    from the front again when they run out: within a class no sample is used twice before all are
    used once. A class appears until its samples are used up, `ceil(n / K)` times, spread at
    random over the batches, and no batch has a class twice. Places that are left over are filled
    by classes that start over: those of the last batch, and, if one class has more than about 1/P
    of all samples, those beside it, since it can only be in every batch. Such a class makes the
    epoch long; `drop_last=True` cuts it short instead.

    **Ranks get disjoint batches** of one schedule, which every rank computes alike from the seed
    and the epoch: of batches 0, 1, 2, ... rank r takes r, r + R, r + 2R, ..., equally many on
    every rank. So P classes suffice at any world size; a class may be on two ranks in one step,
    with different samples, which only adds to statistics that are gathered over ranks. Rank and
    world size are looked up when an iteration starts, so the sampler may be made before
    `init_process_group`. A framework must not share the batches a second time: Lightning takes
    `Trainer(use_distributed_sampler=False)`; accelerate, and with it the Hugging Face `Trainer`,
    shares the batches itself, so give the sampler `num_replicas=1, rank=0` there.

    **An epoch is a function of (seed, epoch).** Each iteration takes `epoch` and advances it by
    one, so epochs differ without a call. `set_epoch` says which epoch comes next, as in a run that
    resumes; Lightning and accelerate call it. Every rank must iterate equally often.

    Args:
        labels: the class of each sample of the dataset: (N,) integers >= 0, in a tensor or in
            anything that `numpy.asarray` takes, such as a list or a column of pandas. They need not
            be consecutive.
        classes_per_batch: P, at most the number of usable classes.
        samples_per_class: K.
        seed: the same on every rank.
        short_classes: what happens to classes of fewer than K samples. `"replace"` repeats their
            samples, as evenly as possible; `"drop"` leaves the classes out.
        drop_last: False: every sample is used at least once. True: no sample is used twice, but in
            the one appearance of a short class; the n mod K last samples of a class, and what does
            not fill a batch on every rank, are left out of this epoch.
        shuffle: False: classes and samples in ascending order, every epoch alike.
        num_replicas: world size R; None: that of `torch.distributed` at each iteration, else 1.
        rank: in [0, R); None: that of `torch.distributed` at each iteration, else 0.

    Yields:
        Lists of P*K indices into the dataset, class by class. `len()` is the number of batches
        of this rank, the same in every epoch.

    Warns:
        CWBRWarning: on rank 0, when some samples are never drawn, or `drop_last` leaves more than a
            tenth of them out of an epoch.

    Raises:
        TypeError: `labels` are no integers, or a count is no int.
        ValueError: an argument out of range; fewer than P usable classes; no batch for every rank.
    """

    def __new__(cls, labels: object = None, *_: object, **__: object) -> PKSampler:
        """Answers a framework that replaces samplers by its own, as Lightning does."""
        if isinstance(labels, Sampler):
            raise TypeError(
                f"labels: expected the class of each sample, got a {type(labels).__name__}. "
                "PKSampler shares its batches over processes by itself; for Lightning pass "
                "Trainer(use_distributed_sampler=False)"
            )
        return super().__new__(cls)

    def __init__(
        self,
        labels: Sequence[int] | Tensor | Any,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        seed: int = 0,
        short_classes: Literal["replace", "drop"] = "replace",
        drop_last: bool = False,
        shuffle: bool = True,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        self.classes_per_batch = validation.check_int("classes_per_batch", classes_per_batch, 1)
        self.samples_per_class = validation.check_int("samples_per_class", samples_per_class, 1)
        self.batch_size = self.classes_per_batch * self.samples_per_class
        self._given = (
            None if num_replicas is None else validation.check_int("num_replicas", num_replicas, 1),
            None if rank is None else validation.check_int("rank", rank, 0),
        )
        self._place()
        validation.check_choice("short_classes", short_classes, ("replace", "drop"))
        self.seed = validation.check_int("seed", seed)
        self.epoch = 0
        self.drop_last = drop_last
        self.shuffle = shuffle

        _, class_of, sizes = _as_labels(labels).unique(return_inverse=True, return_counts=True)
        usable = sizes >= (self.samples_per_class if short_classes == "drop" else 1)
        if usable.sum() < self.classes_per_batch:
            raise ValueError(
                f"classes_per_batch: expected at most the {int(usable.sum())} usable of "
                f"{len(sizes)} classes in labels (samples_per_class={samples_per_class}, "
                f"short_classes={short_classes!r}), got {classes_per_batch}"
            )
        self._samples: Tensor = usable[class_of].nonzero().squeeze(1)
        self._class_of = (usable.cumsum(0) - 1)[class_of[self._samples]]
        self._sizes: Tensor = sizes[usable]
        if drop_last:
            turns = (self._sizes // self.samples_per_class).clamp(min=1)
        else:
            turns = (self._sizes + self.samples_per_class - 1) // self.samples_per_class
        self._turns: Tensor = turns
        if drop_last:
            self._longest = self._full_batches()
        else:
            batches = -(-int(turns.sum()) // self.classes_per_batch)
            self._longest = max(batches, int(turns.max()))
        if len(self) > 0 and self.rank == 0:  # on every rank an error where they cannot share
            self._warn_of_gaps(usable, sizes)

    @property
    def num_replicas(self) -> int:
        """World size R of the next iteration."""
        return self._place()[0]

    @property
    def rank(self) -> int:
        """This process, in [0, R)."""
        return self._place()[1]

    @property
    def sampler(self) -> PKSampler:
        """Itself: frameworks look for `set_epoch` at the `sampler` of a batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration, on every rank alike."""
        self.epoch = validation.check_int("epoch", epoch)

    def __len__(self) -> int:
        return self._num_batches // self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator("cpu")
        # The CPU generator uses 32 bits of its seed. The odd multiplier spreads the seeds over
        # them, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
        generator.manual_seed((self.seed * 0x9E3779B1 + self.epoch) % 2**32)
        self.epoch += 1
        table = self._schedule(self._appearances(generator), generator)
        batches = self._deal(table, generator)
        return (batch.tolist() for batch in batches[self.rank :: self.num_replicas])

    def _place(self) -> tuple[int, int]:
        """World size and rank, as they are now."""
        size, rank = self._given
        distributed = dist.is_available() and dist.is_initialized()
        if size is None:
            size = dist.get_world_size() if distributed else 1
        if rank is None:
            rank = dist.get_rank() if distributed else 0
        if rank >= size:
            raise ValueError(f"rank: expected an int below num_replicas={size}, got {rank}")
        return size, rank

    @property
    def _num_batches(self) -> int:
        """T, of all ranks together. No batch has a class twice, so none has more appearances."""
        ranks = self.num_replicas
        if not self.drop_last:
            return -(-self._longest // ranks) * ranks
        if self._longest < ranks:
            raise ValueError(
                f"labels: expected a full batch for each of num_replicas={ranks} ranks with "
                f"drop_last=True, got {self._longest} full batches"
            )
        return self._longest // ranks * ranks

    def _full_batches(self) -> int:
        """How many batches no class has to start over for."""
        turns, P = self._turns, self.classes_per_batch
        # sum(min(turns, T)) - P * T is concave in T and 0 at T = 0: all T up to the largest fit.
        return _largest(int(turns.sum()) // P, lambda T: int(turns.clamp(max=T).sum()) >= P * T)

    def _warn_of_gaps(self, usable: Tensor, sizes: Tensor) -> None:
        """Warns of what is never drawn, and of more than a little that an epoch leaves out."""
        texts = []
        if not usable.all():
            texts.append(
                f"{int((~usable).sum())} of {len(sizes)} classes ({int(sizes[~usable].sum())} of "
                f"{int(sizes.sum())} samples) are never drawn, with fewer than "
                f"{self.samples_per_class} samples each. short_classes='replace' repeats these."
            )
        share = self._share_left_out() if self.drop_last else 0.0
        if share > 0 and not self.shuffle:
            texts.append(
                f"the same {share:.1%} of the samples are left out of every epoch, with "
                "drop_last=True and shuffle=False. drop_last=False draws them all."
            )
        elif share > LEFT_OUT:
            texts.append(
                f"drop_last=True leaves {share:.1%} of the samples out of each epoch. "
                "drop_last=False draws them all; fewer samples_per_class leave fewer over."
            )
        for text in texts:
            warnings.warn(f"PKSampler: {text}", CWBRWarning, stacklevel=3)

    def _share_left_out(self) -> float:
        """Of the usable samples, how many an epoch with `drop_last` does not draw, on average.

        Of all appearances, each with min(n, K) samples of its own, as many as there are places are
        drawn with equal chances.
        """
        appearances = self._turns.clamp(max=self._num_batches)
        drawn = int((appearances * self._sizes.clamp(max=self.samples_per_class)).sum())
        places = self.classes_per_batch * self._num_batches
        return 1 - drawn * places / (int(appearances.sum()) * len(self._samples))

    def _appearances(self, generator: torch.Generator) -> Tensor:
        """In how many batches each class appears, (C,): the sum is P * T, none is above T.

        As many whole rounds of `turns` as fit, and a random part of the next; with `drop_last`
        the first round is already too long, unless it fits exactly.
        """
        T = self._num_batches
        places = self.classes_per_batch * T

        def rounds(n: int) -> Tensor:
            return (self._turns * n).clamp(max=T)

        whole = _largest(T, lambda n: int(rounds(n).sum()) <= places)
        counts = rounds(whole)
        chances = _range(len(counts)).repeat_interleave(rounds(whole + 1) - counts)
        chosen = self._permute(chances, generator)[: places - int(counts.sum())]
        return counts + chosen.bincount(minlength=len(counts))

    def _schedule(self, appearances: Tensor, generator: torch.Generator) -> Tensor:
        """The classes of each batch, (T, P), distinct in each row.

        Lay the appearances in a line, class by class, and cut it into P columns of T. No class is
        longer than T, so it is in one column or runs over from the end of one into the front of
        the next. A column gets its rows in random order, but last those that the class in its
        front has in the column before: the T - a others suffice for its rest of at most T - a.
        """
        P, T = self.classes_per_batch, self._num_batches
        classes = self._permute(_range(len(appearances)), generator)
        columns = classes.repeat_interleave(appearances[classes]).view(P, T)
        table = torch.empty_like(columns)
        before = torch.full_like(columns[0], -1)
        for column, placed in zip(columns, table, strict=True):
            rows = self._permute(_range(T), generator)
            taken = before[rows] == column[0]
            placed[torch.cat([rows[~taken], rows[taken]])] = column
            before = placed
        return table.T

    def _deal(self, table: Tensor, generator: torch.Generator) -> Tensor:
        """The batches, (T, P * K): every class in `table` takes its next K samples."""
        K = self.samples_per_class
        shuffled = self._permute(_range(len(self._samples)), generator)
        shuffled = shuffled[self._class_of[shuffled].argsort(stable=True)]
        starts = self._sizes.cumsum(0) - self._sizes

        flat = table.reshape(-1)
        by_class = flat.argsort(stable=True)
        counts = flat.bincount(minlength=len(self._sizes))
        turn = torch.empty_like(flat)
        turn[by_class] = _range(len(flat)) - (counts.cumsum(0) - counts)[flat[by_class]]

        place = (turn[:, None] * K + _range(K)) % self._sizes[flat, None]
        chosen = shuffled[starts[flat, None] + place]
        return self._samples[chosen].view(len(table), -1)

    def _permute(self, values: Tensor, generator: torch.Generator) -> Tensor:
        if not self.shuffle:
            return values
        return values[torch.randperm(len(values), generator=generator, device="cpu")]


def _range(n: int) -> Tensor:
    """On the CPU, whatever the default device is."""
    return torch.arange(n, device="cpu")


def _largest(upper: int, holds: Callable[[int], bool]) -> int:
    """The largest n in [0, upper] for which `holds`, which is true up to some n >= 0."""
    return bisect.bisect_left(range(1, upper + 1), True, key=lambda n: not holds(n))


def _as_labels(labels: object) -> Tensor:
    """Integers >= 0, (N,) int64 on the CPU."""
    try:
        if not isinstance(labels, Tensor | list | tuple):
            labels = _from_array(labels)
        tensor = torch.as_tensor(labels, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels: expected an integer for each sample, got {error}") from error
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"labels: expected integers, got {validation.describe(tensor)}")
    if tensor.ndim != 1 or len(tensor) == 0:
        raise ValueError(
            f"labels: expected shape (N,) with N > 0, got {validation.describe(tensor)}"
        )
    tensor = tensor.long()
    if tensor.min() < 0:
        raise ValueError(f"labels: expected integers >= 0, got {int(tensor.min())}")
    return tensor


def _from_array(labels: object) -> Any:
    """What NumPy makes of it, in an order and a dtype that torch takes."""
    import numpy as np  # torch can do without

    array = np.asarray(labels)
    if array.dtype.kind == "O":  # a column of pandas that may hold missing values
        return [operator.index(value) for value in array]
    return array.astype(array.dtype.newbyteorder("="))
