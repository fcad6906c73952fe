"""The reference against hand-computed cases, the literal formulas, and numerical derivatives."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from torch import Tensor

from cwbr_fused import reference

EPS = 1e-6


def batch(seed: int, size: int, dims: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, dims, generator=generator, dtype=torch.float64)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64) * 2
    return z, logits, torch.randint(classes, (size,), generator=generator)


def test_groups_list_usable_classes_in_order_and_pad_the_rest() -> None:
    targets = torch.tensor([7, 2, 7, 5, 2, 7, 9])
    order, offsets, classes = reference.group_by_class(targets, 2)
    assert order.tolist() == [1, 4, 0, 2, 5, 3, 6]
    assert offsets.tolist() == [0, 2, 5, 5]
    assert classes.tolist() == [2, 7, -1]


@pytest.mark.parametrize(("size", "min_count"), [(0, 1), (0, 2), (1, 2), (1, 1), (9, 3), (40, 1)])
def test_group_shapes_depend_on_the_batch_size_alone(size: int, min_count: int) -> None:
    for classes_in_use in (1, 3, 100):
        targets = torch.arange(size) % classes_in_use
        order, offsets, classes = reference.group_by_class(targets, min_count)
        assert sorted(order.tolist()) == list(range(size))
        assert (offsets.shape, classes.shape) == ((size // min_count + 1,), (size // min_count,))
        used = [c for c in classes.tolist() if c >= 0]
        counts = torch.bincount(targets, minlength=1)
        assert used == [c for c in range(len(counts)) if counts[c] >= min_count]
        assert offsets.diff()[: len(used)].tolist() == [int(counts[c]) for c in used]


def test_moments_of_two_samples_are_their_midpoint_and_squared_half_difference() -> None:
    z = torch.tensor([[1.0, 10.0], [5.0, 10.0], [99.0, 99.0]])
    mean, var = reference.class_moments(
        z, *reference.group_by_class(torch.tensor([0, 0, 1]), 2)[:2], EPS
    )
    assert mean.tolist() == [[3.0, 10.0]]
    assert torch.equal(var, torch.tensor([[4.0, EPS]]))


def test_variance_survives_a_mean_a_million_times_its_spread() -> None:
    spread = torch.tensor([0.0, 1.0, 2.0, 3.0])[:, None]
    z = (1e6 + spread).float()
    order, offsets, _ = reference.group_by_class(torch.zeros(4, dtype=torch.int64), 2)
    _, var = reference.class_moments(z, order, offsets, EPS)
    assert var[0].item() == pytest.approx(1.25, rel=1e-6)


def test_distance_of_unit_gaussians_is_an_eighth_of_the_squared_distance() -> None:
    mean = torch.tensor([[0.0, 0.0], [2.0, 4.0]], dtype=torch.float64)
    d = reference.pair_distance(mean, torch.ones_like(mean), torch.tensor([[0, 1]]), 0.0)
    assert d.item() == pytest.approx((4 + 16) / 8)


def test_distance_of_concentric_gaussians_is_the_log_of_their_variance_ratio() -> None:
    var = torch.tensor([[1.0], [4.0]], dtype=torch.float64)
    d = reference.pair_distance(torch.zeros_like(var), var, torch.tensor([[0, 1]]), 0.0)
    assert d.item() == pytest.approx(math.log(2.5) / 2 - math.log(4) / 4)


def test_distance_of_equal_variances_at_float32_extremes_is_finite() -> None:
    for scale in (1e-30, 1e-6, 1e6, 1e30):
        var = torch.tensor([[scale], [3 * scale]])
        d = reference.all_pair_distance(torch.zeros_like(var), var, 0.0)
        assert d[0, 1].item() == pytest.approx(math.log(2) / 2 - math.log(3) / 4, rel=1e-5)


def test_confusion_of_uniform_logits_is_one_over_the_number_of_classes() -> None:
    targets = torch.tensor([0, 0, 3, 3])
    groups = reference.group_by_class(targets, 2)
    alpha = reference.confusion_weights(torch.zeros(4, 5), *groups)
    assert torch.allclose(alpha, torch.tensor([[0.0, 0.2], [0.2, 0.0]]))


def test_ties_go_to_the_smaller_pair() -> None:
    pairs, weights = reference.top_pairs(torch.ones(4, 4) / 2, 4)
    assert pairs.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2]]
    assert weights.tolist() == [0.5] * 4


def test_nan_weights_rank_first() -> None:
    alpha = torch.full((3, 3), 0.5)
    alpha[1, 2] = alpha[2, 1] = math.nan
    assert reference.top_pairs(alpha, 1)[0].tolist() == [[1, 2]]


def test_identical_classes_overlap_completely() -> None:
    z = torch.tensor([[1.0], [3.0], [1.0], [3.0]])
    targets = torch.tensor([0, 0, 1, 1])
    assert reference.loss(z, torch.zeros(4, 2), targets).item() == pytest.approx(1.0)
    log = reference.loss(z, torch.zeros(4, 2), targets, objective="log_overlap")
    assert log.item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("top_m", [1, 5, 64, None])
@pytest.mark.parametrize("min_count", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_loss_equals_the_literal_formulas(seed: int, min_count: int, top_m: int | None) -> None:
    z, logits, y = batch(seed, 5 + 7 * seed, 1 + 4 * seed, 6)
    features = [z, z[:, :1] * 0.5 + 1]
    expected = oracle.loss(features, logits, y, top_m, min_count, EPS)
    actual = reference.loss(features, logits, y, top_m=top_m, min_count=min_count, eps=EPS)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-300)


def test_functionals_equal_the_literal_formulas() -> None:
    z, logits, y = batch(5, 30, 6, 8)
    classes, mu, var, counts, inv = reference.class_stats_diag(z, y)
    expected_classes, expected_mu, expected_var = oracle.class_moments(z, y, EPS, 2)
    assert classes.tolist() == expected_classes
    assert counts.tolist() == [int((y == c).sum()) for c in expected_classes]
    used = inv >= 0
    assert torch.equal(classes[inv[used]], y[used])
    assert not set(y[~used].tolist()) & set(expected_classes)
    torch.testing.assert_close((mu, var), (expected_mu, expected_var))
    alpha = reference.confusion_alpha(logits, y, classes, inv)
    torch.testing.assert_close(alpha, oracle.confusion(logits, y, expected_classes))
    d, rho = reference.bhattacharyya_diag(mu, var)
    torch.testing.assert_close(d, oracle.distance(mu, var, EPS))
    torch.testing.assert_close(rho, torch.exp(-d))
    for top_m in (3, None):
        value = reference.bhat_confusion_loss(mu, var, alpha, top_m)
        torch.testing.assert_close(value, oracle.layer_loss(d, alpha, top_m, EPS))


def test_log_overlap_is_the_logarithm_of_the_overlap() -> None:
    z, logits, y = batch(6, 24, 3, 5)
    for top_m in (4, None):
        plain = reference.loss(z, logits, y, top_m=top_m)
        log = reference.loss(z, logits, y, top_m=top_m, objective="log_overlap")
        torch.testing.assert_close(log, plain.log())


def test_log_overlap_keeps_its_gradient_where_the_overlap_underflows() -> None:
    z, logits, y = batch(7, 16, 400, 4)
    z = (z + 100 * y[:, None]).float().requires_grad_()
    plain = reference.loss(z, logits.float(), y)
    (gradient,) = torch.autograd.grad(plain, z)
    assert plain.item() == 0.0
    assert gradient.abs().max().item() == 0.0
    log = reference.loss(z, logits.float(), y, objective="log_overlap")
    (gradient,) = torch.autograd.grad(log, z)
    assert math.isfinite(log.item())
    assert gradient.abs().max().item() > 0.0


@pytest.mark.parametrize("objective", ["overlap", "log_overlap"])
@pytest.mark.parametrize("top_m", [3, None])
def test_loss_has_the_numerical_first_and_second_derivative(
    objective: str, top_m: int | None
) -> None:
    z, logits, y = batch(8, 9, 2, 3)
    z.requires_grad_()

    def value(z: Tensor) -> Tensor:
        return reference.loss([z, z.square()], logits, y, top_m=top_m, objective=objective)

    assert torch.autograd.gradcheck(value, z)
    assert torch.autograd.gradgradcheck(value, z)


def test_the_clamped_variance_passes_no_gradient() -> None:
    z = torch.tensor([[1.0], [1.0 + 1e-5]], dtype=torch.float64, requires_grad=True)
    groups = reference.group_by_class(torch.tensor([0, 0]), 2)
    _, var = reference.class_moments(z, *groups[:2], EPS)
    (gradient,) = torch.autograd.grad(var.sum(), z)
    assert gradient.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("size", [0, 1, 2, 3])
def test_too_few_classes_give_a_connected_zero(size: int) -> None:
    for top_m in (64, None):
        for objective in ("overlap", "log_overlap"):
            z = torch.randn(size, 3, requires_grad=True)
            targets = torch.arange(size)
            value = reference.loss(
                z, torch.randn(size, 4), targets, top_m=top_m, objective=objective
            )
            (gradient,) = torch.autograd.grad(value, z)
            assert value.item() == 0.0
            assert gradient.shape == z.shape
            assert not gradient.any()
