"""Shrunk variances, temperature and the noise floor: literal formulas, simulation, derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adjusted_batches import EPS, OBJECTIVES, batch, class_variances
from torch import Tensor

import cwbr_fused
from cwbr_fused import functional
from cwbr_fused.overlap import adjustments

SHRINKAGES = [None, 4.0, "analytic", "pooled"]


# ---- Shrinkage


def test_two_samples_and_a_singleton_shrink_as_computed_by_hand() -> None:
    """Unbiased variances 2 and 8 from one degree of freedom each: the pooled one is 5."""
    z = torch.tensor([[1.0], [3.0], [0.0], [4.0], [9.0]])
    var, counts = class_variances(z, torch.tensor([0, 0, 1, 1, 2]))
    for how, expected, intensities in (
        (None, [2.0, 8.0, EPS], [0, 0, 0]),
        ("pooled", [5.0, 5.0, 5.0], [1, 1, 1]),
        (3, [0.25 * 2 + 0.75 * 5, 0.25 * 8 + 0.75 * 5, 5.0], [0.75, 0.75, 1]),
    ):
        shrunk, intensity = functional.shrink_variance(var, counts, how)  # type: ignore[arg-type]
        torch.testing.assert_close(shrunk[:, 0], torch.tensor(expected))
        torch.testing.assert_close(intensity, torch.tensor(intensities, dtype=torch.float32))


def literal_intensities(z: Tensor, y: Tensor) -> list[float]:
    classes = sorted(set(y.tolist()))
    samples = [z[y == c] for c in classes]
    dof = [len(x) - 1 for x in samples]
    var = [x.var(0) if len(x) > 1 else torch.zeros_like(z[0]) for x in samples]
    pooled = sum(f * v for f, v in zip(dof, var, strict=True)) / sum(dof)
    intensities = []
    for f, v in zip(dof, var, strict=True):
        variance = sum(2 * float(v[d] / pooled[d]) ** 2 / (f + 2) for d in range(len(v)))
        spread = sum((float(v[d] / pooled[d]) - 1) ** 2 for d in range(len(v)))
        intensities.append(min(1.0, (1 - f / sum(dof)) * variance / spread) if f else 1.0)
    return intensities


@pytest.mark.parametrize("seed", range(4))
def test_analytic_intensity_equals_the_literal_formula(seed: int) -> None:
    z, _, y = batch(seed, 30, 7, 6)
    z = z * (1 + y[:, None] * torch.rand(6, 7, dtype=torch.float64)[y])
    _, intensity = functional.shrink_variance(*class_variances(z, y), "analytic")
    expected = torch.tensor(literal_intensities(z, y), dtype=torch.float64)
    torch.testing.assert_close(intensity, expected)
    assert 0 < expected.min() < 1


def test_analytic_intensity_is_one_for_equal_and_small_for_unequal_variances() -> None:
    y = torch.arange(8).repeat_interleave(20)
    z = torch.randn(160, 500, generator=torch.Generator().manual_seed(0))
    _, equal = functional.shrink_variance(*class_variances(z, y), "analytic")
    scale = torch.rand(8, 500, generator=torch.Generator().manual_seed(1)) * 3
    _, unequal = functional.shrink_variance(*class_variances(z * scale[y], y), "analytic")
    assert equal.min() > 0.85
    assert unequal.max() < 0.3


def test_analytic_shrinkage_errs_less_than_none_and_than_full() -> None:
    generator = torch.Generator().manual_seed(2)
    scale = 0.5 + torch.rand(8, 400, generator=generator)
    y = torch.arange(8).repeat_interleave(6)
    z = scale[y] * torch.randn(48, 400, generator=generator)
    var, counts = class_variances(z, y)
    error = {}
    for how in (None, "analytic", "pooled"):
        shrunk, _ = functional.shrink_variance(var, counts, how)  # type: ignore[arg-type]
        error[how] = float((shrunk - scale.square()).square().mean())
    assert error["analytic"] < 0.9 * min(error[None], error["pooled"])


@pytest.mark.parametrize("how", SHRINKAGES)
def test_scaling_a_dimension_scales_its_variance_alone(how: Any) -> None:
    z, _, y = batch(3, 30, 5, 6)
    scale = torch.tensor([1e-3, 1.0, 7.0, 1e4, 1e2], dtype=torch.float64)
    expected, intensity = functional.shrink_variance(*class_variances(z, y), how, 1e-30)
    scaled, same = functional.shrink_variance(*class_variances(z * scale, y), how, 1e-30)
    torch.testing.assert_close(scaled, expected * scale.square())
    torch.testing.assert_close(same, intensity)


def test_the_intensity_carries_no_gradient() -> None:
    z, _, y = batch(4, 24, 3, 5)
    z.requires_grad_()
    var, counts = class_variances(z, y)
    shrunk, intensity = functional.shrink_variance(var, counts, "analytic")
    assert not intensity.requires_grad
    assert 0 < intensity.min() < 1
    dof = (counts - 1)[:, None]
    squares = var * counts[:, None]
    held = intensity[:, None]
    unbiased = squares / dof.clamp(min=1)
    expected = (1 - held) * unbiased + held * squares[dof[:, 0] > 0].sum(0) / dof.sum()
    torch.testing.assert_close(shrunk, expected)
    torch.testing.assert_close(
        torch.autograd.grad(shrunk.log().sum(), z, retain_graph=True),
        torch.autograd.grad(expected.log().sum(), z),
    )


# ---- The noise floor


@pytest.mark.parametrize("dof", [1.0, 2.0, 3.0, 4.5, 30.0, 1e3, 1e6])
def test_chi_square_expectations_equal_their_closed_forms(dof: float) -> None:
    f = torch.tensor([dof], dtype=torch.float64)
    parts = [(1 / f, f / 3), (1 / f, f / 2), (1 / f, f / 6), (torch.zeros_like(f), f)]
    log, inverse = adjustments.log_and_inverse_mean(*parts)
    assert log.item() == pytest.approx((torch.digamma(f / 2) - (f / 2).log()).item(), abs=2e-6)
    if dof > 2:
        assert inverse.item() == pytest.approx(dof / (dof - 2), abs=2e-6)


def simulated(
    counts: list[int], dims: int, how: Any, shift: float = 0.0, repeats: int = 0, **floor: bool
) -> tuple[float, float, float]:
    """Mean corrected distance of classes of odd to even number, its standard error, and without.

    Unit variances in all classes; classes of odd number are shifted in every dimension.
    """
    generator = torch.Generator().manual_seed(dims + sum(counts))
    y = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    corrected, plain = [], []
    for _ in range(repeats or max(16, 640 // dims)):
        z = torch.randn(len(y), dims, generator=generator) + shift * (y[:, None] % 2)
        _, mu, var, sizes, _ = functional.class_stats_diag(z, y, min_count=1)
        var, intensity = functional.shrink_variance(var, sizes, how)
        noise = (sizes, intensity)
        odd_even = slice(None, None, 2), slice(1, None, 2)
        corrected.append(functional.bhattacharyya_diag(mu, var, noise_floor=noise)[0][odd_even])
        plain.append(functional.bhattacharyya_diag(mu, var)[0][odd_even])
    means = torch.stack(corrected).mean((1, 2))
    error = float(means.std() / len(means) ** 0.5)
    return float(means.mean()), error, float(torch.stack(plain).mean())


@pytest.mark.parametrize("dims", [16, 256, 2048])
@pytest.mark.parametrize("how", SHRINKAGES)
def test_identical_classes_read_zero_on_average(how: Any, dims: int) -> None:
    """To four standard errors, and an eighth of what they read uncorrected.

    "analytic" takes an intensity estimated from the same sample for a given one, which shows with
    few dimensions: to within 2 % of the uncorrected distance.
    """
    sizes = [[n] * 12 for n in (2, 3, 4, 8, 16)] + [[2, 2, 3, 4, 8, 16] * 2]
    if how is not None:
        sizes.append([1, 2, 1, 1, 4, 8] * 2)
    for counts in sizes:
        mean, error, plain = simulated(counts, dims, how)
        assert abs(mean) < 4 * error + (0.02 * plain if how == "analytic" else 0), counts
        assert abs(mean) < plain / 8, counts
        assert plain > 0.004 * dims


@pytest.mark.parametrize("how", SHRINKAGES)
def test_separated_classes_read_their_true_distance_on_average(how: Any) -> None:
    for counts in ([3] * 12, [4] * 12, [3, 8] * 6):
        mean, error, plain = simulated(counts, 256, how, shift=1.0, repeats=48)
        assert abs(mean - 256 / 8) < 4 * error + (0.02 * plain if how == "analytic" else 0)
        assert error < 1.5
        assert plain > 1.2 * 256 / 8


def test_two_classes_of_two_samples_have_no_mean_term_without_shrinkage() -> None:
    counts, zeros = torch.tensor([2, 2, 3]), torch.zeros(3)
    scale, floor = adjustments.noise_floor(
        (counts, zeros), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2])
    )
    assert scale[:2].tolist() == [0.0, 0.0]
    assert scale[2] > 0
    assert floor.tolist() == pytest.approx([0.0, 0.5 * 0.6931472, float(floor[2])], abs=1e-5)


def test_dimensions_without_variance_carry_no_noise() -> None:
    z, _, y = batch(5, 40, 6, 5)
    wide = torch.cat([z, torch.zeros(40, 50, dtype=torch.float64)], dim=1)
    distances = []
    for x in (z, wide):
        _, mu, var, counts, _ = functional.class_stats_diag(x, y)
        var, intensity = functional.shrink_variance(var, counts, 4)
        distances.append(functional.bhattacharyya_diag(mu, var, noise_floor=(counts, intensity))[0])
    torch.testing.assert_close(distances[1], distances[0], rtol=1e-6, atol=1e-6)


def test_copies_read_a_negative_distance_and_a_finite_overlap() -> None:
    """Two singletons of 2048 equal features: D = -2048 (1 + 1)/8, far below where exp overflows."""
    z = torch.randn(6, 2048, generator=torch.Generator().manual_seed(6))
    z[1] = z[0]
    y = torch.tensor([0, 1, 2, 2, 2, 2])
    _, mu, var, counts, _ = functional.class_stats_diag(z, y, min_count=1)
    var, intensity = functional.shrink_variance(var, counts, "pooled")
    noise = (counts, intensity)
    d, rho = functional.bhattacharyya_diag(mu, var, noise_floor=noise)
    assert d[0, 1].item() == pytest.approx(-512)
    assert rho[0, 1].item() == pytest.approx(513)
    for objective in OBJECTIVES:
        leaf = z.clone().requires_grad_()
        value = cwbr_fused.loss(
            leaf,
            torch.zeros(6, 3),
            y,
            min_count=1,
            shrinkage="pooled",
            noise_floor=True,
            objective=objective,
        )
        (gradient,) = torch.autograd.grad(value, leaf)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert gradient.any()


def test_the_overlap_goes_on_smoothly_below_zero() -> None:
    d = torch.tensor([-800.0, -1.0, -1e-7, 0.0, 1e-7, 1.0, 200.0], requires_grad=True)
    rho = torch.exp(-adjustments.overlap_distance(d))
    (slope,) = torch.autograd.grad(rho.sum(), d)
    expected = torch.where(d < 0, 1 - d, torch.exp(-d)).detach()
    torch.testing.assert_close(rho.detach(), expected)
    torch.testing.assert_close(slope, -expected.clamp(max=1))
