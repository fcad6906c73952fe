"""The loss with temperature, shrunk variances and noise floor: reference, derivatives, graphs."""

from __future__ import annotations

import itertools
from typing import Any

import oracle
import pytest
import torch
from adjusted_batches import ADJUSTED, EPS, OBJECTIVES, batch, smoothed
from test_compile import NoWait, on
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import cwbr_fused
from cwbr_fused import functional, reference
from cwbr_fused.operations import backends

BACKENDS = [name for name in backends.NAMES if backends.rejection(name, "cpu") is None]
# Triton's kernels take a second, interpreted on the CPU.
CASES = [(b, o) for b in BACKENDS for o in OBJECTIVES if b != "triton" or o == "log_overlap"]
adjustments = pytest.mark.parametrize("options", ADJUSTED, ids=str)
# Soft targets change the moments alone, so with them one of the adjustments is enough.
soft_or_not = pytest.mark.parametrize(
    ("options", "soft"),
    [*((options, False) for options in ADJUSTED), ({}, True), (ADJUSTED[3], True)],
    ids=str,
)


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

    monkeypatch.setattr("cwbr_fused.overlap.steps.distances", refuse)
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


@soft_or_not
def test_one_graph_serves_every_batch_size_and_class_make_up(
    options: dict[str, Any], soft: bool
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(z: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        return cwbr_fused.loss([z, z[:, :2]], logits, targets, top_m=8, **options)

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed, size in enumerate((12, 19, 27)):
        z, logits, y = batch(seed, size, 5, 6)
        results = []
        for function in (compiled, step):
            leaf, targets = z.clone().requires_grad_(), smoothed(y, 6, 0.05) if soft else y.clone()
            for tensor in (leaf, logits, targets):
                torch._dynamo.mark_dynamic(tensor, 0)
            value = function(leaf, logits, targets)
            results.append((value, *torch.autograd.grad(value, leaf)))
        torch.testing.assert_close(*results)
    assert counter.frame_count == 1


@soft_or_not
def test_a_step_waits_for_no_value(
    options: dict[str, Any], soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "resolve", lambda name, device_type: "triton")
    with FakeTensorMode():
        z, logits, y = on("meta")
        z.requires_grad_()
        with NoWait("meta"):
            targets = logits.softmax(1) if soft else y
            cwbr_fused.loss([z, z], logits, targets, top_m=8, **options).backward()
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
