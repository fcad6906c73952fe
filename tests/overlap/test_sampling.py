"""PKSampler: every batch is P x K, an epoch covers the data, ranks share it, seeds decide it."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cwbr_fused.overlap.sampling import PKSampler

# What the arguments leave out is reported as it should be: tests/overlap/test_silence.py.
pytestmark = pytest.mark.filterwarnings("ignore::cwbr_fused.CWBRWarning")

Batches = list[list[int]]


def labels_of_sizes(sizes: Iterable[int]) -> list[int]:
    """Classes 0, 1, ... of these sizes, their samples interleaved through the dataset."""
    labels = [c for c, n in enumerate(sizes) for _ in range(n)]
    return [labels[i] for i in np.random.default_rng(0).permutation(len(labels))]


def merge(ranks: list[Batches]) -> Batches:
    """The schedule of all ranks in the order of time."""
    return [batch for step in zip(*ranks, strict=True) for batch in step]


def assert_p_classes_of_k(batches: Batches, labels: list[int], p: int, k: int) -> None:
    for batch in batches:
        classes = [labels[i] for i in batch]
        assert Counter(classes) == dict.fromkeys(classes, k)
        assert len(set(classes)) == p


def assert_no_sample_is_ahead_by_two(batches: Batches, labels: list[int]) -> None:
    """Within a class, at any time, every sample was used as often as any other, or once more."""
    uses = {c: {i: 0 for i, other in enumerate(labels) if other == c} for c in set(labels)}
    for batch in batches:
        for i in batch:
            uses[labels[i]][i] += 1
        for c in {labels[i] for i in batch}:
            assert max(uses[c].values()) - min(uses[c].values()) <= 1


datasets = st.lists(st.integers(1, 12), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None)
@given(
    sizes=datasets,
    p=st.integers(1, 5),
    k=st.integers(1, 5),
    replicas=st.integers(1, 3),
    short=st.sampled_from(["replace", "drop"]),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_usable_sample_is_used_once_before_any_of_its_class_is_used_twice(
    sizes: list[int], p: int, k: int, replicas: int, short: Any, shuffle: bool, seed: int
) -> None:
    usable = [c for c, n in enumerate(sizes) if short == "replace" or n >= k]
    assume(len(usable) >= p)
    labels = labels_of_sizes(sizes)
    samplers = [
        PKSampler(
            labels,
            p,
            k,
            seed=seed,
            short_classes=short,
            shuffle=shuffle,
            num_replicas=replicas,
            rank=rank,
        )
        for rank in range(replicas)
    ]
    batches = merge([list(sampler) for sampler in samplers])
    assert len(batches) == replicas * len(samplers[0])
    assert_p_classes_of_k(batches, labels, p, k)
    assert_no_sample_is_ahead_by_two(batches, labels)
    assert {i for batch in batches for i in batch} == {
        i for i, c in enumerate(labels) if c in usable
    }


@settings(max_examples=150, deadline=None)
@given(
    sizes=datasets,
    p=st.integers(1, 5),
    k=st.integers(1, 5),
    replicas=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_with_drop_last_no_sample_of_a_full_class_is_used_twice(
    sizes: list[int], p: int, k: int, replicas: int, seed: int
) -> None:
    labels = labels_of_sizes(sizes)
    chunks = [max(1, n // k) for n in sizes]
    fits = max(t for t in range(sum(chunks) + 1) if sum(min(c, t) for c in chunks) >= p * t)
    assume(len(sizes) >= p and fits >= replicas)
    batches = merge(
        [
            list(PKSampler(labels, p, k, seed=seed, drop_last=True, num_replicas=replicas, rank=r))
            for r in range(replicas)
        ]
    )
    assert len(batches) == fits // replicas * replicas
    assert_p_classes_of_k(batches, labels, p, k)
    appearances = Counter(labels[i] for batch in batches for i in batch[::k])
    assert all(appearances[c] <= chunks[c] for c in range(len(sizes)))
    uses = Counter(i for batch in batches for i in batch)
    assert all(n == 1 or sizes[labels[i]] < k for i, n in uses.items())


# ---- hand-computed schedules


def test_without_shuffling_classes_are_dealt_down_the_columns() -> None:
    # Samples 0-3 of class 0, 4-5 of class 1, 6-7 of class 2: appearances 0 0 | 1 2, two batches.
    sampler = PKSampler([0, 0, 0, 0, 1, 1, 2, 2], 2, 2, shuffle=False)
    assert list(sampler) == [[0, 1, 4, 5], [2, 3, 6, 7]]


def test_a_remainder_is_completed_by_the_first_samples_of_its_class() -> None:
    sampler = PKSampler([0, 0, 0, 1, 1, 1], 2, 2, shuffle=False)
    assert list(sampler) == [[0, 1, 3, 4], [2, 0, 5, 3]]


def test_a_class_that_runs_over_a_column_never_meets_itself() -> None:
    # Appearances 0 0 1 | 1 2 2 in columns of three: class 1 has row 2, so then takes row 0.
    sampler = PKSampler([0, 0, 1, 1, 2, 2], 2, 1, shuffle=False)
    assert list(sampler) == [[0, 2], [1, 4], [3, 5]]


def test_short_classes_repeat_their_samples_evenly_or_are_left_out() -> None:
    labels = [0, 0, 1, 1, 1, 1, 1]
    assert list(PKSampler(labels, 2, 5, shuffle=False)) == [[0, 1, 0, 1, 0, 2, 3, 4, 5, 6]]
    assert list(PKSampler(labels, 1, 5, shuffle=False, short_classes="drop")) == [[2, 3, 4, 5, 6]]


def test_drop_last_leaves_out_remainders_and_the_incomplete_batch() -> None:
    labels = [0, 0, 0, 1, 1, 2, 2]
    assert list(PKSampler(labels, 2, 2, shuffle=False, drop_last=True)) == [[0, 1, 3, 4]]


def test_a_dominant_class_is_in_every_batch_beside_the_others_in_proportion() -> None:
    labels = labels_of_sizes([40, 4, 8])
    batches = list(PKSampler(labels, 2, 2))
    classes = Counter(labels[i] for batch in batches for i in batch[::2])
    assert len(batches) == 20
    assert classes[0] == 20
    assert (classes[1], classes[2]) in {(6, 14), (7, 13), (8, 12)}
    assert len(PKSampler(labels, 2, 2, drop_last=True)) == 6


def test_ranks_take_every_second_batch_of_one_schedule() -> None:
    labels = labels_of_sizes([6] * 8)
    whole = list(PKSampler(labels, 3, 2, seed=5))
    ranks = [list(PKSampler(labels, 3, 2, seed=5, num_replicas=2, rank=r)) for r in (0, 1)]
    assert len(whole) == 8
    assert ranks == [whole[0::2], whole[1::2]]


# ---- randomness


def test_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    labels = labels_of_sizes([9] * 20)
    sampler = PKSampler(labels, 4, 3, seed=1)
    first = list(sampler)
    state = torch.random.get_rng_state()
    second = list(sampler)
    assert torch.equal(torch.random.get_rng_state(), state)
    sampler.set_epoch(1)
    assert list(sampler) == second
    assert second != first
    assert second != list(PKSampler(labels, 4, 3, seed=2))
    sampler.set_epoch(0)
    assert list(sampler) == first
    sampler.set_epoch(0)
    epoch_0 = iter(sampler)
    sampler.set_epoch(7)
    assert list(epoch_0) == first


def test_another_process_draws_the_same_epoch() -> None:
    code = (
        "from cwbr_fused import PKSampler\n"
        "sampler = PKSampler([i % 7 for i in range(50)], 3, 2, seed=11)\n"
        "sampler.set_epoch(4)\n"
        "print(list(sampler))"
    )
    root = Path(__file__).parents[2]
    here: dict[str, Any] = {}
    exec(code.replace("print(list(sampler))", "drawn = list(sampler)"), here)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout.strip() == str(here["drawn"])


def test_every_pair_of_classes_and_every_pair_of_times_is_equally_likely() -> None:
    # 14 classes appear twice each in 7 batches of 4, so some run over from column to column.
    labels = labels_of_sizes([4] * 14)
    sampler = PKSampler(labels, 4, 2)
    meetings = np.zeros((14, 14))
    times = np.zeros((7, 7))
    for epoch in range(600):
        sampler.set_epoch(epoch)
        table = [[labels[i] for i in batch[::2]] for batch in sampler]
        for classes in table:
            meetings[np.ix_(classes, classes)] += 1 / 600
        for c in range(14):
            first, second = (t for t, classes in enumerate(table) if c in classes)
            times[first, second] += 1 / (600 * 14)
    assert np.allclose(np.diag(meetings), 2)
    assert np.abs(meetings[~np.eye(14, dtype=bool)] - 2 * 3 / 13).max() < 0.12
    assert np.abs(times[np.triu_indices(7, 1)] - 1 / 21).max() < 0.012


def test_the_samples_that_meet_change_with_the_epoch() -> None:
    labels = labels_of_sizes([8] * 3)
    sampler = PKSampler(labels, 3, 2)
    partners: dict[int, set[int]] = {}
    for epoch in range(60):
        sampler.set_epoch(epoch)
        for batch in sampler:
            for a, b in pairwise(batch):
                if labels[a] == labels[b]:
                    partners.setdefault(a, set()).add(b)
                    partners.setdefault(b, set()).add(a)
    assert all(len(met) == 7 for met in partners.values())


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_class_that_starts_over_or_is_cut_short_changes_with_the_epoch(drop_last: bool) -> None:
    # 5 classes of 3 appearances in batches of 2: one place too many, or one appearance.
    labels = labels_of_sizes([6] * 5)
    sampler = PKSampler(labels, 2, 2, drop_last=drop_last)
    chosen: set[int] = set()
    for epoch in range(40):
        sampler.set_epoch(epoch)
        appearances = Counter(labels[i] for batch in sampler for i in batch[::2])
        (odd,) = [c for c, n in appearances.items() if n != 3]
        assert appearances[odd] == (2 if drop_last else 4)
        chosen.add(odd)
    assert chosen == set(range(5))
