"""Shrunk variances, temperature and the noise floor: literal formulas, simulation, derivatives."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import torch
from test_compile import NoWait, on
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import cwbr_fused
from cwbr_fused import backends, functional, reference, shrinkage

EPS = 1e-6
BACKENDS = [name for name in backends.NAMES if backends.rejection(name, "cpu") is None]
OBJECTIVES = ["overlap", "log_overlap"]
# Triton's kernels take a second, interpreted on the CPU.
CASES = [(b, o) for b in BACKENDS for o in OBJECTIVES if b != "triton" or o == "log_overlap"]
SHRINKAGES = [None, 4.0, "analytic", "pooled"]
ADJUSTED: list[dict[str, Any]] = [
    {"temperature": 3},
    {"temperature": "dims", "shrinkage": "pooled"},
    {"shrinkage": 2.5, "min_count": 1},
    {"shrinkage": "analytic", "noise_floor": True, "min_count": 1},
    {"noise_floor": True, "temperature": 0.5},
]
adjustments = pytest.mark.parametrize("options", ADJUSTED, ids=str)


def batch(seed: int, size: int, dims: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, dims, generator=generator, dtype=torch.float64)
    logits = torch.randn(size, classes, generator=generator, dtype=torch.float64) * 2
    return z, logits, torch.randint(classes, (size,), generator=generator)


def class_variances(z: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Biased variances of all classes and their counts."""
    _, _, var, counts, _ = reference.class_stats_diag(z, y, 1e-30, min_count=1)
    return var, counts


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
    log, inverse = shrinkage.log_and_inverse_mean(*parts)
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
    scale, floor = shrinkage.noise_floor(
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
    rho = torch.exp(-shrinkage.overlap_distance(d))
    (slope,) = torch.autograd.grad(rho.sum(), d)
    expected = torch.where(d < 0, 1 - d, torch.exp(-d)).detach()
    torch.testing.assert_close(rho.detach(), expected)
    torch.testing.assert_close(slope, -expected.clamp(max=1))


# ---- The loss


@pytest.mark.parametrize(("backend", "objective"), CASES)
@adjustments
def test_value_and_gradient_equal_the_reference(
    options: dict[str, Any], backend: str, objective: str
) -> None:
    top_ms = (6, None) if backend != "triton" else (6,)
    for top_m in top_ms:
        z, logits, y = batch(7, 33, 13, 9)
        truth = [z.requires_grad_(), (z.detach()[:, :1] * 3 + 1).requires_grad_()]
        features = [x.detach().float().requires_grad_() for x in truth]
        rest = {**options, "top_m": top_m, "objective": objective}
        value = cwbr_fused.loss(features, logits.float(), y, backend=backend, **rest)
        expected = reference.loss(truth, logits, y, **rest)
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-6)
        gradients = torch.autograd.grad(value, features)
        for gradient, wanted in zip(gradients, torch.autograd.grad(expected, truth), strict=True):
            tolerance = 1e-4 * float(wanted.abs().max()) + 1e-7
            torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("temperature", [1, 2.5, "dims"])
@pytest.mark.parametrize("top_m", [4, None])
def test_temperature_divides_the_distance_of_the_literal_formulas(
    top_m: int | None, temperature: Any
) -> None:
    z, logits, y = batch(8, 30, 6, 5)
    classes, mean, var = oracle.class_moments(z, y, EPS, 2)
    d = oracle.distance(mean, var, EPS) / (6 if temperature == "dims" else temperature)
    expected = oracle.layer_loss(d, oracle.confusion(logits, y, classes), top_m, EPS)
    value = cwbr_fused.loss(z, logits, y, top_m=top_m, temperature=temperature)
    torch.testing.assert_close(value, expected)
    log = cwbr_fused.loss(
        z, logits, y, top_m=top_m, temperature=temperature, objective="log_overlap"
    )
    torch.testing.assert_close(log, expected.log())


