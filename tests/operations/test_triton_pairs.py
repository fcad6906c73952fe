"""Triton's pair kernels and the regularizer against float64 truth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_inputs import regularizer_with_moments
from torch import Tensor
from triton_inputs import (
    ACCUMULATION_DTYPES,
    DEVICE,
    DTYPES,
    EPS,
    TRITON,
    assert_near,
    planned,
    rand,
    randn,
    symmetric,
)

from cwbr_fused import reference
from cwbr_fused.operations import autograd, reference_backward

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# (K, D); 53 rows are an even number of blocks in float32, an odd one in float64.
SHAPES = [(2, 1), (5, 3), (53, 20), (3, 150), (1, 4)]


def moments(groups: int, dims: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means and variances whose distances are neither 0 nor beyond exp's range."""
    mean = randn(groups, dims, seed=2, dtype=dtype) * (6 / dims) ** 0.5
    return mean, torch.exp(randn(groups, dims, seed=3, dtype=dtype) * (3 / dims) ** 0.5)


def some_pairs(groups: int, count: int) -> Tensor:
    """Pairs with repeats, in no order, of which some have i > j and some i == j."""
    generator = torch.Generator().manual_seed(4)
    return torch.randint(groups, (count, 2), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_pair_distance_and_its_gradient_equal_float64_truth(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    mean, var = moments(*shape, dtype)
    pairs = some_pairs(shape[0], 41)
    truth = reference.pair_distance(mean.double(), var.double(), pairs, EPS)
    assert_near(TRITON.pair_distance(mean, var, pairs, EPS), truth)
    grad = randn(41, seed=5, dtype=dtype)
    actual = TRITON.pair_distance_backward(grad, mean, var, pairs, EPS)
    expected = reference_backward.pair_distance_backward(
        grad.double(), mean.double(), var.double(), pairs, EPS
    )
    for result, wanted in zip(actual, expected, strict=True):
        assert_near(result, wanted, scale=3)


@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_pair_distance_and_its_gradient_equal_float64_truth(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    mean, var = moments(*shape, dtype)
    distance = TRITON.all_pair_distance(mean, var, EPS)
    assert_near(distance, reference.all_pair_distance(mean.double(), var.double(), EPS))
    assert torch.equal(distance, distance.T)
    assert not distance.diagonal().any()
    grad = randn(shape[0], shape[0], seed=5, dtype=dtype)
    actual = TRITON.all_pair_distance_backward(grad, mean, var, EPS)
    expected = reference_backward.all_pair_distance_backward(
        grad.double(), mean.double(), var.double(), EPS
    )
    for result, wanted in zip(actual, expected, strict=True):
        assert_near(result, wanted, scale=3)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weighted_overlap_and_its_gradient_equal_float64_truth(
    shape: tuple[int, int], dtype: torch.dtype, log: bool
) -> None:
    mean, var = moments(*shape, dtype)
    alpha = symmetric(shape[0], dtype)
    double = (mean.double(), var.double(), alpha.double())
    truth = reference.weighted_overlap(*double, EPS, log)
    value = TRITON.weighted_overlap(mean, var, alpha, EPS, log)
    assert_near(value, truth, scale=5)
    grad = torch.tensor(3.0, dtype=dtype, device=DEVICE)
    actual = TRITON.weighted_overlap_backward(grad, value, mean, var, alpha, EPS, log)
    expected = reference_backward.weighted_overlap_backward(grad.double(), truth, *double, EPS, log)
    for result, wanted in zip(actual, expected, strict=True):
        assert_near(result, wanted, scale=10)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("groups", [0, 1, 6])
def test_weights_that_sum_to_zero_give_zero_and_zero_gradients(groups: int, log: bool) -> None:
    mean, var = moments(groups, 9, torch.float32)
    alpha = torch.zeros(groups, groups, device=DEVICE)
    value = TRITON.weighted_overlap(mean, var, alpha, EPS, log)
    assert value == 0
    grad = torch.ones((), device=DEVICE)
    for g in TRITON.weighted_overlap_backward(grad, value, mean, var, alpha, EPS, log):
        assert g.shape == mean.shape
        assert not g.any()


EXTREMES = {
    "all at the smallest variance": lambda k, d: torch.full((k, d), 1e-6),
    "all large": lambda k, d: torch.full((k, d), 1e6),
    "1e-6 to 1e6 in one row": lambda k, d: 10.0 ** (12 * rand(k, d, seed=7) - 6),
    "rows twelve decades apart": lambda k, d: 10.0 ** (12 * rand(k, 1, seed=7) - 6).expand(k, d),
    "half at the clamp": lambda k, d: torch.where(rand(k, d, seed=7) < 0.5, 1e-6, 1.0),
}


# eps sets the scale at which groups of dimensions share a denominator.
@pytest.mark.parametrize(("eps", "unit"), [(1e-6, 1.0), (1e-12, 1e-4), (1e-3, 1e3)])
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_variances_neither_overflow_nor_lose_precision(
    kind: str, eps: float, unit: float
) -> None:
    var = (EXTREMES[kind](5, 70) * unit).to(DEVICE, torch.float32)
    mean = randn(5, 70, seed=8) * var.sqrt()
    truth = reference.all_pair_distance(mean.double(), var.double(), eps)
    all_pairs = TRITON.all_pair_distance(mean, var, eps)
    i, j = torch.triu_indices(5, 5, offset=1, device=DEVICE)
    pairs = TRITON.pair_distance(mean, var, torch.stack([i, j], 1), eps)
    for actual, expected in ((all_pairs[i, j], truth[i, j]), (pairs, truth[i, j])):
        torch.testing.assert_close(actual.double(), expected, rtol=2e-6, atol=2e-6)
    grad = torch.ones(5, 5, device=DEVICE)
    actual = TRITON.all_pair_distance_backward(grad, mean, var, eps)
    expected = reference_backward.all_pair_distance_backward(
        grad.double(), mean.double(), var.double(), eps
    )
    for result, wanted in zip(actual, expected, strict=True):
        assert_near(result, wanted, scale=3)


@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES, ids=str)
@pytest.mark.parametrize("groups", [6, 40])
def test_variances_from_the_clamp_to_1e30_in_one_row_err_no_more_than_elsewhere(
    groups: int, dtype: torch.dtype
) -> None:
    """Beside tiles of ordinary rows, too. Each entry of the gradient errs by its own terms."""
    var = 10.0 ** (36 * rand(groups, 20, seed=7, dtype=torch.float64) - 6)
    var[6:] = torch.exp(randn(groups - 6, 20, seed=8))
    mean, var = (randn(groups, 20, seed=9) * var.sqrt()).to(dtype), var.to(dtype)
    i, j = torch.triu_indices(6, 6, offset=1, device=DEVICE)
    pairs = torch.stack([i, j], 1)
    truth = reference.all_pair_distance(mean.double(), var.double(), EPS)
    all_pairs = TRITON.all_pair_distance(mean, var, EPS)
    above = torch.ones_like(truth).triu(1).bool()
    for distance, true in (
        (all_pairs[above], truth[above]),
        (TRITON.pair_distance(mean, var, pairs, EPS), truth[i, j]),
    ):
        assert_near((distance / true).to(dtype), torch.ones_like(true))

    grad = torch.zeros(groups, groups, dtype=dtype, device=DEVICE)
    grad[i, j] = 1
    expected = reference_backward.all_pair_distance_backward(
        grad.double(), mean.double(), var.double(), EPS
    )
    u, m = var[:6].double() + EPS, mean[:6].double()
    t = (m[:, None] - m[None]) / (u[:, None] + u[None])
    terms = t.abs().sum(1) / 2, (1 / u[:, None] + t.square()).sum(1) / 4
    for gradients in (
        TRITON.all_pair_distance_backward(grad, mean, var, EPS),
        TRITON.pair_distance_backward(grad[i, j], mean, var, pairs, EPS),
    ):
        for actual, wanted, size in zip(gradients, expected, terms, strict=True):
            assert_near((1 + (actual - wanted)[:6] / size).to(dtype), torch.ones_like(size))
            assert not actual[6:].any()


def test_variances_whose_ratio_float32_cannot_hold_do_not_overflow() -> None:
    """From the clamp to the largest number: their sum, ratio and reciprocals are out of range."""
    far = 3.3e38
    var = torch.tensor([[0.0, 1, 3], [far, 2, far], [far / 2, far, 0], [1, 2, 3]], device=DEVICE)
    mean = randn(4, 3) * var.sqrt()
    i, j = torch.triu_indices(4, 4, offset=1, device=DEVICE)
    pairs = torch.stack([i, j], 1)
    truth = reference.all_pair_distance(mean.double(), var.double(), EPS)[i, j]
    for distance in (
        TRITON.pair_distance(mean, var, pairs, EPS),
        TRITON.all_pair_distance(mean, var, EPS)[i, j],
    ):
        torch.testing.assert_close(distance.double(), truth, rtol=1e-6, atol=0)

    grad = torch.zeros(4, 4, device=DEVICE)
    grad[i, j] = randn(6, seed=1)
    expected = reference_backward.all_pair_distance_backward(
        grad.double(), mean.double(), var.double(), EPS
    )
    for gradients in (
        TRITON.all_pair_distance_backward(grad, mean, var, EPS),
        TRITON.pair_distance_backward(grad[i, j], mean, var, pairs, EPS),
    ):
        for actual, wanted in zip(gradients, expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, rtol=1e-4, atol=1e-37)


def plain_distance(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    """The published formula as one writes it in PyTorch."""
    u = var + eps
    s = (u[:, None] + u[None]) / 2
    logs = s.log() / 2 - u.log()[:, None] / 4 - u.log()[None] / 4
    return ((mean[:, None] - mean[None]).square() / (8 * s) + logs).sum(-1)


def root_mean_square(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("level", [1e-5, 1.0, 1e4])
@pytest.mark.parametrize("apart", [0.01, 1.0])
def test_float32_distances_err_no_more_than_plain_eager_float32(level: float, apart: float) -> None:
    """Nearly equal and distinct classes, D = 256: the errors against float64.

    Where all variances are near 1 their logarithms are near 0, which eager rounds best; there the
    products of eight that replace eight logarithms cost up to 1.4 times eager's error.
    """
    var = torch.exp(apart * randn(12, 256, seed=9)) * level
    mean = apart * randn(12, 256, seed=10) * level**0.5
    i, j = torch.triu_indices(12, 12, offset=1, device=DEVICE)
    truth = reference.all_pair_distance(mean.double(), var.double(), EPS)[i, j]
    eager = root_mean_square(plain_distance(mean, var, EPS)[i, j] - truth)
    actual = root_mean_square(TRITON.all_pair_distance(mean, var, EPS)[i, j] - truth)
    assert actual <= (1.4 if level == 1 else 1.0) * eager


def layers(batch: int, dims: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Features of which classes overlap: some pairs' exp(-D) are well above 0."""
    return [randn(batch, d, seed=20 + n, dtype=dtype) * 0.5 for n, d in enumerate(dims)]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("top_m", [1, 7, 300], ids="top {}".format)
def test_regularizer_and_its_gradient_equal_float64_truth(
    top_m: int, dtype: torch.dtype, log: bool
) -> None:
    batch, count = 25, 6
    accumulation = reference.accumulation_dtype(dtype)
    order, offsets, pairs, weights = planned(batch, count, top_m, accumulation)
    features = layers(batch, (37, 1), dtype)
    clamp = 0.01
    double = [z.double() for z in features]
    plan64 = (order, offsets, pairs, weights.double(), clamp, log)
    truth = regularizer_with_moments(double, *plan64)
    arguments = (order, offsets, pairs, weights, clamp, log)
    value, mean, var, distance = TRITON.regularizer(features, *arguments)
    assert_near(value, truth[0], scale=5)
    assert_near(distance, truth[3])
    true_mean, true_var = truth[1:3]
    for result, wanted in zip((*mean, *var), (*true_mean, *true_var), strict=True):
        assert_near(result, wanted)
    grad = torch.tensor(2.0, dtype=accumulation, device=DEVICE)
    actual = TRITON.regularizer_backward(grad, features, mean, var, distance, *arguments)
    expected = reference_backward.regularizer_backward(grad.double(), double, *truth[1:], *plan64)
    for result, wanted in zip(actual, expected, strict=True):
        assert result.dtype == dtype
        assert_near(result, wanted, scale=20 if dtype == accumulation else 2)


@pytest.mark.parametrize("log", [False, True])
def test_the_regularizer_of_classes_as_wide_and_as_narrow_as_can_be_is_finite(log: bool) -> None:
    z = torch.tensor([[0, 0.1], [0, 0.3], [1e19, 0.2], [-1e19, 0.5]], device=DEVICE)
    order, offsets = torch.arange(4, device=DEVICE), torch.tensor([0, 2, 4], device=DEVICE)
    pairs, weights = torch.tensor([[0, 1]], device=DEVICE), torch.ones(1, device=DEVICE)
    truth = regularizer_with_moments(
        [z.double()], order, offsets, pairs, weights.double(), EPS, log
    )
    arguments = (order, offsets, pairs, weights, EPS, log)
    value, *saved = TRITON.regularizer([z], *arguments)
    torch.testing.assert_close(value.double(), truth[0], rtol=1e-5, atol=0)
    (actual,) = TRITON.regularizer_backward(torch.ones_like(value), [z], *saved, *arguments)
    (expected,) = reference_backward.regularizer_backward(
        torch.ones_like(truth[0]),
        [z.double()],
        *truth[1:],
        *arguments[:3],
        weights.double(),
        EPS,
        log,
    )
    # Times exp(-D) the gradient by a variance of 1e38 is too small a number.
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("log", [False, True])
def test_layers_of_different_precision_go_together(log: bool) -> None:
    order, offsets, pairs, weights = planned(20, 4, 5, torch.float32)
    features = [randn(20, 6), randn(20, 9, dtype=torch.bfloat16)]
    arguments = (order, offsets, pairs, weights, EPS, log)
    together = TRITON.regularizer(features, *arguments)
    alone = [TRITON.regularizer([z], *arguments) for z in features]
    torch.testing.assert_close(together[0], (alone[0][0] + alone[1][0]) / 2)
    grad = torch.ones((), device=DEVICE)
    gradients = TRITON.regularizer_backward(grad, features, *together[1:], *arguments)
    for n, (z, single) in enumerate(zip(features, alone, strict=True)):
        by_itself = TRITON.regularizer_backward(grad / 2, [z], *single[1:], *arguments)
        torch.testing.assert_close(gradients[n], by_itself[0], rtol=0, atol=0)


def test_expanded_and_sliced_inputs_give_what_their_copies_give() -> None:
    order, offsets, pairs, weights = planned(20, 4, 5, torch.float32)
    wide = randn(20, 30) * 0.3
    for z in (wide[:, 4:11], (randn(7, 20) * 0.3).T, wide[:, :1].expand(20, 7)):
        arguments = (order, offsets, pairs, weights, EPS, True)
        grad = torch.ones(1, device=DEVICE).expand(3)[1]
        results = []
        for features in ([z], [z.contiguous()]):
            value, *saved = TRITON.regularizer(features, *arguments)
            gradients = TRITON.regularizer_backward(grad, features, *saved, *arguments)
            results.append((value, *gradients))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_strided_moments_and_gradients_give_what_their_copies_give() -> None:
    wide, pairs = rand(9, 40) + 0.1, some_pairs(9, 12)
    mean, var, alpha = wide[:, 3:10], wide.T[3:10, :9].T, symmetric(9, torch.float32)
    calls: dict[str, tuple[Any, ...]] = {
        "pair_distance": (mean, var, pairs.T.contiguous().T, EPS),
        "pair_distance_backward": (randn(1).expand(12), mean, var, pairs, EPS),
        "all_pair_distance": (mean, var, EPS),
        "all_pair_distance_backward": (randn(9, 1).expand(9, 9), mean, var, EPS),
        "weighted_overlap": (mean, var, alpha.T, EPS, True),
        "weighted_overlap_with_gradient": (randn(2)[1], mean, var, alpha.T, EPS, True),
    }
    for name, arguments in calls.items():
        copies = (a.contiguous() if isinstance(a, Tensor) else a for a in arguments)
        actual, expected = (getattr(TRITON, name)(*given) for given in (arguments, copies))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


FUNCTIONS: dict[str, Any] = {
    "class_moments": lambda x: autograd.ClassMoments.apply(x["z"], *x["groups"], 0.01, "triton"),
    "pair_distance": lambda x: autograd.PairDistance.apply(
        *x["moments"], x["pairs"], EPS, "triton"
    ),
    "all_pair_distance": lambda x: autograd.AllPairDistance.apply(*x["moments"], EPS, "triton"),
    "overlap": lambda x: autograd.weighted_overlap(*x["moments"], x["alpha"], EPS, False, "triton"),
    "log_overlap": lambda x: autograd.weighted_overlap(
        *x["moments"], x["alpha"], EPS, True, "triton"
    ),
    "regularizer": lambda x: autograd.Regularizer.apply(
        *x["plan"], 0.01, True, "triton", x["z"], x["z"][:, :1] * 2
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_pass_gradcheck_in_float64(name: str) -> None:
    order, offsets, pairs, weights = planned(7, 3, 3, torch.float64)
    z = randn(7, 2, dtype=torch.float64)
    mean, var = moments(3, 2, torch.float64)
    fixed = {
        "plan": (order, offsets, pairs, weights),
        "groups": (order, offsets),
        "pairs": torch.tensor([[0, 1], [1, 2]], device=DEVICE),
        "alpha": symmetric(3, torch.float64),
    }

    def function(z: Tensor, mean: Tensor, var: Tensor) -> Any:
        return FUNCTIONS[name]({"z": z, "moments": (mean, var), **fixed})

    inputs = tuple(x.requires_grad_() for x in (z, mean, var))
    wanted = inputs[:1] if name in ("class_moments", "regularizer") else inputs[1:]
    for x in inputs:
        x.requires_grad_(any(x is w for w in wanted))
    torch.autograd.gradcheck(function, inputs, nondet_tol=0)
