"""The C++ pair kernels: as exact as float32 eager, equal to the reference in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_inputs import CPU_KERNELS, EPS, rand, randn
from pair_inputs import KINDS, double, moments, pairs_of, shapes
from torch import Tensor

from cwbr_fused import reference
from cwbr_fused.operations import autograd, reference_backward

CPP = torch.ops.cwbr_fused
ROUNDING = 2.0**-24

pytestmark = CPU_KERNELS


def assert_as_exact_as_eager(actual: Tensor, eager: Tensor, truth: Tensor, slack: float) -> None:
    """The error is at most eager's, plus `slack` roundings of the largest element.

    A few roundings are luck: eager's error on one or two pairs may well be none.
    """
    assert actual.dtype == torch.float32
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    error = float((actual.double() - truth).abs().max()) if truth.numel() else 0.0
    eager_error = float((eager.double() - truth).abs().max()) if truth.numel() else 0.0
    # Gradients below the normal range of float32 may be zero.
    bound = eager_error + slack * ROUNDING * largest + 1e-36
    assert error <= bound, f"error {error:.3g}, eager {eager_error:.3g}, largest {largest:.3g}"


def log_roundings(d: int) -> float:
    """Roundings that the logarithm of a product over d dimensions may cost."""
    return 8 + 2 * math.sqrt(d)


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_as_exact_as_eager(kind: str) -> None:
    for k, d in shapes(kind):
        mean, var = moments(kind, k, d)
        pairs = pairs_of(k)
        for name, indices in (("pair_distance", (pairs,)), ("all_pair_distance", ())):
            function = getattr(reference, name)
            truth = function(*double(mean, var), *indices, EPS)
            eager = function(mean, var, *indices, EPS)
            actual = getattr(CPP, name)(mean, var, *indices, EPS)
            assert_as_exact_as_eager(actual, eager, truth, slack=5)


@pytest.mark.parametrize("d", [1, 7, 16, 129, 300, 2048, 5000])
def test_the_smaller_a_distance_the_smaller_its_error(d: int) -> None:
    """Within few roundings of itself where it is near, else within those of its logarithm.

    Few are 16 here: var + eps is rounded before the difference of two variances is taken.
    """
    k = 24
    size = (10 ** torch.linspace(-6, 0.5, k))[:, None] / d**0.5  # of deviations from common rows
    mean = randn(1, d, seed=1) + size * randn(k, d, seed=2)
    var = (rand(1, d, seed=3) + 0.5) * torch.exp(size * randn(k, d, seed=4))
    pairs = torch.combinations(torch.arange(k))
    truth = reference.pair_distance(*double(mean, var), pairs, EPS)
    loss_of_logarithm = log_roundings(d) * ROUNDING
    near = truth < 1000 * loss_of_logarithm
    assert 0 < near.sum() < len(pairs)
    bound = 16 * ROUNDING * truth + torch.where(near, 0, loss_of_logarithm)
    for distance in (
        CPP.pair_distance(mean, var, pairs, EPS),
        CPP.all_pair_distance(mean, var, EPS)[tuple(pairs.T)],
    ):
        assert torch.all((distance.double() - truth).abs() <= bound)


def published_distance(mean: Tensor, var: Tensor, pairs: Tensor) -> Tensor:
    """The formula as it is published, one logarithm for each of three variances."""
    i, j = pairs.unbind(1)
    u = var + EPS
    s = (u[i] + u[j]) / 2
    terms = (mean[i] - mean[j]) ** 2 / (8 * s) + s.log() / 2 - u[i].log() / 4 - u[j].log() / 4
    return terms.sum(1)


@pytest.mark.parametrize("distance", [0.01, 0.1, 1, 3, 10, 100])
@pytest.mark.parametrize("d", [200, 768, 2048, 5000])
def test_moderate_distances_are_no_worse_than_the_published_formula_in_float32(
    d: int, distance: float
) -> None:
    """On average over the pairs; the reference, a log1p per dimension, is more exact than both."""
    k, size = 24, (2 * distance / d) ** 0.5
    common = torch.exp(2 * randn(1, d, seed=1))
    mean = size * common.sqrt() * randn(k, d, seed=2)
    var = common * torch.exp(size * 2**0.5 * randn(k, d, seed=3))
    pairs = torch.combinations(torch.arange(k))
    truth = reference.pair_distance(*double(mean, var), pairs, EPS)
    assert distance / 2 < truth.median() < 2 * distance
    published, listed, all_pairs = (
        float((x.double() - truth).square().mean().sqrt())
        for x in (
            published_distance(mean, var, pairs),
            CPP.pair_distance(mean, var, pairs, EPS),
            CPP.all_pair_distance(mean, var, EPS)[tuple(pairs.T)],
        )
    )
    assert max(listed, all_pairs) <= published


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_as_exact_as_eager(kind: str) -> None:
    for k, d in shapes(kind):
        mean, var = moments(kind, k, d)
        pairs = pairs_of(k)
        for name, indices, shape in (
            ("pair_distance_backward", (pairs,), (len(pairs),)),
            ("all_pair_distance_backward", (), (k, k)),
        ):
            grad = randn(*shape, seed=6)
            function = getattr(reference_backward, name)
            truths = function(*double(grad, mean, var), *indices, EPS)
            eagers = function(grad, mean, var, *indices, EPS)
            actuals = getattr(CPP, name)(grad, mean, var, *indices, EPS)
            for actual, eager, truth in zip(actuals, eagers, truths, strict=True):
                assert_as_exact_as_eager(actual, eager, truth, slack=8)


@pytest.mark.parametrize("d", [1, 16, 129, 300, 2048])
def test_variances_from_the_clamp_to_the_largest_float_in_one_row_lose_nothing(d: int) -> None:
    """Float32 eager is no measure: the sum of two variances is infinite."""
    k, largest = 12, torch.finfo(torch.float32).max
    mean, var = randn(k, d, seed=1), 10 ** (44.5 * rand(k, d, seed=2) - 6)
    var[0], var[1] = 1e-6, largest
    var[2:, 0], var[2:5, -1], var[5:8, -1] = 1e-6, largest, 1e-6
    mean[3], var[3] = mean[2], var[2]
    pairs = torch.combinations(torch.arange(k))
    truth = reference.pair_distance(*double(mean, var), pairs, EPS)
    for distance in (
        CPP.pair_distance(mean, var, pairs, EPS),
        CPP.all_pair_distance(mean, var, EPS)[tuple(pairs.T)],
    ):
        bound = 10 * ROUNDING * truth + log_roundings(d) * ROUNDING
        assert torch.all((distance.double() - truth).abs() <= bound)

    grad = randn(len(pairs), seed=3)
    matrix = torch.zeros(k, k).index_put(tuple(pairs.T), grad)
    truths = reference_backward.pair_distance_backward(*double(grad, mean, var), pairs, EPS)
    for gradients in (
        CPP.pair_distance_backward(grad, mean, var, pairs, EPS),
        CPP.all_pair_distance_backward(matrix, mean, var, EPS),
    ):
        for actual, true in zip(gradients, truths, strict=True):
            assert (actual.double() - true).abs().max() <= 10 * ROUNDING * true.abs().max()


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_overlap_and_its_gradient_are_as_exact_as_eager(kind: str, log: bool) -> None:
    for k, d in shapes(kind):
        mean, var = moments(kind, k, d)
        alpha = rand(k, k, seed=7)
        alpha = alpha + alpha.T
        m, v, a = double(mean, var, alpha)
        truth = reference.weighted_overlap(m, v, a, EPS, log)
        eager = reference.weighted_overlap(mean, var, alpha, EPS, log)
        actual = CPP.weighted_overlap(mean, var, alpha, EPS, log)
        # What a distance's own roundings do to exp(-distance).
        nearest = reference.all_pair_distance(m, v, EPS).fill_diagonal_(torch.inf).min()
        slack = 9 + 4 * float(nearest)
        assert_as_exact_as_eager(actual, eager, truth, slack=5 if log else slack)

        grad = torch.tensor(1.5)
        truths = reference_backward.weighted_overlap_backward(
            grad.double(), truth, m, v, a, EPS, log
        )
        eagers = reference_backward.weighted_overlap_backward(
            grad, eager, mean, var, alpha, EPS, log
        )
        actuals = CPP.weighted_overlap_backward(grad, actual, mean, var, alpha, EPS, log)
        for result, by_eager, true in zip(actuals, eagers, truths, strict=True):
            assert_as_exact_as_eager(result, by_eager, true, slack)


def float64_calls(kind: str, k: int, d: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every operation's name and arguments."""
    mean, var = double(*moments(kind, k, d))
    grad, alpha = double(randn(k, k, seed=6), rand(k, k, seed=7))
    pairs = pairs_of(k)
    yield "pair_distance", (mean, var, pairs, EPS)
    yield "pair_distance_backward", (randn(len(pairs), seed=8).double(), mean, var, pairs, EPS)
    yield "all_pair_distance", (mean, var, EPS)
    yield "all_pair_distance_backward", (grad, mean, var, EPS)
    for log in (False, True):
        value = reference.weighted_overlap(mean, var, alpha, EPS, log)
        yield "weighted_overlap", (mean, var, alpha, EPS, log)
        one = torch.ones((), dtype=torch.float64)
        yield "weighted_overlap_backward", (one, value, mean, var, alpha, EPS, log)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_equals_the_reference(kind: str) -> None:
    for k, d in shapes(kind):
        mean, var = double(*moments(kind, k, d))
        largest_distance = float(reference.all_pair_distance(mean, var, EPS).max())
        for name, arguments in float64_calls(kind, k, d):
            module = reference_backward if name.endswith("backward") else reference
            expected, actual = getattr(module, name)(*arguments), getattr(CPP, name)(*arguments)
            if isinstance(expected, Tensor):
                expected, actual = (expected,), (actual,)
            # exp(-D) makes D's relative error D times as large.
            relative = 1e-14 * (1 + largest_distance if "overlap" in name else 2)
            for result, wanted in zip(actual, expected, strict=True):
                bound = relative * float(wanted.abs().max()) + 1e-13 * math.sqrt(d)
                torch.testing.assert_close(result, wanted, rtol=0, atol=bound)


@pytest.mark.parametrize("k", [2, 5, 9])
def test_gradcheck_passes_on_the_kernels(k: int) -> None:
    mean, var = double(randn(k, 19, seed=1), rand(k, 19, seed=2) + 0.5)
    mean, var = (0.3 * mean).requires_grad_(), var.requires_grad_()
    alpha, pairs = rand(k, k, seed=3).double(), pairs_of(k)
    apply = torch.autograd.gradcheck
    assert apply(lambda m, v: autograd.PairDistance.apply(m, v, pairs, EPS, "cpu"), (mean, var))
    assert apply(lambda m, v: autograd.AllPairDistance.apply(m, v, EPS, "cpu"), (mean, var))
    for log in (False, True):
        assert apply(
            lambda m, v: autograd.weighted_overlap(m, v, alpha, EPS, log, "cpu"),  # noqa: B023
            (mean, var),
        )
