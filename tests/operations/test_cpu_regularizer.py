"""The C++ regularizer against float64 truth, value and gradient."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import CPU_KERNELS, DTYPES, EPS, assert_near, regularizer_case

from cwbr_fused import reference
from cwbr_fused.operations import reference_backward

CPP = torch.ops.cwbr_fused

pytestmark = CPU_KERNELS

REGULARIZERS = {
    "several layers": (36, (40, 1, 700, 17), 5, 8),
    "two classes": (12, (9,), 2, 64),
    "one class": (6, (5, 3), 1, 4),
    "padding among the pairs": (30, (33,), 4, 100),
    "no samples": (0, (4,), 1, 4),
    "no pairs": (20, (4,), 5, 0),
    "many groups": (400, (300,), 190, 64),
}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REGULARIZERS)
def test_regularizer_and_its_gradient_equal_float64_truth(
    case: str, dtype: torch.dtype, log: bool
) -> None:
    features, planned = regularizer_case(*REGULARIZERS[case], dtype)
    truth_plan = *planned[:3], planned[3].double()
    doubles = [z.double() for z in features]
    truth = reference.regularizer(doubles, *truth_plan, EPS, log)
    value, *moments, distance = CPP.regularizer(features, *planned, EPS, log)
    assert moments == [[], []]
    positive = planned[3] > 0
    distances = truth[3][:, positive]
    # exp(-D) amplifies the relative error of D by D.
    scale = 4 * max([1.0, *distances.flatten().tolist()])
    assert_near(value, truth[0], scale)
    assert_near(distance[:, positive], distances, 4)
    assert distance.isfinite().all()

    grad = torch.tensor(-1.5, dtype=value.dtype)
    actual = CPP.regularizer_backward(grad, features, *moments, distance, *planned, EPS, log)
    expected = reference_backward.regularizer_backward(
        grad.double(), doubles, *truth[1:], *truth_plan, EPS, log
    )
    for result, wanted in zip(actual, expected, strict=True):
        assert result.dtype == dtype
        assert_near(result, wanted, scale)


def test_layers_of_mixed_precision_share_one_call() -> None:
    features, planned = regularizer_case(24, (30, 30, 30), 4, 6, torch.float32)
    mixed = [features[0], features[1].half(), features[2].bfloat16()]
    rounded = [z.float() for z in mixed]
    value, *saved = CPP.regularizer(mixed, *planned, EPS, False)
    expected, *expected_saved = CPP.regularizer(rounded, *planned, EPS, False)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    one = torch.ones(())
    grads = CPP.regularizer_backward(one, mixed, *saved, *planned, EPS, False)
    wanted = CPP.regularizer_backward(one, rounded, *expected_saved, *planned, EPS, False)
    for z, grad, full in zip(mixed, grads, wanted, strict=True):
        torch.testing.assert_close(grad, full.to(z.dtype), rtol=0, atol=0)
