"""The CUDA batch kernels on an emulated GPU: groups, moments, weights, pairs, plan."""

from __future__ import annotations

import pytest
import torch
from emulation.checks import check, some_targets
from emulation.harness import Emulator
from kernel_inputs import ACCUMULATION_DTYPES, DTYPES, EPS, randn

from cwbr_fused import reference


@pytest.mark.parametrize(
    ("batch", "classes"), [(1, 1), (2, 1), (37, 13), (300, 100), (4100, 900), (9000, 3000)]
)
@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_groups_are_those_of_the_definition(
    gpu: Emulator, batch: int, classes: int, min_count: int
) -> None:
    check(gpu, "group_by_class", some_targets(batch, classes), min_count)
    assert gpu.launches == (1 if batch <= 4096 else 3)


@pytest.mark.parametrize("dims", [1, 7, 8, 520])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 25])
def test_moments_and_their_gradient(
    gpu: Emulator, dims: int, dtype: torch.dtype, classes: int
) -> None:
    order, offsets, _ = reference.group_by_class(some_targets(37, classes), 2)
    z = randn(37, dims, dtype=dtype)
    mean, var = check(gpu, "class_moments", z, order, offsets, EPS)
    assert gpu.launches == 1
    grads = [randn(*mean.shape, dtype=mean.dtype, seed=s) for s in (1, 2)]
    check(gpu, "class_moments_backward", *grads, z, mean, var, order, offsets, EPS)
    assert gpu.launches == 1


def test_no_gradient_passes_a_clamped_variance(gpu: Emulator) -> None:
    z = randn(6, 5, dtype=torch.float32)
    z[:, 2] = 0.25
    order, offsets, _ = reference.group_by_class(torch.tensor([4, 1, 1, 4, 4, 9]), 2)
    mean, var = gpu.class_moments(z, order, offsets, EPS)
    zeros, ones = torch.zeros_like(mean), torch.ones_like(var)
    grad = gpu.class_moments_backward(zeros, ones, z, mean, var, order, offsets, EPS)
    assert (grad[:, 2] == 0).all()
    assert (grad[5] == 0).all()
    assert (grad[:5, 0] != 0).all()


def test_gradients_may_begin_anywhere_in_memory(gpu: Emulator) -> None:
    """As `torch.cat([scalar, mean.flatten()])` hands them back: contiguous, but not aligned."""
    order, offsets, _ = reference.group_by_class(some_targets(37, 3), 2)
    z = randn(37, 8)
    moments = reference.class_moments(z, order, offsets, EPS)
    aligned = [randn(*mean.shape, seed=s) for s, mean in enumerate(moments)]
    shifted = [torch.cat([torch.ones(1), g.flatten()])[1:].view(g.shape) for g in aligned]
    assert all(g.is_contiguous() and g.data_ptr() % 16 == 4 for g in shifted)
    for grads in ((shifted[0], aligned[1]), (aligned[0], shifted[1])):
        check(gpu, "class_moments_backward", *grads, z, *moments, order, offsets, EPS)


def test_variances_far_from_zero_are_as_good_as_eager(gpu: Emulator) -> None:
    z = (1000 + randn(64, 33, dtype=torch.float64)).float()
    order, offsets, _ = reference.group_by_class(some_targets(64, 4), 2)
    truth = reference.class_moments(z.double(), order, offsets, EPS)[1]
    ours = gpu.class_moments(z, order, offsets, EPS)[1].double()
    eager = reference.class_moments(z, order, offsets, EPS)[1].double()
    assert (ours - truth).abs().max() <= max((eager - truth).abs().max(), 1e-6 * truth.max())


@pytest.mark.parametrize("columns", [13, 14, 100, 1003])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spread", [3, 30])
def test_confusion_weights(gpu: Emulator, columns: int, dtype: torch.dtype, spread: float) -> None:
    groups = reference.group_by_class(some_targets(90, 13), 2)
    logits = (spread * randn(90, columns)).to(dtype)
    check(gpu, "confusion_weights", logits, *groups, factor=4)
    assert gpu.launches == 2


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_confusion_weights_of_few_classes_and_many_samples(gpu: Emulator, columns: int) -> None:
    groups = reference.group_by_class(some_targets(150, columns), 2)
    check(gpu, "confusion_weights", randn(150, columns, dtype=torch.float16), *groups)


def test_masked_logits_have_no_weight_and_nan_stays_in_its_row(gpu: Emulator) -> None:
    y = torch.arange(5).repeat(8)
    groups = reference.group_by_class(y, 2)
    logits = randn(40, 300, dtype=torch.float32)
    logits[:, 100:] = -torch.inf
    check(gpu, "confusion_weights", logits, *groups)
    logits[2, 7] = torch.nan
    alpha = gpu.confusion_weights(logits, *groups)
    assert (alpha.isnan() == reference.confusion_weights(logits, *groups).isnan()).all()
    assert alpha[2, 3].isnan()
    assert not alpha[0, 1].isnan()


@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES)
@pytest.mark.parametrize(("rows", "top_m"), [(2, 5), (20, 1), (20, 64), (130, 300), (130, 9000)])
def test_top_pairs(gpu: Emulator, dtype: torch.dtype, rows: int, top_m: int) -> None:
    alpha = randn(rows, rows, dtype=dtype)
    check(gpu, "top_pairs", alpha, top_m)
    assert gpu.launches == 2


def test_ties_go_to_the_smaller_pair_and_nan_is_largest(gpu: Emulator) -> None:
    alpha = torch.zeros(100, 100)
    check(gpu, "top_pairs", alpha, 30)
    alpha[40, 41] = torch.nan
    alpha[3, 90] = torch.inf
    alpha[2, 3] = -0.0
    alpha[0, 1:] = -1.0
    ours, truth = gpu.top_pairs(alpha, 4000), reference.top_pairs(alpha, 4000)
    assert torch.equal(ours[0], truth[0])
    assert torch.equal(ours[1].nan_to_num(7), truth[1].nan_to_num(7))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_m", [0, 5, 200])
def test_plan_is_its_three_parts_in_four_launches(
    gpu: Emulator, dtype: torch.dtype, top_m: int
) -> None:
    logits, y = randn(60, 21, dtype=dtype), some_targets(60, 21)
    check(gpu, "plan", logits, y, top_m, 2)
    assert gpu.launches <= 4
