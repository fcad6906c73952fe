"""The CUDA pair kernels on an emulated GPU: distances, their sums, gradients."""

from __future__ import annotations

import oracle
import pytest
import torch
from emulation.checks import assert_close, check, doubles, some_moments, some_pairs
from emulation.harness import Emulator
from kernel_inputs import ACCUMULATION_DTYPES, EPS, rand, randn
from pair_inputs import KINDS, moments
from torch import Tensor

from cwbr_fused import reference
from cwbr_fused.operations import reference_backward


@pytest.mark.parametrize("dims", [1, 6, 8, 1030])
@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES)
def test_pair_distance_and_its_gradient(gpu: Emulator, dims: int, dtype: torch.dtype) -> None:
    mean, var = some_moments(7, dims, dtype)
    pairs = some_pairs(7)
    check(gpu, "pair_distance", mean, var, pairs, EPS)
    check(gpu, "pair_distance_backward", randn(12, dtype=dtype), mean, var, pairs, EPS)
    assert gpu.launches == 2


def test_lists_of_pairs_longer_than_a_block(gpu: Emulator) -> None:
    mean, var = some_moments(40, 5, torch.float32)
    pairs = torch.triu_indices(40, 40, offset=1).T
    grad = randn(len(pairs), dtype=torch.float32)
    check(gpu, "pair_distance_backward", grad, mean, var, pairs, EPS)


@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.parametrize(("rows", "dims"), [(2, 1), (3, 333), (65, 40), (130, 17)])
@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES)
def test_all_pair_distance_and_its_gradient(
    gpu: Emulator, rows: int, dims: int, dtype: torch.dtype, processors: int
) -> None:
    gpu.processors = processors
    mean, var = some_moments(rows, dims, dtype)
    distance = check(gpu, "all_pair_distance", mean, var, EPS)
    assert gpu.launches == 2
    assert (distance.diagonal() == 0).all()
    assert torch.equal(distance, distance.T)
    check(gpu, "all_pair_distance_backward", randn(rows, rows, dtype=dtype), mean, var, EPS)


def test_gradients_of_many_rows_borrow_no_more_than_32_mib_for_their_sums(gpu: Emulator) -> None:
    """Beside the packed rows; some rows' gradients are compared with the closed form."""
    rows, dims = 1500, 17
    mean, var = some_moments(rows, dims, torch.float64)
    grad = randn(rows, rows, dtype=torch.float64)
    grad_mean, grad_var = gpu.all_pair_distance_backward(grad, mean, var, EPS)
    packed = 2 * 16 * (rows + 32) * 8 * 2
    assert gpu.scratch_bytes <= 1.15 * ((32 << 20) + packed)
    weight, u = grad + grad.T, var + EPS
    for i in (0, 31, 800, rows - 1):
        t, z = (mean[i] - mean) / (u[i] + u), (u[i] - u) / (u[i] + u) / u[i]
        assert_close(grad_mean[i], (weight[i, :, None] * t).sum(0) / 2, factor=4)
        assert_close(grad_var[i], (weight[i, :, None] * (z - t * t)).sum(0) / 4, factor=4)


def test_a_class_in_hundreds_of_pairs_has_the_gradient_of_all(gpu: Emulator) -> None:
    mean, var = some_moments(40, 20, torch.float32)
    pairs = torch.tensor([[0, 1 + i % 39] if i % 2 else [1 + i % 39, 0] for i in range(255)])
    grad = randn(255) * (torch.arange(255) % 5 > 0)  # some pairs take no part
    check(gpu, "pair_distance_backward", grad, mean, var, pairs, EPS, factor=4)


def relative_errors(
    ours: Tensor, eager: Tensor, truth: Tensor, size: Tensor
) -> tuple[float, float]:
    return tuple(float(((x.double() - truth).abs() / size).max()) for x in (ours, eager))


@pytest.mark.parametrize("kind", KINDS)
def test_all_pairs_err_no_more_than_float32_eager(gpu: Emulator, kind: str) -> None:
    """Errors are measured against 1 + D, because it is exp(-D) that counts.

    Eager is the published formula in float32. Beyond it, the fast logarithm of eight dimensions may
    be off by its documented 2^-22, that is D by 2^-23.
    """
    mean, var = moments(kind, 20, 173)
    truth = reference.all_pair_distance(mean.double(), var.double(), EPS)
    eager, ours = oracle.distance(mean, var, EPS), gpu.all_pair_distance(mean, var, EPS)
    error, allowed = relative_errors(ours, eager, truth, 1 + truth)
    assert error <= max(allowed, 2**-20) + mean.shape[1] / 8 * 2**-23 / (1 + float(truth.max()))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_all_pairs_err_no_more_than_float32_eager(gpu: Emulator, kind: str) -> None:
    """Eager is autograd through the published formula; errors are relative to a row's largest."""
    mean, var = moments(kind, 20, 173)
    grad = randn(20, 20, dtype=torch.float32)
    truth = reference_backward.all_pair_distance_backward(*doubles((grad, mean, var)), EPS)
    leaves = [t.clone().requires_grad_() for t in (mean, var)]
    eager = torch.autograd.grad(oracle.distance(*leaves, EPS), leaves, grad)
    ours = gpu.all_pair_distance_backward(grad, mean, var, EPS)
    for one, plain, true in zip(ours, eager, truth, strict=True):
        error, allowed = relative_errors(one, plain, true, true.abs().amax(1, keepdim=True))
        assert error <= max(2 * allowed, 2**-20)


