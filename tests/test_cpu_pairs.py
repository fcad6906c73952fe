"""The C++ pair kernels: as exact as float32 eager, on every instruction set, at awkward sizes."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cwbr_fused import extension, ops, reference, reference_backward

EPS = 1e-6
CPP = torch.ops.cwbr_fused
ROUNDING = 2.0**-24

pytestmark = pytest.mark.skipif(
    extension.missing("cpu") is not None, reason=str(extension.missing("cpu"))
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def uniform(*shape: int, seed: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def moments(kind: str, k: int, d: int) -> tuple[Tensor, Tensor]:
    """Float32 means and variances (k, d) of the kind that breaks something."""
    mean, var = normal(k, d, seed=1), uniform(k, d, seed=2) + 0.1
    if kind == "means of 1000":
        mean = mean + 1000
    elif kind == "variances from 1e-6 to 1e6":
        var = 10 ** (12 * uniform(k, d, seed=3) - 6)
    elif kind == "variances at the clamp":
        var = torch.where(uniform(k, d, seed=3) < 0.6, 1e-6, 10 * var * uniform(k, 1, seed=4))
    elif kind == "huge":
        mean, var = 300 * mean, 1e5 * var
    elif kind == "nearly equal":
        mean, var = mean[:1] + 1e-3 * mean, var[:1] * (1 + 1e-3 * var)
    return mean.contiguous(), var.contiguous()


KINDS = (
    "plain",
    "means of 1000",
    "variances from 1e-6 to 1e6",
    "variances at the clamp",
    "huge",
    "nearly equal",
)
# Every remainder of the 4, 8 and 16 lanes, of tiles of 8 rows and of groups of 8 vectors.
SHAPES = (
    [(2, d) for d in range(1, 18)]
    + [(5, 31), (8, 100), (9, 128), (10, 129), (16, 200), (17, 256), (20, 777)]
    + [(3, 2048), (3, 5000), (40, 150)]
)


def shapes(kind: str) -> list[tuple[int, int]]:
    """With one shape whose rows are more than one block."""
    return [*SHAPES, (530, 5)] if kind == "plain" else SHAPES


def pairs_of(k: int) -> Tensor:
    """Some 2 k pairs in no order, of which many share rows."""
    generator = torch.Generator().manual_seed(5)
    i, j = torch.randint(k, (2, 2 * k + 3), generator=generator)
    return torch.stack([i, torch.where(i == j, (j + 1) % k, j)], dim=1)


def double(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.double() for t in tensors)


def assert_as_exact_as_eager(actual: Tensor, eager: Tensor, truth: Tensor, slack: float) -> None:
    """The error is at most 3 times eager's, plus `slack` roundings of the largest element."""
    assert actual.dtype == torch.float32
    largest = float(truth.abs().max()) if truth.numel() else 0.0
    error = float((actual.double() - truth).abs().max()) if truth.numel() else 0.0
    eager_error = float((eager.double() - truth).abs().max()) if truth.numel() else 0.0
    # Gradients below the normal range of float32 may be zero.
    bound = 3 * eager_error + slack * ROUNDING * largest + 1e-36
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
            slack = 6 + log_roundings(d) / max(float(truth.max()), 1e-30)
            assert_as_exact_as_eager(actual, eager, truth, slack)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_as_exact_as_eager(kind: str) -> None:
    for k, d in shapes(kind):
        mean, var = moments(kind, k, d)
        pairs = pairs_of(k)
        for name, indices, shape in (
            ("pair_distance_backward", (pairs,), (len(pairs),)),
            ("all_pair_distance_backward", (), (k, k)),
        ):
            grad = normal(*shape, seed=6)
            function = getattr(reference_backward, name)
            truths = function(*double(grad, mean, var), *indices, EPS)
            eagers = function(grad, mean, var, *indices, EPS)
            actuals = getattr(CPP, name)(grad, mean, var, *indices, EPS)
            for actual, eager, truth in zip(actuals, eagers, truths, strict=True):
                assert_as_exact_as_eager(actual, eager, truth, slack=10)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_overlap_and_its_gradient_are_as_exact_as_eager(kind: str, log: bool) -> None:
    for k, d in shapes(kind):
        mean, var = moments(kind, k, d)
        alpha = uniform(k, k, seed=7)
        alpha = alpha + alpha.T
        m, v, a = double(mean, var, alpha)
        truth = reference.weighted_overlap(m, v, a, EPS, log)
        eager = reference.weighted_overlap(mean, var, alpha, EPS, log)
        actual = CPP.weighted_overlap(mean, var, alpha, EPS, log)
        # What a distance's own roundings do to exp(-distance).
        nearest = reference.all_pair_distance(m, v, EPS).fill_diagonal_(torch.inf).min()
        slack = 10 + log_roundings(d) + 4 * float(nearest)
        value_slack = slack / max(abs(float(truth)), 1e-30) + 2 if log else slack
        assert_as_exact_as_eager(actual, eager, truth, value_slack)

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
    grad, alpha = double(normal(k, k, seed=6), uniform(k, k, seed=7))
    pairs = pairs_of(k)
    yield "pair_distance", (mean, var, pairs, EPS)
    yield "pair_distance_backward", (normal(len(pairs), seed=8).double(), mean, var, pairs, EPS)
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
    mean, var = double(normal(k, 19, seed=1), uniform(k, 19, seed=2) + 0.5)
    mean, var = (0.3 * mean).requires_grad_(), var.requires_grad_()
    alpha, pairs = uniform(k, k, seed=3).double(), pairs_of(k)
    apply = torch.autograd.gradcheck
    assert apply(lambda m, v: ops.PairDistance.apply(m, v, pairs, EPS, "cpu"), (mean, var))
    assert apply(lambda m, v: ops.AllPairDistance.apply(m, v, EPS, "cpu"), (mean, var))
    for log in (False, True):
        assert apply(
            lambda m, v: ops.WeightedOverlap.apply(m, v, alpha, EPS, log, "cpu"),  # noqa: B023
            (mean, var),
        )


