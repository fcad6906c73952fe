"""`weighted_overlap` with its gradient taken at once: the same numbers, from one pass."""

from __future__ import annotations

import pytest
import torch
from kernel_backends import assert_equal, kernels_of
from kernel_inputs import EPS, needs_cpu_kernels, rand, randn
from torch import Tensor

from cwbr_fused import reference
from cwbr_fused.operations import autograd, reference_backward

BACKENDS = ["cpu", "triton", "cuda"]


def near_moments(k: int, d: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Mean, var (K, D) of distances about 1, and alpha (K, K), a third of it 0."""
    mean, var = randn(k, d, seed=1) * 2 / d**0.5, 1 + rand(k, d, seed=2) / d**0.5
    alpha = (randn(k, k, seed=3) - 0.4).clamp(min=0)
    return mean.to(dtype), var.to(dtype), (alpha + alpha.T).to(dtype)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("k", "d"), [(0, 3), (1, 3), (2, 1), (35, 20)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_those_of_the_two_operations(
    backend: str, k: int, d: int, dtype: torch.dtype, log: bool
) -> None:
    kernels, moments = kernels_of(backend), near_moments(k, d, dtype)
    grad = torch.tensor(1.5, dtype=dtype)
    value = kernels("weighted_overlap", *moments, EPS, log)
    gradients = kernels("weighted_overlap_backward", grad, value, *moments, EPS, log)
    both = kernels("weighted_overlap_with_gradient", grad, *moments, EPS, log)
    assert_equal(both, (value, *gradients))


@needs_cpu_kernels
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("nearest", [0, 1099])
def test_blocks_of_rows_add_up_wherever_the_nearest_pair_is(nearest: int, log: bool) -> None:
    k, d = 1100, 24
    mean, var, alpha = near_moments(k, d)
    mean = mean * 12  # distances of tens and hundreds
    mean[550] = mean[nearest] + 0.1
    alpha[550, nearest] = alpha[nearest, 550] = 1.0
    grad = torch.tensor(-2.0)
    doubles = (mean.double(), var.double(), alpha.double(), EPS, log)
    truth = reference_backward.weighted_overlap_with_gradient(grad.double(), *doubles)
    actual = torch.ops.cwbr_fused.weighted_overlap_with_gradient(grad, mean, var, alpha, EPS, log)
    for result, true in zip(actual, truth, strict=True):
        assert (result - true).abs().max() <= 3e-6 * true.abs().max()
    assert all(gradient.abs().max() > 0 for gradient in actual[1:])


def leaves_of(*moments: Tensor) -> list[Tensor]:
    return [moment.clone().requires_grad_() for moment in moments]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_gradients_are_the_same_kept_or_computed_later(
    backend: str, log: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "reference":
        kernels_of(backend)
    mean, var, alpha = near_moments(11, 9)
    results = []
    for kept_bytes in (0, autograd.KEPT_BYTES):
        monkeypatch.setattr(autograd, "KEPT_BYTES", kept_bytes)
        leaves = leaves_of(mean, var)
        value = autograd.weighted_overlap(*leaves, alpha, EPS, log, backend)
        assert type(value.grad_fn).__name__.startswith(
            "OverlapWithGradient" if kept_bytes else "WeightedOverlap"
        )
        first = torch.autograd.grad(3 * value, leaves, retain_graph=True)
        second = torch.autograd.grad(-0.5 * value, leaves)
        results.append((value.detach(), *first, *second))
    torch.testing.assert_close(results[1], results[0], rtol=2e-6, atol=1e-7)


@needs_cpu_kernels
def test_large_gradients_are_left_to_the_backward_pass() -> None:
    mean, var, alpha = near_moments(8, autograd.KEPT_BYTES // 64 + 1)
    (leaf,) = leaves_of(mean)
    value = autograd.weighted_overlap(leaf, var, alpha, EPS, False, "cpu")
    assert type(value.grad_fn).__name__.startswith("WeightedOverlap")


@needs_cpu_kernels
def test_no_gradient_is_taken_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    mean, var, alpha = near_moments(8, 5)
    called: list[str] = []
    kernel = torch.ops.cwbr_fused.weighted_overlap
    monkeypatch.setitem(
        autograd.OPERATIONS,
        "cpu",
        type(
            "Spy", (), {"weighted_overlap": lambda *a: called.append("value") or kernel(*a[1:])}
        )(),
    )
    autograd.weighted_overlap(mean, var, alpha, EPS, False, "cpu")
    with torch.no_grad():
        autograd.weighted_overlap(*leaves_of(mean, var), alpha, EPS, False, "cpu")
    assert called == ["value", "value"]


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_overlaps_at_the_end_of_float32_keep_their_gradients(backend: str) -> None:
    """The published total multiplies a regularizer of 1e-38 by 1e6."""
    if backend != "reference":
        kernels_of(backend)
    mean, var, alpha = near_moments(3, 40)
    mean = mean + torch.tensor([0.0, 19.7, -19.7])[:, None] / 40**0.5 * 2**0.5
    double = [x.double() for x in (mean, var, alpha + 1)]
    distance = reference.all_pair_distance(*double[:2], EPS)
    assert 85 < distance[0, 1] < 100
    leaves = leaves_of(mean, var)
    value = autograd.weighted_overlap(*leaves, alpha + 1, EPS, False, backend)
    (1e6 * value).backward()
    truths = leaves_of(*double[:2])
    (1e6 * reference.weighted_overlap(*truths, double[2], EPS, False)).backward()
    for leaf, true in zip(leaves, truths, strict=True):
        assert leaf.grad is not None
        assert true.grad is not None
        torch.testing.assert_close(leaf.grad.double(), true.grad, rtol=1e-3, atol=0)
