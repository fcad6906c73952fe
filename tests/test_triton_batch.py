"""Triton's batch kernels (groups, moments, weights, pairs, plan) against float64 truth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_inputs import (
    ACCUMULATION_DTYPES,
    DEVICE,
    DTYPES,
    EPS,
    TRITON,
    assert_near,
    classes,
    rand,
    randn,
)

from cwbr_fused import reference, reference_backward

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

TARGETS = {
    "random": classes(157, 19),
    "more classes than samples": classes(40, 500),
    "one class": torch.full((7,), 3, device=DEVICE),
    "all singletons": torch.arange(9, device=DEVICE).flip(0),
    "one sample": torch.tensor([4], device=DEVICE),
    "no samples": torch.zeros(0, dtype=torch.int64, device=DEVICE),
    "high bytes only": torch.tensor([3 << 40, 1 << 40, 2 << 40, 1 << 40], device=DEVICE),
}


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("min_count", [1, 2, 3])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_groups_equal_the_reference_exactly(targets: Tensor, min_count: int) -> None:
    expected = reference.group_by_class(targets, min_count)
    assert_equal(TRITON.group_by_class(targets, min_count), expected)


def test_groups_of_a_batch_of_many_blocks_equal_the_reference() -> None:
    targets = classes(1500, 600)
    assert_equal(TRITON.group_by_class(targets, 2), reference.group_by_class(targets, 2))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.bool], ids=str)
def test_targets_of_any_integer_dtype_and_stride(dtype: torch.dtype) -> None:
    targets = classes(30, 2 if dtype == torch.bool else 5)
    expected = reference.group_by_class(targets, 2)
    strided = torch.stack([targets, targets + 1], dim=1).to(dtype)[:, 0]
    for given in (targets.to(dtype), strided):
        assert_equal(TRITON.group_by_class(given, 2), expected)


# (B, D, number of classes)
SHAPES = [(23, 1, 4), (24, 17, 3), (40, 1100, 6), (29, 5, 1), (33, 64, 30), (5, 0, 2), (0, 3, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_and_their_gradient_equal_float64_truth(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    batch, dims, count = shape
    z = randn(batch, dims, dtype=dtype)
    order, offsets, _ = reference.group_by_class(classes(batch, count), 2)
    clamp = 0.5  # active for about half of the variances
    truth = reference.class_moments(z.double(), order, offsets, clamp)
    moments = TRITON.class_moments(z, order, offsets, clamp)
    for result, expected in zip(moments, truth, strict=True):
        assert result.dtype == reference.accumulation_dtype(dtype)
        assert_near(result, expected)

    grads = [randn(*truth[0].shape, seed=s, dtype=moments[0].dtype) for s in (1, 2)]
    actual = TRITON.class_moments_backward(*grads, z, *moments, order, offsets, clamp)
    expected = reference_backward.class_moments_backward(
        *(g.double() for g in grads), z.double(), *truth, order, offsets, clamp
    )
    assert actual.dtype == dtype
    assert_near(actual, expected)


def test_variances_of_huge_means_are_exact_to_rounding() -> None:
    order, offsets, _ = reference.group_by_class(classes(64, 5), 2)
    for level in (0.0, 1e3, -1e5):
        z = (randn(64, 40, dtype=torch.float64) + level).float()
        _, var = TRITON.class_moments(z, order, offsets, EPS)
        _, true_var = reference.class_moments(z.double(), order, offsets, EPS)
        torch.testing.assert_close(var.double(), true_var, rtol=2e-6, atol=0)


def test_strided_and_expanded_tensors_give_what_their_copies_give() -> None:
    order, offsets, groups = reference.group_by_class(classes(20, 4), 2)
    wide = randn(20, 30)
    sliced, transposed, expanded = wide[:, 3:10], randn(7, 20).T, wide[:1, :7].expand(20, 7)
    grad = randn(len(groups), 1).expand(-1, 7)
    for z in (sliced, transposed, expanded):
        moments = TRITON.class_moments(z, order, offsets, EPS)
        assert_equal(moments, TRITON.class_moments(z.contiguous(), order, offsets, EPS))
        actual = TRITON.class_moments_backward(grad, grad, z, *moments, order, offsets, EPS)
        copies = (grad.contiguous(), grad.contiguous(), z.contiguous())
        expected = TRITON.class_moments_backward(*copies, *moments, order, offsets, EPS)
        assert_equal(actual, expected)
        weights = TRITON.confusion_weights(z, order, offsets, groups)
        copy = TRITON.confusion_weights(z.contiguous(), order, offsets, groups)
        assert_equal(weights, copy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 1503])
def test_confusion_weights_equal_float64_truth(columns: int, dtype: torch.dtype) -> None:
    logits = (randn(48, columns) * 6).to(dtype)
    groups = reference.group_by_class(classes(48, min(columns, 20)), 2)
    truth = reference.confusion_weights(logits.double(), *groups)
    actual = TRITON.confusion_weights(logits, *groups)
    assert_near(actual, truth, scale=2)


def test_confusion_weights_of_large_groups_and_masked_classes_equal_the_truth() -> None:
    logits = randn(150, 3) + torch.tensor([0.0, float("-inf"), 50.0], device=DEVICE)
    groups = reference.group_by_class(classes(150, 3), 2)
    truth = reference.confusion_weights(logits.double(), *groups)
    assert_near(TRITON.confusion_weights(logits, *groups), truth)


def test_a_class_beyond_the_logits_reads_nothing_out_of_bounds() -> None:
    targets = torch.tensor([0, 0, 9, 9], device=DEVICE)
    groups = reference.group_by_class(targets, 2)
    memory = torch.full((4, 20), float("nan"), device=DEVICE)
    memory[:, :3] = randn(4, 3)
    assert not TRITON.confusion_weights(memory[:, :3], *groups).isnan().any()


WEIGHTS = {
    "random": lambda k: rand(k, k),
    "equal": lambda k: torch.ones(k, k, device=DEVICE),
    "many ties": lambda k: (rand(k, k) * 4).floor(),
    "mostly zero": lambda k: rand(k, k) * (rand(k, k, seed=1) < 0.05),
    "tiny, huge and negative": lambda k: randn(k, k) * 10.0 ** (randn(k, k, seed=1) * 9),
    "infinite": lambda k: torch.where(rand(k, k) < 0.1, float("inf"), rand(k, k)),
    "nan": lambda k: torch.where(rand(k, k) < 0.1, float("nan"), rand(k, k)),
}


@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_top_pairs_equal_the_reference_exactly(kind: str, dtype: torch.dtype) -> None:
    for groups, top_m in ((2, 5), (7, 4), (7, 21), (120, 300)):
        alpha = WEIGHTS[kind](groups).to(dtype)
        pairs, weights = TRITON.top_pairs(alpha, top_m)
        expected_pairs, expected_weights = reference.top_pairs(alpha, top_m)
        assert torch.equal(pairs, expected_pairs)
        torch.testing.assert_close(weights, expected_weights, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("groups", [0, 1])
def test_fewer_than_two_groups_have_no_pairs(groups: int) -> None:
    pairs, weights = TRITON.top_pairs(rand(groups, groups), 3)
    assert pairs.shape == (0, 2)
    assert weights.shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_plan_is_its_three_operations_in_one(targets: Tensor, dtype: torch.dtype) -> None:
    targets = targets % 30
    logits = randn(len(targets), 30, dtype=dtype)
    for top_m in (3, 1000):
        groups = TRITON.group_by_class(targets, 2)
        chosen = TRITON.top_pairs(TRITON.confusion_weights(logits, *groups), top_m)
        assert_equal(TRITON.plan(logits, targets, top_m, 2), (*groups, *chosen))
