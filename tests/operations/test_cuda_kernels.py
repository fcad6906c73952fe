"""The CUDA kernels, executed on an emulated GPU, against float64 truth.

The kernels' source is the one that nvcc compiles. The emulation shuffles the order of threads and
blocks, fills shared memory and results with NaN, faults on accesses outside of a tensor, and gives
the fast reciprocal and logarithm the largest errors that NVIDIA documents for them.

Here: the regularizer, and what holds for all kernels.
"""

from __future__ import annotations

import pytest
import torch
from emulation.checks import check, planned, some_moments, some_pairs, some_targets
from emulation.harness import EmulationError, Emulator, emulated_library
from kernel_inputs import DTYPES, EPS, randn
from torch import Tensor

from cwbr_fused import reference


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(5,), (64, 7, 600)])
def test_regularizer_takes_two_launches_each_way(
    gpu: Emulator, dtype: torch.dtype, log: bool, dims: tuple[int, ...]
) -> None:
    features, order, offsets, pairs, weights = planned(dtype, dims)
    plan = (order, offsets, pairs, weights, EPS, log)
    _, mean, var, distance = check(gpu, "regularizer", features, *plan, factor=2)
    assert gpu.launches == 2
    grad = torch.tensor(0.7, dtype=weights.dtype)
    args = (grad, features, mean, var, distance, *plan)
    check(gpu, "regularizer_backward", *args, factor=4)
    assert gpu.launches == 2


def test_more_layers_than_one_launch_holds(gpu: Emulator) -> None:
    features, *plan = planned(torch.float32, (3,) * 35)
    _, mean, var, distance = check(gpu, "regularizer", features, *plan, EPS, False, factor=2)
    args = (torch.ones(()), features, mean, var, distance, *plan, EPS, False)
    check(gpu, "regularizer_backward", *args, factor=4)


def test_a_batch_without_groups_regularizes_to_zero(gpu: Emulator) -> None:
    features = [randn(3, 4, dtype=torch.float32)]
    order, offsets, _, pairs, weights = reference.plan(
        torch.zeros(3, 5), torch.tensor([0, 1, 2]), 8, 4
    )
    value, mean, var, distance = gpu.regularizer(
        features, order, offsets, pairs, weights, EPS, False
    )
    assert value == 0
    args = (torch.ones(()), features, mean, var, distance, order, offsets, pairs, weights)
    (grad,) = gpu.regularizer_backward(*args, EPS, False)
    assert (grad == 0).all()


def test_nothing_in_gives_nothing_out(gpu: Emulator) -> None:
    none = torch.zeros(0, dtype=torch.long)
    check(gpu, "group_by_class", none, 2)
    groups = gpu.group_by_class(torch.tensor([1]), 2)
    check(gpu, "class_moments", torch.ones(1, 3), *groups[:2], EPS)
    check(gpu, "confusion_weights", torch.ones(1, 3), *groups)
    for rows, dims in ((0, 3), (1, 3), (5, 0)):
        mean, var, alpha = torch.zeros(rows, dims), torch.ones(rows, dims), torch.ones(rows, rows)
        check(gpu, "all_pair_distance", mean, var, EPS)
        check(gpu, "pair_distance", mean, var, torch.zeros(0, 2).long(), EPS)
        for log in (False, True):
            value = check(gpu, "weighted_overlap", mean, var, alpha, EPS, log)
            args = (torch.ones(()), value, mean, var, alpha, EPS, log)
            check(gpu, "weighted_overlap_backward", *args)


def test_results_do_not_depend_on_the_order_of_threads_or_blocks() -> None:
    mean, var = some_moments(70, 90, torch.float32)
    alpha, grad = randn(70, 70, dtype=torch.float32).abs(), randn(12, dtype=torch.float32)
    features, *plan = planned(torch.float32, (30, 9))
    y = some_targets(60, 9)

    def results(seed: int) -> list[Tensor]:
        gpu = Emulator(emulated_library(), processors=40)
        gpu.seed = seed
        value = gpu.weighted_overlap(mean, var, alpha, EPS, True)
        regularizer, *_, distance = gpu.regularizer(features, *plan, EPS, False)
        return [
            value,
            *gpu.weighted_overlap_backward(value, value, mean, var, alpha, EPS, True),
            *gpu.weighted_overlap_with_gradient(value, mean, var, alpha, EPS, False),
            *gpu.pair_distance_backward(grad, mean, var, some_pairs(70), EPS),
            *gpu.plan(features[0], y, 20, 2),
            regularizer,
            distance,
        ]

    first = results(1)
    for seed in (2, 3):
        for one, other in zip(first, results(seed), strict=True):
            assert torch.equal(one, other)


def test_indices_outside_their_tensor_stop_the_kernel(gpu: Emulator) -> None:
    logits, pairs = torch.zeros(4, 3), torch.tensor([[0, 5]])
    mean = var = torch.ones(5, 2)
    groups = reference.group_by_class(torch.tensor([3, 3, 0, 0]), 2)
    for y in (torch.tensor([0, 1, 3, 0]), torch.tensor([0, -1, 1, 0])):
        with pytest.raises(EmulationError, match="leaves"):
            gpu.plan(logits, y, 2, 2)
    with pytest.raises(EmulationError, match="leaves"):
        gpu.group_by_class(torch.tensor([-1, 0]), 2)
    with pytest.raises(EmulationError, match="leaves"):
        gpu.confusion_weights(logits, *groups)
    with pytest.raises(EmulationError, match="leaves"):
        gpu.pair_distance(mean, var, pairs, EPS)
    with pytest.raises(EmulationError, match="leaves"):
        gpu.pair_distance_backward(torch.ones(1), mean, var, pairs, EPS)
