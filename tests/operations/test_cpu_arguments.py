"""Arguments of the C++ operations: any strides, the same bits on any number of threads, errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_inputs import (
    CPU_KERNELS,
    EPS,
    classes,
    outcome,
    randn,
    regularizer_case,
    written,
)
from torch import Tensor

from cwbr_fused import reference
from cwbr_fused.operations import reference_bank

CPP = torch.ops.cwbr_fused

pytestmark = CPU_KERNELS


def strided(t: Tensor) -> Iterator[Tensor]:
    """The same values in layouts that reach a kernel in practice."""
    if t.dim() == 0:
        yield torch.stack([t + 1, t])[1]
        return
    other = ~t if t.dtype == torch.bool else t + 1
    yield torch.stack([t, other], dim=-1)[..., 0]
    yield torch.cat([other, t], dim=-1)[..., t.shape[-1] :]
    if t.dim() == 2:
        yield t.T.contiguous().T
        yield torch.cat([t, t])[: t.shape[0]].flip(0).flip(0)


def operations(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """Valid arguments of every operation."""
    features, planned = regularizer_case(40, (21, 530), 7, 9, dtype)
    order, offsets, pairs, weights = planned
    z = features[1]
    logits, targets = randn(40, 70, seed=5, dtype=dtype), classes(40, 7)
    groups = reference.group_by_class(targets, 2)
    mean, var = reference.class_moments(z, order, offsets, EPS)
    alpha = reference.confusion_weights(logits, *groups)
    saved = reference.regularizer(features, *planned, EPS, True)[1:]
    scalar = torch.tensor(0.7, dtype=mean.dtype)
    logits_of_20 = logits[:, :20].to(mean.dtype)
    seen = classes(20, 3) > 0
    confusions = reference_bank.top_confusions(logits_of_20, targets % 20, seen, 5)
    return {
        "group_by_class": (targets, 2),
        "class_moments": (z, order, offsets, EPS),
        "class_moments_backward": (var, mean, z, mean, var, order, offsets, EPS),
        "confusion_weights": (logits, *groups),
        "top_pairs": (alpha, 11),
        "plan": (logits, targets, 11, 2),
        "pair_distance": (mean, var, pairs, EPS),
        "pair_distance_backward": (weights, mean, var, pairs, EPS),
        "all_pair_distance": (mean, var, EPS),
        "all_pair_distance_backward": (alpha, mean, var, EPS),
        "weighted_overlap": (mean, var, alpha, EPS, True),
        "weighted_overlap_backward": (scalar, scalar, mean, var, alpha, EPS, False),
        "weighted_overlap_with_gradient": (scalar, mean, var, alpha, EPS, True),
        "regularizer": (features, *planned, EPS, False),
        "regularizer_backward": (scalar, features, *saved, *planned, EPS, True),
        "top_confusions": (logits, targets, classes(70, 2) > 0, 5),
        "class_attraction": attraction(z, mean, var[0], targets % 20, seen, confusions),
        **bank_operations(70, mean, var),
    }


def split(matrix: Tensor) -> list[Tensor]:
    """The columns of two layers."""
    middle = matrix.shape[-1] // 3
    return [matrix[..., :middle].contiguous(), matrix[..., middle:].contiguous()]


def attraction(
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    targets: Tensor,
    seen: Tensor,
    confusions: tuple[Tensor, Tensor, Tensor],
) -> tuple[Any, ...]:
    """Two layers, two own classes for each sample."""
    rivals, weight, own = confusions
    labels = torch.stack([targets, (targets + 1) % len(mean)], 1)
    shares = (labels % 3).to(mean.dtype)
    unit = torch.tensor([0.5, 2], dtype=mean.dtype)
    return z, split(mean), var, unit, labels, shares, own, rivals, weight, seen, 0.7


def bank_operations(count: int, mean: Tensor, var: Tensor) -> dict[str, tuple[Any, ...]]:
    """Of those that write into a bank of `count` classes, for batch moments (K, D)."""
    groups, dims = mean.shape
    counts = [(torch.arange(count) % 3 + layer).to(mean.dtype) for layer in range(2)]
    bank = split(randn(count, dims, dtype=mean.dtype)), counts
    rows = torch.arange(groups).flip(0) - 1
    size = (torch.arange(groups) % 5).to(mean.dtype)
    updates = [torch.tensor(3, dtype=mean.dtype), torch.tensor(7, dtype=mean.dtype)]
    return {
        "observe_classes": (*bank, split(var[0]), updates, rows, size, mean, var, 0.9, 1e-3),
        "follow_classes": (*bank, rows, torch.stack([size, 2 * size]), mean, 0.7),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", operations())
def test_every_argument_is_read_by_its_strides(name: str, dtype: torch.dtype) -> None:
    arguments = operations(dtype)[name]
    operation = getattr(CPP, name)
    expected = outcome(operation, name, arguments)
    for position, argument in enumerate(arguments):
        if position in written(name):
            continue
        if isinstance(argument, Tensor):
            variants = list(strided(argument))
        elif isinstance(argument, list):
            variants = [list(v) for v in zip(*map(strided, argument), strict=True)]
        else:
            continue
        for variant in variants:
            given = (*arguments[:position], variant, *arguments[position + 1 :])
            for result, wanted in zip(outcome(operation, name, given), expected, strict=True):
                torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def test_expanded_features_and_gradients_are_read_by_their_strides() -> None:
    arguments = operations()
    z, order, offsets, _ = arguments["class_moments"]
    row = z[:1].expand(len(z), -1)
    copies = row.contiguous()
    mean, var = CPP.class_moments(copies, order, offsets, EPS)
    torch.testing.assert_close(CPP.class_moments(row, order, offsets, EPS), (mean, var))
    ones = torch.ones(()).expand(mean.shape)
    for g in (ones, mean[:1].expand(mean.shape)):
        expected = CPP.class_moments_backward(
            g.contiguous(), g.contiguous(), copies, mean, var, order, offsets, EPS
        )
        actual = CPP.class_moments_backward(g, g, row, mean, var, order, offsets, EPS)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


LARGE = (260, (1100, 40, 2000), 60, 300)  # several slices, above every grain


def large_operations() -> dict[str, tuple[Any, ...]]:
    features, planned = regularizer_case(*LARGE, torch.float32)
    order, offsets = planned[:2]
    logits, targets = randn(260, 3000, seed=5), classes(260, 60)
    mean, var = reference.class_moments(features[2], order, offsets, EPS)
    saved = CPP.regularizer(features, *planned, EPS, True)[1:]
    groups = CPP.group_by_class(targets, 2)
    seen = classes(len(mean), 3) > 0
    confusions = reference_bank.top_confusions(logits[:, : len(mean)], targets % len(mean), seen, 5)
    return {
        "class_moments": (features[2], order, offsets, EPS),
        "class_moments_backward": (mean, var, features[2], mean, var, order, offsets, EPS),
        "confusion_weights": (logits, *groups),
        "plan": (logits, targets, 300, 2),
        "regularizer": (features, *planned, EPS, True),
        "regularizer_backward": (torch.ones(()), features, *saved, *planned, EPS, True),
        "top_confusions": (logits, targets, classes(3000, 2) > 0, 5),
        "class_attraction": attraction(
            features[2], mean, var[0], targets % len(mean), seen, confusions
        ),
        **bank_operations(3000, mean, var),
    }


@pytest.mark.parametrize(
    "name",
    [
        "class_moments",
        "class_moments_backward",
        "confusion_weights",
        "plan",
        "regularizer",
        "regularizer_backward",
        "top_confusions",
        "class_attraction",
        "observe_classes",
        "follow_classes",
    ],
)
def test_result_is_bitwise_the_same_for_any_number_of_threads(name: str) -> None:
    arguments = large_operations()[name]
    operation = getattr(CPP, name)
    expected = outcome(operation, name, arguments)
    for threads in (2, 3, 7, 1):
        torch.set_num_threads(threads)
        for _ in range(2):
            for result, wanted in zip(outcome(operation, name, arguments), expected, strict=True):
                assert torch.equal(result, wanted)


def replaced(name: str, position: int, value: Any) -> tuple[Any, ...]:
    arguments = operations()[name]
    return (*arguments[:position], value, *arguments[position + 1 :])


BAD = [
    ("group_by_class", 0, torch.rand(4), "targets"),
    ("group_by_class", 0, torch.zeros(2, 2, dtype=torch.int64), "targets"),
    ("group_by_class", 1, 0, "min_count"),
    ("class_moments", 0, torch.rand(40), "z"),
    ("class_moments", 0, torch.zeros(40, 2, dtype=torch.int64), "z"),
    ("class_moments", 1, torch.arange(39), "order"),
    ("class_moments", 1, torch.arange(40) + 1, "order"),
    ("class_moments", 1, torch.arange(40) - 1, "order"),
    ("class_moments", 1, torch.arange(40).int(), "order"),
    ("class_moments", 2, torch.tensor([0, 7, 5]), "offsets"),
    ("class_moments", 2, torch.tensor([0, 41]), "offsets"),
    ("class_moments", 2, torch.tensor([-1, 4]), "offsets"),
    ("class_moments", 2, torch.zeros(0, dtype=torch.int64), "offsets"),
    ("class_moments_backward", 0, torch.rand(3, 3), "grad_mean"),
    ("class_moments_backward", 1, torch.rand(20, 530).double(), "grad_var"),
    ("class_moments_backward", 3, torch.rand(20, 529), "mean"),
    ("class_moments_backward", 4, torch.rand(19, 530), "var"),
    ("confusion_weights", 0, torch.rand(41, 70), "order"),
    ("confusion_weights", 3, torch.full((20,), 70), "classes"),
    ("confusion_weights", 3, torch.zeros(19, dtype=torch.int64), "classes"),
    ("top_pairs", 0, torch.rand(4, 5), "alpha"),
    ("top_pairs", 0, torch.rand(4, 4).half(), "alpha"),
    ("top_pairs", 1, -1, "top_m"),
    ("plan", 0, torch.rand(39, 70), "targets"),
    ("plan", 1, torch.full((40,), 70), "targets"),
    ("plan", 1, torch.full((40,), -1), "targets"),
    ("plan", 2, -1, "top_m"),
    ("plan", 3, 0, "min_count"),
    ("pair_distance", 1, torch.rand(20, 1), "var"),
    ("pair_distance", 2, torch.tensor([[0, 20]]), "pairs"),
    ("pair_distance", 2, torch.tensor([[-1, 2]]), "pairs"),
    ("pair_distance", 2, torch.tensor([[0, 1, 2]]), "pairs"),
    ("pair_distance_backward", 0, torch.rand(3), "grad"),
    ("all_pair_distance", 0, torch.rand(3), "mean"),
    ("all_pair_distance_backward", 0, torch.rand(20, 19), "grad"),
    ("weighted_overlap", 2, torch.rand(19, 19), "alpha"),
    ("weighted_overlap_backward", 0, torch.rand(1), "grad"),
    ("weighted_overlap_backward", 1, torch.rand(()).double(), "value"),
    ("weighted_overlap_with_gradient", 0, torch.rand(()).double(), "grad"),
    ("weighted_overlap_with_gradient", 3, torch.rand(20, 19), "alpha"),
    ("regularizer", 0, [], "features"),
    ("regularizer", 0, [torch.rand(40, 3), torch.rand(39, 3)], "features"),
    ("regularizer", 0, [torch.rand(40, 3).double()], "features"),
    ("regularizer", 3, torch.full((9, 2), 20), "pairs"),
    ("regularizer", 4, torch.rand(8), "weights"),
    ("regularizer_backward", 0, torch.rand(2), "grad"),
    ("regularizer_backward", 2, [torch.rand(20, 21)], "mean"),
    ("regularizer_backward", 3, [torch.rand(20, 21)], "var"),
    ("regularizer_backward", 4, torch.rand(2, 8), "distance"),
    ("top_confusions", 0, torch.rand(39, 70), "targets"),
    ("top_confusions", 0, torch.zeros(40, 70, dtype=torch.int64), "logits"),
    ("top_confusions", 1, torch.full((40,), 70), "targets"),
    ("top_confusions", 1, torch.full((40,), -1), "targets"),
    ("top_confusions", 2, torch.ones(69, dtype=torch.bool), "seen"),
    ("top_confusions", 2, torch.ones(70), "seen"),
    ("top_confusions", 3, -1, "top"),
    ("class_attraction", 0, torch.rand(40, 529), "z"),
    ("class_attraction", 1, [], "mean"),
    ("class_attraction", 1, [torch.rand(20, 500), torch.rand(19, 30)], "mean"),
    ("class_attraction", 1, [torch.rand(20, 530).double()], "mean"),
    ("class_attraction", 2, torch.rand(1, 530), "var"),
    ("class_attraction", 3, torch.rand(3), "unit"),
    ("class_attraction", 4, torch.full((40, 2), 20), "labels"),
    ("class_attraction", 5, torch.rand(40, 1), "shares"),
    ("class_attraction", 6, torch.rand(39), "own"),
    ("class_attraction", 7, torch.full((40, 5), 20), "rivals"),
    ("class_attraction", 7, torch.zeros(40, 5), "rivals"),
    ("class_attraction", 8, torch.rand(40, 4), "weight"),
    ("class_attraction", 9, torch.ones(19, dtype=torch.bool), "seen"),
    ("observe_classes", 0, [torch.rand(70, 176), torch.rand(70, 353)], "batch_mean"),
    ("observe_classes", 1, [torch.rand(70), torch.rand(69)], "count"),
    ("observe_classes", 1, [torch.rand(70)], "count"),
    ("observe_classes", 2, [torch.rand(176), torch.rand(355)], "var"),
    ("observe_classes", 2, [torch.rand(352)[::2], torch.rand(354)], "var"),
    ("observe_classes", 3, [torch.rand(1), torch.rand(1)], "updates"),
    ("observe_classes", 4, torch.full((20,), 70), "classes"),
    ("observe_classes", 4, torch.full((20,), -2), "classes"),
    ("observe_classes", 5, torch.ones(20, dtype=torch.int64), "size"),
    ("observe_classes", 6, torch.rand(19, 530), "batch_mean"),
    ("observe_classes", 7, torch.rand(20, 530).double(), "batch_var"),
    ("follow_classes", 0, [torch.rand(176, 70).T, torch.rand(70, 354)], "mean"),
    ("follow_classes", 1, [torch.rand(70), torch.rand(71)], "count"),
    ("follow_classes", 2, torch.full((20,), 70), "classes"),
    ("follow_classes", 3, torch.rand(20), "weight"),
    ("follow_classes", 4, torch.rand(20, 529), "batch_mean"),
]


@pytest.mark.parametrize(("name", "position", "value", "argument"), BAD)
def test_a_bad_argument_is_an_error_that_names_it(
    name: str, position: int, value: Any, argument: str
) -> None:
    with pytest.raises(RuntimeError, match=rf"cwbr_fused: {argument}: expected"):
        getattr(CPP, name)(*replaced(name, position, value))