@adjustments
def test_functionals_compose_to_the_loss(options: dict[str, Any]) -> None:
    z, logits, y = batch(9, 40, 9, 12)
    min_count = options.get("min_count", 2)
    for module, top_m in itertools.product((functional, reference), (5, None)):
        classes, mu, var, counts, inv = module.class_stats_diag(z, y, min_count=min_count)
        noise = None
        if "shrinkage" in options or "noise_floor" in options:
            var, intensity = module.shrink_variance(var, counts, options.get("shrinkage"))
            noise = (counts, intensity) if "noise_floor" in options else None
        alpha = module.confusion_alpha(logits, y, classes, inv)
        rest = {"temperature": options.get("temperature"), "noise_floor": noise}
        value = module.bhat_confusion_loss(mu, var, alpha, top_m, **rest)
        expected = cwbr_fused.loss(z, logits, y, top_m=top_m, **options)
        torch.testing.assert_close(value, expected)
        d, rho = module.bhattacharyya_diag(mu, var, **rest)
        torch.testing.assert_close(oracle.layer_loss(-rho.log(), alpha, top_m, EPS), expected)
        assert not d.diagonal().any()


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("top_m", [3, None])
@pytest.mark.parametrize("how", [None, 2.0, "pooled"])
def test_loss_has_the_numerical_derivative(how: Any, top_m: int | None, objective: str) -> None:
    z, logits, y = batch(10, 12, 2, 3)
    y[0], logits = 3, torch.cat([logits, logits[:, :1]], dim=1)
    options = {
        "objective": objective,
        "top_m": top_m,
        "shrinkage": how,
        "min_count": 1 if how else 2,
        "noise_floor": True,
        "temperature": "dims",
    }

    def value(loss: Any) -> Any:
        return lambda z: loss([z, z.square()], logits, y, **options)

    z.requires_grad_()
    assert torch.autograd.gradcheck(value(cwbr_fused.loss), z)
    assert torch.autograd.gradcheck(value(reference.loss), z)
    assert torch.autograd.gradgradcheck(value(reference.loss), z)


@pytest.mark.parametrize("backend", sorted(set(BACKENDS) - {"triton"}))
@pytest.mark.parametrize("targets", [[], [3], [0, 1, 2, 3], [2, 2, 2, 2]], ids=str)
def test_without_two_classes_or_a_class_of_two_the_loss_is_a_connected_zero(
    targets: list[int], backend: str
) -> None:
    z = torch.randn(len(targets), 3, requires_grad=True)
    logits, y = torch.randn(len(targets), 4), torch.tensor(targets, dtype=torch.int64)
    for objective, how in itertools.product(OBJECTIVES, (4, "analytic", "pooled")):
        value = cwbr_fused.loss(
            z,
            logits,
            y,
            objective=objective,
            shrinkage=how,
            noise_floor=True,
            min_count=1,
            backend=backend,
        )
        (gradient,) = torch.autograd.grad(value, z)
        assert value.item() == 0.0
        assert not gradient.any()


def test_shuffled_batches_of_singletons_get_a_gradient_with_shrinkage() -> None:
    z = torch.randn(16, 768, generator=torch.Generator().manual_seed(11)).requires_grad_()
    y = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    logits = torch.zeros(16, 12)
    value = cwbr_fused.loss(
        z, logits, y, min_count=1, shrinkage="analytic", temperature="dims", top_m=None
    )
    (gradient,) = torch.autograd.grad(value, z)
    assert 0 < value.item() < 1
    assert (gradient.norm(dim=1) > 0).all()


