"""`cwbr_fused.loss` and its parts, on every backend this machine has."""

from __future__ import annotations

import copy
import pickle

import oracle
import pytest
import torch
from torch import Tensor

import cwbr_fused
from cwbr_fused import backends, functional, reference

EPS = 1e-6
BACKENDS = [name for name in backends.NAMES if backends.rejection(name, "cpu") is None]
OBJECTIVES = ["overlap", "log_overlap"]


def batch(seed: int, size: int, dims: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(size, dims, generator=generator)
    logits = torch.randn(size, classes, generator=generator) * 2
    return z, logits, torch.randint(classes, (size,), generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("top_m", [1, pytest.param(6, marks=pytest.mark.every_torch), 64, None])
def test_value_and_gradient_equal_the_reference(
    top_m: int | None, objective: str, backend: str
) -> None:
    for seed, (size, dims, classes) in enumerate([(9, 1, 3), (33, 13, 7), (40, 20, 50), (6, 5, 2)]):
        z, logits, y = batch(seed, size, dims, classes)
        features = [z.requires_grad_(), (z.detach()[:, :1] * 3 + 1).requires_grad_()]
        options = {"top_m": top_m, "objective": objective}
        value = cwbr_fused.loss(features, logits, y, backend=backend, **options)
        truth = [x.detach().double().requires_grad_() for x in features]
        expected = reference.loss(truth, logits.double(), y, **options)
        torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=2e-6)
        gradients = torch.autograd.grad(value, features)
        expected_gradients = torch.autograd.grad(expected, truth)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            tolerance = 1e-4 * float(wanted.abs().max()) + 1e-7
            torch.testing.assert_close(gradient.double(), wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float64_equals_the_literal_formulas(backend: str) -> None:
    z, logits, y = (t.double() if t.is_floating_point() else t for t in batch(3, 30, 6, 5))
    for top_m in (4, None):
        value = cwbr_fused.loss([z, z[:, :2]], logits, y, top_m=top_m, backend=backend)
        expected = oracle.loss([z, z[:, :2]], logits, y, top_m, 2, EPS)
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_functionals_compose_to_the_loss(backend: str) -> None:
    z, logits, y = batch(4, 40, 9, 8)
    classes, mu, var, counts, inv = functional.class_stats_diag(z, y, backend=backend)
    expected = reference.class_stats_diag(z, y)
    torch.testing.assert_close((classes, mu, var, counts, inv), expected)
    alpha = functional.confusion_alpha(logits, y, classes, inv, backend=backend)
    torch.testing.assert_close(alpha, reference.confusion_alpha(logits, y, classes, inv))
    d, rho = functional.bhattacharyya_diag(mu, var, backend=backend)
    torch.testing.assert_close(
        (d, rho), reference.bhattacharyya_diag(mu, var), rtol=1e-5, atol=1e-5
    )
    for top_m in (5, 10_000, None):
        value = functional.bhat_confusion_loss(mu, var, alpha, top_m, backend=backend)
        expected_value = cwbr_fused.loss(z, logits, y, top_m=top_m, backend="reference")
        torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accumulated_in_float32(dtype: torch.dtype, backend: str) -> None:
    z, logits, y = batch(5, 32, 12, 6)
    z, logits = z.to(dtype).requires_grad_(), logits.to(dtype)
    value = cwbr_fused.loss(z, logits, y, backend=backend)
    truth = z.detach().double().requires_grad_()
    expected = reference.loss(truth, logits.double(), y)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(value, z)
    (wanted,) = torch.autograd.grad(expected, truth)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_integer_dtype_of_targets_gives_the_same_loss(dtype: torch.dtype, backend: str) -> None:
    z, logits, y = batch(6, 20, 4, 5)
    expected = cwbr_fused.loss(z, logits, y, backend=backend)
    torch.testing.assert_close(cwbr_fused.loss(z, logits, y.to(dtype), backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_m", [64, None])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "targets", [[], [3], [0, 1, 2, 3], [2, 2, 2, 2], [1, 1, 0, 3]], ids=lambda t: str(t)
)
def test_fewer_than_two_usable_classes_give_a_connected_zero(
    targets: list[int], objective: str, top_m: int | None, backend: str
) -> None:
    z = torch.randn(len(targets), 3, requires_grad=True)
    logits = torch.randn(len(targets), 4, requires_grad=True)
    y = torch.tensor(targets, dtype=torch.int64)
    value = cwbr_fused.loss(z, logits, y, top_m=top_m, objective=objective, backend=backend)
    value.backward()
    assert value.item() == 0.0
    assert z.grad is not None
    assert not z.grad.any()
    assert logits.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
def test_a_broken_feature_of_a_used_class_is_not_hidden(bad: float, backend: str) -> None:
    z, logits, y = batch(7, 24, 4, 3)
    z[5, 2] = bad
    value = cwbr_fused.loss(z.requires_grad_(), logits, y, backend=backend)
    (gradient,) = torch.autograd.grad(value, z)
    assert torch.isnan(value)
    assert not torch.isfinite(gradient[y == y[5]][:, 2]).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_broken_feature_of_a_left_out_sample_changes_nothing(backend: str) -> None:
    z, logits, y = batch(8, 25, 4, 3)
    y[0], logits = 3, torch.cat([logits, logits[:, :1]], dim=1)
    broken = z.clone()
    broken[0] = float("nan")
    values = [cwbr_fused.loss(x, logits, y, backend=backend) for x in (z, broken)]
    assert torch.equal(*values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_tokens_and_vectors_are_pooled_and_averaged_over_layers(backend: str) -> None:
    _, logits, y = batch(9, 16, 1, 4)
    layers = {
        "map": torch.randn(16, 6, 3, 2),
        "tokens": torch.randn(16, 5, 7),
        "vec": torch.randn(16, 3),
    }
    vectors = [layers["map"].mean((2, 3)), layers["tokens"][:, 0], layers["vec"]]
    expected = sum(cwbr_fused.loss(v, logits, y, backend="reference") for v in vectors) / 3
    for features in (layers, list(layers.values()), vectors):
        value = cwbr_fused.loss(features, logits, y, backend=backend)
        torch.testing.assert_close(value, torch.as_tensor(expected), rtol=1e-5, atol=1e-7)


def test_mixed_layer_dtypes_are_computed_in_the_widest() -> None:
    z, logits, y = batch(10, 16, 4, 4)
    value = cwbr_fused.loss([z.half(), z.double()], logits, y)
    expected = reference.loss([z.half().double(), z.double()], logits.double(), y)
    assert value.dtype == torch.float64
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


def test_scale_match_doubles_the_cross_entropy_and_follows_both_gradients() -> None:
    ce = torch.tensor(2.0, requires_grad=True)
    reg = torch.tensor(0.5, requires_grad=True)
    total = cwbr_fused.scale_match(ce, reg)
    total.backward()
    assert total.item() == pytest.approx(4.0, rel=1e-5)
    assert ce.grad is not None
    assert reg.grad is not None
    assert (ce.grad.item(), reg.grad.item()) == (1.0, pytest.approx(4.0, rel=1e-5))


def test_scale_match_of_a_silent_regularizer_leaves_the_cross_entropy() -> None:
    ce = torch.tensor(2.0)
    assert cwbr_fused.scale_match(ce, torch.tensor(0.0)).item() == 2.0


def test_scale_match_of_the_logarithm_is_its_limit() -> None:
    z, logits, y = (t.double() if t.is_floating_point() else t for t in batch(11, 20, 3, 4))
    z.requires_grad_()
    ce = torch.tensor(1.7, dtype=torch.float64)
    plain = cwbr_fused.scale_match(ce, reference.loss(z, logits, y), eps=1e-300)
    log_reg = reference.loss(z, logits, y, objective="log_overlap")
    log = cwbr_fused.scale_match(ce, log_reg, objective="log_overlap")
    assert log.item() == pytest.approx(ce.item())
    torch.testing.assert_close(
        torch.autograd.grad(log, z, retain_graph=True), torch.autograd.grad(plain, z)
    )


def test_module_uses_the_named_layers_and_survives_copies() -> None:
    z, logits, y = batch(12, 16, 4, 4)
    module = cwbr_fused.ConfusionWeightedBhatReg(["a", "b"], top_m=3, objective="log_overlap")
    features = {"b": z, "unused": z * 100, "a": z * 2}
    expected = cwbr_fused.loss([z * 2, z], logits, y, top_m=3, objective="log_overlap")
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(features, logits, y), expected)
    assert module.state_dict() == {}
    assert "top_m=3" in repr(module)


@pytest.mark.parametrize("top_m", [8, None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_to_one_graph_without_recompiling(backend: str, top_m: int | None) -> None:
    compiled_graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        compiled_graphs.append(graph)
        return graph

    def step(z: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        ce = torch.nn.functional.cross_entropy(logits, y)
        reg = cwbr_fused.loss([z, z * 2], logits, y, top_m=top_m, backend=backend)
        return cwbr_fused.scale_match(ce, reg)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=count)
    for seed in range(5):
        z, logits, y = batch(seed, 24, 5, 2 + 3 * seed)
        logits = torch.nn.functional.pad(logits, (0, 20 - logits.shape[1]), value=-5.0)
        gradients = []
        for function in (compiled, step):
            leaf = z.clone().requires_grad_()
            function(leaf, logits, y).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(gradients[0], gradients[1])
    assert len(compiled_graphs) == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_are_not_changed(backend: str) -> None:
    z, logits, y = batch(13, 20, 4, 5)
    copies = z.clone(), logits.clone(), y.clone()
    for top_m in (8, None):
        cwbr_fused.loss(z.requires_grad_(), logits, y, top_m=top_m, backend=backend).backward()
    assert all(torch.equal(a, b) for a, b in zip((z, logits, y), copies, strict=True))
