"""Triton's batch kernels: what they promise beyond `test_batch_kernels.py`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_inputs import DEVICE, EPS, TRITON, assert_near, classes, randn

from cwbr_fused import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def assert_equal(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_groups_of_a_batch_of_many_blocks_equal_the_reference() -> None:
    targets = classes(1500, 600)
    assert_equal(TRITON.group_by_class(targets, 2), reference.group_by_class(targets, 2))


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
