"""The C++ pair kernels: threads, layouts, empty sizes, non-finite rows, early exit."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import CPU_KERNELS, EPS, rand, randn
from pair_inputs import KINDS, moments, pairs_of
from torch import Tensor

from cwbr_fused import reference

CPP = torch.ops.cwbr_fused

pytestmark = CPU_KERNELS


def every_result(mean: Tensor, var: Tensor) -> list[Tensor]:
    """All operations on these moments, with fixed other inputs."""
    k = mean.shape[0]
    pairs = pairs_of(k)
    alpha, grad = rand(k, k, seed=3).to(mean), randn(k, k, seed=4).to(mean)
    results = [CPP.pair_distance(mean, var, pairs, EPS), CPP.all_pair_distance(mean, var, EPS)]
    results += CPP.pair_distance_backward(randn(len(pairs), seed=5).to(mean), mean, var, pairs, EPS)
    results += CPP.all_pair_distance_backward(grad, mean, var, EPS)
    for log in (False, True):
        value = CPP.weighted_overlap(mean, var, alpha, EPS, log)
        one = torch.ones((), dtype=mean.dtype)
        results += [value, *CPP.weighted_overlap_backward(one, value, mean, var, alpha, EPS, log)]
        results += CPP.weighted_overlap_with_gradient(one, mean, var, alpha, EPS, log)
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("k", "d"), [(70, 1100), (600, 40)])
def test_results_are_the_same_bits_on_any_number_of_threads(
    k: int, d: int, dtype: torch.dtype
) -> None:
    mean, var = (0.05 * randn(k, d, seed=1)).to(dtype), (rand(k, d, seed=2) + 0.5).to(dtype)
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
    mean, var = randn(k, d, seed=1), rand(k, d, seed=2) + 0.1
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
    alpha = rand(12, 12, seed=1)
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
    mean, var = scale * randn(k, d, seed=1), 1 + 0.1 * rand(k, d, seed=2)
    mean, var, alpha = mean.to(dtype), var.to(dtype), rand(k, k, seed=3).to(dtype)
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
