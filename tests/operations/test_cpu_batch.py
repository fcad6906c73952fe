"""The C++ batch kernels: what they promise beyond `test_batch_kernels.py`."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import CPU_KERNELS, DTYPES, EPS, WEIGHTS, classes, randn

from cwbr_fused import reference

CPP = torch.ops.cwbr_fused

pytestmark = CPU_KERNELS


@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_groups_of_negative_and_huge_targets_equal_the_reference_exactly(min_count: int) -> None:
    targets = torch.tensor([2**62, -5, 2**62, -(2**62), -5, 7, -(2**62)])
    expected = reference.group_by_class(targets, min_count)
    for result, wanted in zip(CPP.group_by_class(targets, min_count), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 1003])
def test_small_confusion_weights_are_as_exact_as_large_ones(
    columns: int, dtype: torch.dtype
) -> None:
    logits = (randn(48, columns) * 6).to(dtype)
    groups = reference.group_by_class(classes(48, min(columns, 20)), 2)
    truth = reference.confusion_weights(logits.double(), *groups)
    actual = CPP.confusion_weights(logits, *groups)
    relative = 1e-12 if dtype == torch.float64 else 5e-6
    torch.testing.assert_close(actual.double(), truth, rtol=relative, atol=1e-37)


def test_confusion_weights_keep_their_precision_far_below_the_maximum() -> None:
    """Probabilities down to 1e-37: the exponential is right to a few units in the last place."""
    logits = torch.linspace(-85, 0, 400).repeat(2, 1)
    targets = torch.tensor([399, 399])
    order, offsets, _ = reference.group_by_class(targets, 1)
    for column in range(0, 399, 7):
        pair = torch.tensor([column, 399])
        both = torch.tensor([0, 1, 2]), pair
        actual = CPP.confusion_weights(logits, order, *both)
        truth = reference.confusion_weights(logits.double(), order, *both)
        torch.testing.assert_close(actual.double(), truth, rtol=6e-7, atol=0)
    assert offsets.tolist() == [0, 2, 2]


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_special_logits_give_what_softmax_gives(special: float) -> None:
    targets = torch.tensor([0, 0, 1, 1, 2, 2])
    groups = reference.group_by_class(targets, 2)
    for width in (3, 40):
        for column in (0, width - 1):
            logits = randn(6, width)
            logits[2, column] = special
            torch.testing.assert_close(
                CPP.confusion_weights(logits, *groups),
                reference.confusion_weights(logits, *groups),
                equal_nan=True,
            )
        logits[4] = special
        torch.testing.assert_close(
            CPP.confusion_weights(logits, *groups),
            reference.confusion_weights(logits, *groups),
            equal_nan=True,
        )


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("groups", [1, 5, 41, 200])
def test_top_pairs_of_any_number_and_layout_equal_the_reference_exactly(
    groups: int, kind: str
) -> None:
    alpha = WEIGHTS[kind](groups)
    for given in (alpha, alpha.double(), alpha.T, alpha[:, :1].expand(-1, groups)):
        for top_m in (0, 1, 7, 300, 2**62):
            expected = reference.top_pairs(given, top_m)
            for result, wanted in zip(CPP.top_pairs(given, top_m), expected, strict=True):
                torch.testing.assert_close(result, wanted, rtol=0, atol=0, equal_nan=True)


def test_rounding_to_half_precision_is_torchs() -> None:
    """Subnormals, overflow, NaN and ties, through the one place that rounds."""
    bits = torch.arange(-(2**31), 2**31, 65_521, dtype=torch.int64).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.tensor([65519.0, 65520.0, 2.0**-25])])
    order, offsets = torch.arange(1), torch.tensor([0, 1])
    for dtype in (torch.float16, torch.bfloat16):
        z = torch.zeros(1, len(values), dtype=dtype)
        zero, one = torch.zeros(1, len(values)), torch.ones(1, len(values))
        grad = CPP.class_moments_backward(values[None], zero, z, zero, one, order, offsets, EPS)
        torch.testing.assert_close(grad[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)
        halves = torch.arange(2**16).to(torch.uint16).view(dtype)[None]
        mean, _ = CPP.class_moments(halves, order, offsets, EPS)
        torch.testing.assert_close(mean, halves.float(), rtol=0, atol=0, equal_nan=True)