@pytest.mark.parametrize("large", [1.0, 1e30])
def test_rows_of_large_variance_keep_their_gradient_beside_rows_at_the_clamp(
    gpu: Emulator, large: float
) -> None:
    """Each entry errs by roundings of its own terms, not of those of smaller variances."""
    mean, var = randn(20, 90), (randn(20, 90, seed=1) / 2).exp() * large
    var = torch.where(randn(20, 90, seed=2) > 0, 1e-6, var)
    mean, grad = mean * var.sqrt(), randn(20, 20, seed=3)
    truth = reference_backward.all_pair_distance_backward(*doubles((grad, mean, var)), EPS)[1]
    ours = gpu.all_pair_distance_backward(grad, mean, var, EPS)[1]
    u, m = var.double() + EPS, mean.double()
    t = (m[:, None] - m[None]) / (u[:, None] + u[None])
    weight = (grad + grad.T).double().abs()[:, :, None]
    terms = (weight * (1 / u[:, None] + t.square())).sum(1) / 4
    assert ((ours.double() - truth).abs() / terms).max() <= 2**-20


@pytest.mark.parametrize("rows", [2, 20])
def test_variances_from_the_clamp_to_1e30_in_one_row_err_no_more_than_elsewhere(
    gpu: Emulator, rows: int
) -> None:
    var = 10 ** (36 * rand(rows, 173, seed=1) - 6)
    mean = randn(rows, 173, seed=2) * var.sqrt()
    truth = reference.all_pair_distance(mean.double(), var.double(), EPS)
    distance = gpu.all_pair_distance(mean, var, EPS)
    torch.testing.assert_close(distance.double(), truth, rtol=2e-6, atol=0)
    grad = randn(rows, rows, seed=3)
    check(gpu, "all_pair_distance_backward", grad, mean, var, EPS)


def test_equal_rows_are_exactly_at_distance_zero(gpu: Emulator) -> None:
    mean, var = some_moments(1, 300, torch.float32)
    spread = torch.logspace(-6, 6, 300)[None]
    for rows in ((mean, var), (mean, spread)):
        assert (gpu.all_pair_distance(*(r.expand(9, -1) for r in rows), EPS) == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_spoils_only_its_own_pairs(gpu: Emulator, bad: float) -> None:
    mean, var = some_moments(70, 50, torch.float32)
    mean[3, 7] = bad
    good = [i for i in range(70) if i != 3]
    distance = gpu.all_pair_distance(mean, var, EPS)
    truth = reference.all_pair_distance(mean.double(), var.double(), EPS)
    assert_close(distance[good][:, good], truth[good][:, good])
    assert not distance[3, good].isfinite().any()


@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("rows", "dims"), [(2, 3), (66, 20), (9, 200)])
@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES)
def test_weighted_overlap_and_its_gradient(
    gpu: Emulator, rows: int, dims: int, dtype: torch.dtype, log: bool, processors: int
) -> None:
    gpu.processors = processors
    mean, var = some_moments(rows, dims, dtype)
    mean, var = mean / 10, (0.9 + var.clamp(max=1) / 10)
    alpha = randn(rows, rows, dtype=dtype).abs()
    alpha[alpha < 0.3] = 0
    value = check(gpu, "weighted_overlap", mean, var, alpha, EPS, log, factor=4)
    assert gpu.launches == 2
    grad = torch.tensor(1.5, dtype=dtype)
    check(gpu, "weighted_overlap_backward", grad, value, mean, var, alpha, EPS, log, factor=10)


def test_far_tiles_are_given_up_without_changing_the_result(gpu: Emulator) -> None:
    mean, var = some_moments(70, 400, torch.float32)
    mean[60:] += 100 * torch.arange(10)[:, None]
    mean[1], var[1] = mean[0] + 0.01, var[0]
    alpha = torch.ones(70, 70)
    value = check(gpu, "weighted_overlap", mean, var, alpha, EPS, False, factor=4)
    assert value > 0
    one = torch.ones(())
    check(gpu, "weighted_overlap_backward", one, value, mean, var, alpha, EPS, False, factor=4)


@pytest.mark.parametrize("log", [False, True])
def test_no_weight_gives_zero_and_zero_gradients(gpu: Emulator, log: bool) -> None:
    mean, var = some_moments(5, 9, torch.float32)
    alpha, one = torch.zeros(5, 5), torch.ones(())
    value = gpu.weighted_overlap(mean, var, alpha, EPS, log)
    assert value == 0
    for grad in gpu.weighted_overlap_backward(one, value, mean, var, alpha, EPS, log):
        assert (grad == 0).all()