def every_result(mean: Tensor, var: Tensor) -> list[Tensor]:
    """All six operations on these moments, with fixed other inputs."""
    k = mean.shape[0]
    pairs = pairs_of(k)
    alpha, grad = uniform(k, k, seed=3).to(mean), normal(k, k, seed=4).to(mean)
    results = [CPP.pair_distance(mean, var, pairs, EPS), CPP.all_pair_distance(mean, var, EPS)]
    results += CPP.pair_distance_backward(
        normal(len(pairs), seed=5).to(mean), mean, var, pairs, EPS
    )
    results += CPP.all_pair_distance_backward(grad, mean, var, EPS)
    for log in (False, True):
        value = CPP.weighted_overlap(mean, var, alpha, EPS, log)
        one = torch.ones((), dtype=mean.dtype)
        results += [value, *CPP.weighted_overlap_backward(one, value, mean, var, alpha, EPS, log)]
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("k", "d"), [(70, 1100), (600, 40)])
def test_results_are_the_same_bits_on_any_number_of_threads(
    k: int, d: int, dtype: torch.dtype
) -> None:
    mean, var = (0.05 * normal(k, d, seed=1)).to(dtype), (uniform(k, d, seed=2) + 0.5).to(dtype)
    once = every_result(mean, var)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for result, expected in zip(every_result(mean, var), once, strict=True):
            assert torch.equal(result, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("d", [1, 16, 129, 2048])
def test_equal_rows_have_distance_zero_and_no_gradient(d: int, dtype: torch.dtype) -> None:
    for kind in ("plain", "variances from 1e-6 to 1e6", "variances at the clamp"):
        mean, var = (t.to(dtype)[:1].repeat(9, 1) for t in moments(kind, 1, d))
        zeros = (
            CPP.all_pair_distance(mean, var, EPS),
            CPP.pair_distance(mean, var, pairs_of(9), EPS),
        )
        gradients = CPP.all_pair_distance_backward(torch.ones(9, 9, dtype=dtype), mean, var, EPS)
        for result in (*zeros, *gradients):
            assert torch.count_nonzero(result) == 0


@pytest.mark.parametrize("d", [1, 16, 129, 300, 2048])
def test_variances_from_the_clamp_to_the_largest_float_in_one_row_lose_nothing(d: int) -> None:
    """Float32 eager is no measure: the sum of two variances is infinite."""
    k, largest = 12, torch.finfo(torch.float32).max
    mean, var = normal(k, d, seed=1), 10 ** (44.5 * uniform(k, d, seed=2) - 6)
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

    grad = normal(len(pairs), seed=3)
    matrix = torch.zeros(k, k).index_put(tuple(pairs.T), grad)
    truths = reference_backward.pair_distance_backward(*double(grad, mean, var), pairs, EPS)
    for gradients in (
        CPP.pair_distance_backward(grad, mean, var, pairs, EPS),
        CPP.all_pair_distance_backward(matrix, mean, var, EPS),
    ):
        for actual, true in zip(gradients, truths, strict=True):
            assert (actual.double() - true).abs().max() <= 10 * ROUNDING * true.abs().max()


def test_the_matrix_is_symmetric_with_zeros_on_its_diagonal_and_never_negative() -> None:
    for kind in KINDS:
        for k, d in ((9, 30), (530, 5)):
            distance = CPP.all_pair_distance(*moments(kind, k, d), EPS)
            assert torch.equal(distance, distance.T)
            assert torch.count_nonzero(distance.diagonal()) == 0
            assert distance.min() == 0


@pytest.mark.parametrize("d", [3, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["mean", "var"])
def test_bad_rows_spoil_their_own_pairs_only(where: str, bad: float, d: int) -> None:
    k, row = 21, 10
    clean_mean, clean_var = moments("plain", k, d)
    mean, var = clean_mean.clone(), clean_var.clone()
    (mean if where == "mean" else var)[row, d // 2] = bad
    concerned = torch.zeros(k, k, dtype=torch.bool)
    concerned[row], concerned[:, row] = True, True
    concerned.fill_diagonal_(False)
    distance = CPP.all_pair_distance(mean, var, EPS)
    assert torch.equal(~distance.isfinite(), concerned)
    clean = CPP.all_pair_distance(clean_mean, clean_var, EPS)
    torch.testing.assert_close(distance[~concerned], clean[~concerned], rtol=1e-6, atol=1e-5)

    pairs = pairs_of(k)
    listed = CPP.pair_distance(mean, var, pairs, EPS)
    assert torch.equal(~listed.isfinite(), (pairs == row).any(1))
    for gradient in CPP.pair_distance_backward(torch.ones(len(pairs)), mean, var, pairs, EPS):
        spoilt = ~gradient.isfinite().all(1)
        partners = pairs[(pairs == row).any(1)].unique()
        assert set(spoilt.nonzero().flatten().tolist()) <= set(partners.tolist())
    assert not CPP.weighted_overlap(mean, var, torch.ones(k, k), EPS, False).isfinite() or (
        where == "mean" and bad == float("inf")  # exp(-inf) is an overlap of 0
    )


@pytest.mark.parametrize(("k", "d"), [(0, 4), (1, 4), (2, 0), (3, 1), (0, 0)])
def test_empty_and_single_sizes(k: int, d: int) -> None:
    mean, var = normal(k, d, seed=1), uniform(k, d, seed=2) + 0.1
    alpha = torch.ones(k, k)
    distance = CPP.all_pair_distance(mean, var, EPS)
    torch.testing.assert_close(distance, reference.all_pair_distance(mean, var, EPS))
    for gradient in CPP.all_pair_distance_backward(alpha, mean, var, EPS):
        assert gradient.shape == (k, d)
        assert gradient.isfinite().all()
    none = torch.zeros(0, 2, dtype=torch.int64)
    assert CPP.pair_distance(mean, var, none, EPS).shape == (0,)
    for gradient in CPP.pair_distance_backward(torch.zeros(0), mean, var, none, EPS):
        assert gradient.shape == (k, d)
        assert torch.count_nonzero(gradient) == 0
    for log in (False, True):
        value = CPP.weighted_overlap(mean, var, alpha, EPS, log)
        torch.testing.assert_close(value, reference.weighted_overlap(mean, var, alpha, EPS, log))
        for gradient in CPP.weighted_overlap_backward(
            torch.ones(()), value, mean, var, alpha, EPS, log
        ):
            assert gradient.shape == (k, d)
            assert gradient.isfinite().all()


@pytest.mark.parametrize("log", [False, True])
def test_weights_that_sum_to_zero_give_zero_with_zero_gradients(log: bool) -> None:
    mean, var = moments("plain", 9, 20)
    alpha = torch.zeros(9, 9)
    value = CPP.weighted_overlap(mean, var, alpha, EPS, log)
    assert value == 0
    gradients = CPP.weighted_overlap_backward(torch.ones(()), value, mean, var, alpha, EPS, log)
    assert all(torch.count_nonzero(g) == 0 for g in gradients)


def test_only_pairs_above_the_diagonal_of_alpha_count() -> None:
    mean, var = moments("nearly equal", 12, 40)
    alpha = uniform(12, 12, seed=1)
    spoilt = alpha + torch.full((12, 12), torch.nan).tril()
    for log in (False, True):
        value = CPP.weighted_overlap(mean, var, alpha, EPS, log)
        assert torch.equal(CPP.weighted_overlap(mean, var, spoilt, EPS, log), value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_early_exit_never_changes_a_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    k, d = 48, 1700
    scale = torch.linspace(0.05, 4, k)[:, None]  # overlaps from near 1 to exactly 0
    mean, var = scale * normal(k, d, seed=1), 1 + 0.1 * uniform(k, d, seed=2)
    mean, var, alpha = mean.to(dtype), var.to(dtype), uniform(k, k, seed=3).to(dtype)
    one = torch.ones((), dtype=dtype)
    results = []
    for setting in ("1", "0"):
        monkeypatch.setenv("CWBR_EARLY_EXIT", setting)
        value = CPP.weighted_overlap(mean, var, alpha, EPS, False)
        gradients = CPP.weighted_overlap_backward(one, value, mean, var, alpha, EPS, False)
        results.append((value, *gradients))
    assert results[0][0] > 0
    for with_exit, without in zip(*results, strict=True):
        assert torch.equal(with_exit, without)


def test_strided_and_expanded_inputs_equal_contiguous_ones() -> None:
    k, d = 10, 37
    mean, var = moments("plain", k, d)
    pairs = pairs_of(k)
    strided = [torch.stack([t, t + 1], dim=2)[:, :, 0] for t in (mean, var)]
    flipped = torch.stack([pairs[:, 1], pairs[:, 0]], dim=0).T[:, [1, 0]]
    expected = CPP.pair_distance(mean, var, pairs, EPS)
    assert torch.equal(CPP.pair_distance(*strided, flipped, EPS), expected)
    one = torch.ones(())
    for grad in (one.expand(len(pairs)), torch.ones(len(pairs), 2)[:, 0]):
        wanted = CPP.pair_distance_backward(torch.ones(len(pairs)), mean, var, pairs, EPS)
        for result, by in zip(
            CPP.pair_distance_backward(grad, *strided, pairs, EPS), wanted, strict=True
        ):
            assert torch.equal(result, by)
    wanted = CPP.all_pair_distance_backward(torch.ones(k, k), mean, var, EPS)
    for result, by in zip(
        CPP.all_pair_distance_backward(one.expand(k, k), *strided, EPS), wanted, strict=True
    ):
        assert torch.equal(result, by)


def run_with(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CWBR_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


ONE_DISTANCE = (
    "import torch, cwbr_fused.schema; one = torch.ones(2, 2);"
    "print(torch.ops.cwbr_fused.all_pair_distance(one, one, 1e-6))"
)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.skipif("CWBR_CPU_ISA" in os.environ, reason="runs in the process that forces none")
def test_everything_above_holds_on_instruction_set(isa: str) -> None:
    trial = run_with(isa, "-c", ONE_DISTANCE)
    if f"this processor has no {isa}" in trial.stderr:
        pytest.skip(trial.stderr.splitlines()[-1])
    assert trial.returncode == 0, trial.stderr
    result = run_with(isa, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__)
    assert result.returncode == 0, result.stdout[-3000:]


def test_an_unknown_instruction_set_is_an_error_that_names_the_choices() -> None:
    result = run_with("sse9", "-c", ONE_DISTANCE)
    assert result.returncode != 0
    assert "CWBR_CPU_ISA: expected avx512, avx2 or portable, got sse9" in result.stderr
