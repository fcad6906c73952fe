"""What the batch kernels of every backend must do: float64 truth, and the reference's choices.

Sizes and layouts are those where kernels go wrong.
"""

from __future__ import annotations

import pytest
import torch
from kernel_backends import Kernels, assert_equal, kernels_of
from kernel_inputs import DTYPES, EPS, TARGETS, WEIGHTS, assert_near, classes, randn
from torch import Tensor

from cwbr_fused import reference
from cwbr_fused.operations import reference_backward

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=["cpu", "triton"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    return kernels_of(request.param)


@pytest.mark.parametrize("min_count", [1, 2, 3])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_groups_equal_the_reference_exactly(
    kernels: Kernels, targets: Tensor, min_count: int
) -> None:
    expected = reference.group_by_class(targets, min_count)
    assert_equal(kernels("group_by_class", targets, min_count), expected)


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.bool],
    ids=str,
)
def test_targets_of_any_integer_dtype_and_stride(kernels: Kernels, dtype: torch.dtype) -> None:
    targets = classes(30, 2 if dtype == torch.bool else 5)
    expected = reference.group_by_class(targets, 2)
    strided = torch.stack([targets, targets + 1], dim=1).to(dtype)[:, 0]
    for given in (targets.to(dtype), strided):
        assert_equal(kernels("group_by_class", given, 2), expected)


# (B, D, number of classes)
SHAPES = [
    (23, 1, 4),
    (24, 17, 3),
    (40, 1100, 6),
    (9, 1030, 1),
    (29, 5, 1),
    (33, 64, 30),
    (5, 0, 2),
    (0, 3, 1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_and_their_gradient_equal_float64_truth(
    kernels: Kernels, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    batch, dims, count = shape
    z = randn(batch, dims, dtype=dtype)
    order, offsets, _ = reference.group_by_class(classes(batch, count), 2)
    clamp = 0.5  # active for about half of the variances
    truth = reference.class_moments(z.double(), order, offsets, clamp)
    moments = kernels("class_moments", z, order, offsets, clamp)
    for result, expected in zip(moments, truth, strict=True):
        assert result.dtype == reference.accumulation_dtype(dtype)
        assert_near(result, expected)

    grads = [randn(*truth[0].shape, seed=s, dtype=moments[0].dtype) for s in (1, 2)]
    actual = kernels("class_moments_backward", *grads, z, *moments, order, offsets, clamp)
    expected = reference_backward.class_moments_backward(
        *(g.double() for g in grads), z.double(), *truth, order, offsets, clamp
    )
    assert actual.dtype == dtype
    assert_near(actual, expected)


def test_moments_of_huge_means_are_exact_to_rounding(kernels: Kernels) -> None:
    order, offsets, _ = reference.group_by_class(classes(64, 8), 2)
    for level in (0.0, 1e3, -1e5):
        z = (randn(64, 300, dtype=torch.float64) + level).float()
        mean, var = kernels("class_moments", z, order, offsets, EPS)
        true_mean, true_var = reference.class_moments(z.double(), order, offsets, EPS)
        torch.testing.assert_close(mean.double(), true_mean, rtol=1.2e-7, atol=1e-6)
        torch.testing.assert_close(var.double(), true_var, rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 1503])
def test_confusion_weights_equal_float64_truth(
    kernels: Kernels, columns: int, dtype: torch.dtype
) -> None:
    logits = (randn(48, columns) * 6).to(dtype)
    groups = reference.group_by_class(classes(48, min(columns, 20)), 2)
    truth = reference.confusion_weights(logits.double(), *groups)
    assert_near(kernels("confusion_weights", logits, *groups), truth, scale=2)


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize(
    ("groups", "top_m"), [(0, 3), (1, 3), (2, 5), (7, 4), (7, 21), (7, 0), (120, 300)]
)
def test_top_pairs_equal_the_reference_exactly(
    kernels: Kernels, groups: int, top_m: int, kind: str
) -> None:
    for alpha in (WEIGHTS[kind](groups), WEIGHTS[kind](groups).double()):
        assert_equal(kernels("top_pairs", alpha, top_m), reference.top_pairs(alpha, top_m))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_a_plan_is_its_three_operations_in_one(
    kernels: Kernels, targets: Tensor, dtype: torch.dtype
) -> None:
    """Zero-weight pairs of padding included, in the order of the reference."""
    targets = targets.unique(return_inverse=True)[1].to(torch.int32)
    logits = randn(len(targets), 60, dtype=dtype)
    for min_count, top_m in ((1, 5), (2, 1000), (3, 0)):
        groups = kernels("group_by_class", targets, min_count)
        chosen = kernels("top_pairs", kernels("confusion_weights", logits, *groups), top_m)
        assert_equal(kernels("plan", logits, targets, top_m, min_count), (*groups, *chosen))