def test_nothing_given_is_the_fused_path(monkeypatch: pytest.MonkeyPatch) -> None:
    z, logits, y = (t.float() if t.is_floating_point() else t for t in batch(12, 20, 4, 5))
    expected = cwbr_fused.loss(z, logits, y)

    def refuse(*_: Any) -> None:
        raise AssertionError

    monkeypatch.setattr("cwbr_fused.losses.layer_distances", refuse)
    nothing: dict[str, Any] = {"temperature": None, "shrinkage": None, "noise_floor": False}
    assert torch.equal(cwbr_fused.loss(z, logits, y, **nothing), expected)
    with pytest.raises(AssertionError):
        cwbr_fused.loss(z, logits, y, temperature=1)


@adjustments
def test_the_module_passes_its_options_on(options: dict[str, Any]) -> None:
    z, logits, y = batch(13, 20, 4, 5)
    module = cwbr_fused.ConfusionWeightedBhatReg(["a"], **options)
    assert torch.equal(module({"a": z}, logits, y), cwbr_fused.loss(z, logits, y, **options))
    for name, value in options.items():
        assert f"{name}={value!r}" in repr(module)


@adjustments
def test_one_graph_serves_every_batch_size_and_class_make_up(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(z: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        return cwbr_fused.loss([z, z[:, :2]], logits, y, top_m=8, **options)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed, size in enumerate((12, 19, 27)):
        z, logits, y = batch(seed, size, 5, 6)
        results = []
        for function in (compiled, step):
            leaf = z.clone().requires_grad_()
            for tensor in (leaf, logits, y):
                torch._dynamo.mark_dynamic(tensor, 0)
            value = function(leaf, logits, y)
            results.append((value, *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


@adjustments
def test_a_step_waits_for_no_value(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "resolve", lambda name, device_type: "triton")
    with FakeTensorMode():
        z, logits, y = on("meta")
        z.requires_grad_()
        with NoWait("meta"):
            cwbr_fused.loss([z, z], logits, y, top_m=8, **options).backward()
        assert z.grad is not None


ERRORS = [
    ({"temperature": 0}, ValueError, r"temperature: .*> 0.*got 0"),
    ({"temperature": float("inf")}, ValueError, r"temperature: .*finite.*inf"),
    ({"temperature": "auto"}, ValueError, r"temperature: .*'dims'.*'auto'"),
    ({"temperature": True}, TypeError, r"temperature: .*True"),
    ({"shrinkage": -1.0}, ValueError, r"shrinkage: .*> 0.*-1\.0"),
    ({"shrinkage": "full"}, ValueError, r"shrinkage: .*'pooled'.*'full'"),
    ({"shrinkage": [4]}, TypeError, r"shrinkage: .*list"),
    ({"noise_floor": 1}, TypeError, r"noise_floor: .*bool.*int 1"),
    ({"noise_floor": True, "min_count": 1}, ValueError, r"min_count: .*at least 2.*shrinkage"),
]


@pytest.mark.parametrize(("options", "error", "message"), ERRORS, ids=[str(e[0]) for e in ERRORS])
def test_a_bad_option_is_named(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    z, logits, y = batch(14, 8, 3, 4)
    with pytest.raises(error, match=message):
        cwbr_fused.loss(z, logits, y, **options)
    with pytest.raises(error, match=message):
        cwbr_fused.ConfusionWeightedBhatReg(["a"], **options)


def test_bad_class_numbers_are_named() -> None:
    mu, var, counts = torch.randn(3, 5), torch.rand(3, 5), torch.tensor([2, 2, 4])
    with pytest.raises(ValueError, match=r"counts: expected shape \(K,\) = \(3,\).*\(2,\)"):
        functional.shrink_variance(var, counts[:2])
    with pytest.raises(TypeError, match=r"counts: .*list"):
        functional.shrink_variance(var, counts.tolist())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"noise_floor: .*\(counts, intensity\).*bool True"):
        functional.bhattacharyya_diag(mu, var, noise_floor=True)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"noise_floor: intensity: .*\(3,\).*\(1,\)"):
        functional.bhattacharyya_diag(mu, var, noise_floor=(counts, torch.zeros(1)))
