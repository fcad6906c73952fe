"""PKSampler in use: labels of any library, loaders and frameworks, ranks, wrong arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_sampling import labels_of_sizes
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from cwbr_fused.overlap.sampling import PKSampler

pytestmark = pytest.mark.filterwarnings("ignore::cwbr_fused.CWBRWarning")


@pytest.mark.parametrize(
    "make",
    [
        list,
        tuple,
        np.array,
        torch.tensor,
        lambda v: np.array(v, dtype=np.uint8),
        lambda v: np.array(v, dtype=">u2"),
        lambda v: np.array(v[::-1])[::-1],
        lambda v: np.array(v, dtype=object),
        torch.IntTensor,
        lambda v: torch.tensor(v, dtype=torch.uint16),
    ],
)
def test_labels_may_be_a_list_an_array_or_a_tensor(make: Callable[[list[int]], Any]) -> None:
    labels = [7, 100, 7, 3, 100, 3, 7, 3]
    assert list(PKSampler(make(labels), 2, 2)) == list(PKSampler(labels, 2, 2))


class Column:
    """A column of a table after some rows went elsewhere: `column[0]` is not its first value."""

    def __init__(self, values: list[int]) -> None:
        self.values = dict(enumerate(values, start=3))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, row: int) -> int:
        return self.values[row]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(list(self.values.values()), dtype)


def test_labels_of_a_table_are_taken_by_value_and_not_by_row_name() -> None:
    labels = [7, 100, 7, 3, 100, 3, 7, 3]
    assert list(PKSampler(Column(labels), 2, 2)) == list(PKSampler(labels, 2, 2))


def test_a_data_loader_takes_it_as_batch_sampler() -> None:
    targets = torch.arange(24) % 6
    sampler = PKSampler(targets, 3, 2)
    loader = DataLoader(TensorDataset(torch.arange(24), targets), batch_sampler=sampler)
    assert len(loader) == len(sampler) == 4
    drawn = [index.tolist() for index, _ in loader]
    sampler.set_epoch(0)
    assert drawn == list(sampler)


def test_the_default_device_does_not_matter() -> None:
    labels = labels_of_sizes([5] * 5)
    expected = list(PKSampler(labels, 2, 2))
    with torch.device("meta"):
        assert list(PKSampler(labels, 2, 2)) == expected


def test_rank_and_world_size_are_those_of_the_process_group_when_an_iteration_starts() -> None:
    labels = labels_of_sizes([6] * 4)
    early = PKSampler(labels, 2, 2)
    assert (early.num_replicas, early.rank, len(early)) == (1, 0, 6)
    dist.init_process_group("fake", store=FakeStore(), rank=2, world_size=3)
    try:
        assert (early.num_replicas, early.rank, len(early)) == (3, 2, 2)
        drawn = list(early)
        assert list(PKSampler(labels, 2, 2)) == drawn
    finally:
        dist.destroy_process_group()
    assert drawn == list(PKSampler(labels, 2, 2, num_replicas=3, rank=2))


def test_more_ranks_than_batches_are_an_error_when_the_iteration_starts() -> None:
    early = PKSampler([0, 0, 1, 1], 2, 2, drop_last=True)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        with pytest.raises(ValueError, match=r"labels: expected .*num_replicas=2.*got 1 full"):
            iter(early)
    finally:
        dist.destroy_process_group()


def test_epochs_differ_without_a_call_and_resume_with_one() -> None:
    loader = DataLoader(torch.arange(60), batch_sampler=PKSampler([i % 6 for i in range(60)], 3, 2))
    epochs = [[tuple(batch.tolist()) for batch in loader] for _ in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    resumed = PKSampler([i % 6 for i in range(60)], 3, 2)
    resumed.set_epoch(1)
    assert [[tuple(batch) for batch in resumed] for _ in range(2)] == epochs[1:]


def test_frameworks_find_set_epoch() -> None:
    """Lightning and accelerate look at the `sampler` of a batch sampler."""
    loader = DataLoader(torch.arange(60), batch_sampler=PKSampler([i % 6 for i in range(60)], 3, 2))
    epochs = []
    for _ in range(2):
        loader.batch_sampler.sampler.set_epoch(4)  # type: ignore[union-attr]
        epochs.append(list(loader.batch_sampler))  # type: ignore[arg-type]
    assert epochs[0] == epochs[1]


def test_a_framework_that_puts_its_own_sampler_in_place_gets_the_remedy() -> None:
    other = DistributedSampler(range(8), num_replicas=2, rank=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"labels: .*DistributedSampler.*use_distributed_sampler"):
        PKSampler(other, batch_size=4, drop_last=False)  # type: ignore[call-arg]


def test_a_framework_that_shares_batches_by_itself_covers_the_epoch_with_one_replica() -> None:
    labels = labels_of_sizes([6] * 8)
    shares = [
        list(itertools.islice(PKSampler(labels, 2, 2, num_replicas=1, rank=0), rank, None, 2))
        for rank in range(2)
    ]
    assert {i for share in shares for batch in share for i in batch} == set(range(48))


def test_a_million_labels_of_ten_thousand_classes_are_covered() -> None:
    labels = np.random.default_rng(0).integers(0, 10_000, 1_000_000)
    batches = np.array(list(PKSampler(labels, 64, 4)))
    classes = np.sort(labels[batches], axis=1)[:, ::4]
    assert (np.diff(classes, axis=1) > 0).all()
    assert (np.bincount(batches.ravel(), minlength=len(labels)) >= 1).all()


@pytest.mark.parametrize(
    ("arguments", "keywords", "error", "says"),
    [
        (([0.0, 1.0], 1, 1), {}, TypeError, "labels.*float32"),
        ((["cat", "dog"], 1, 1), {}, TypeError, "labels: expected an integer"),
        (([], 1, 1), {}, (TypeError, ValueError), "labels"),
        (([[0, 1]], 1, 1), {}, ValueError, r"labels.*\(1, 2\)"),
        (([0, -1], 1, 1), {}, ValueError, "labels.*-1"),
        (([0, 1], 3, 1), {}, ValueError, "classes_per_batch: .*at most the 2 usable of 2 .*got 3"),
        (
            ([0, 0, 1], 2, 2),
            {"short_classes": "drop"},
            ValueError,
            "at most the 1 usable of 2.*short_classes='drop'",
        ),
        (([0, 1], 0, 1), {}, ValueError, "classes_per_batch.*0"),
        (([0, 1], 1, -2), {}, ValueError, "samples_per_class.*-2"),
        (([0, 1], 1.5, 1), {}, TypeError, r"classes_per_batch.*1\.5"),
        (([0, 1], 1, 1), {"seed": "a"}, TypeError, "seed.*'a'"),
        (([0, 1], 1, 1), {"short_classes": "keep"}, ValueError, "short_classes.*'keep'"),
        (([0, 1], 1, 1), {"num_replicas": 0}, ValueError, "num_replicas.*0"),
        (([0, 1], 1, 1), {"num_replicas": 2, "rank": 2}, ValueError, "rank.*num_replicas=2.*2"),
        (([0, 1], 1, 1), {"rank": -1}, ValueError, "rank.*-1"),
        (
            ([0, 1], 2, 1),
            {"drop_last": True, "num_replicas": 2},
            ValueError,
            "num_replicas=2.*drop_last=True.*got 1 full",
        ),
    ],
)
def test_wrong_arguments_are_named(
    arguments: tuple[Any, ...], keywords: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        PKSampler(*arguments, **keywords)


def test_a_wrong_epoch_is_named() -> None:
    with pytest.raises(TypeError, match=r"epoch.*None"):
        PKSampler([0, 1], 1, 1).set_epoch(None)  # type: ignore[arg-type]
