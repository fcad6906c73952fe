"""Automatic mixed precision: autocast changes no operation, and GradScaler skips broken batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_inputs import outcome
from test_ops import operation_arguments
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cwbr_fused
from cwbr_fused import backends, reference
from cwbr_fused.operations import autograd, schema

BACKENDS = [name for name in backends.NAMES if backends.rejection(name, "cpu") is None]
HALVES = [torch.float16, torch.bfloat16]


def half_samples(name: str, given: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """The given arguments with the per-sample inputs, features and logits, in `dtype`."""
    parameters = getattr(torch.ops.cwbr_fused, name).default._schema.arguments
    arguments = dict(zip((p.name for p in parameters), given, strict=True))
    for samples in arguments.keys() & {"z", "logits"}:
        arguments[samples] = arguments[samples].to(dtype)
    if "features" in arguments:
        arguments["features"] = [z.to(dtype) for z in arguments["features"]]
    return tuple(arguments.values())


@pytest.mark.every_torch
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_autocast_changes_no_operation(name: str, backend: str) -> None:
    operation = getattr(autograd.OPERATIONS[backend], name)
    given = operation_arguments(torch.float32, backend)[name]
    for cast_to in HALVES:
        for arguments in (given, half_samples(name, given, cast_to)):
            expected = outcome(operation, name, arguments)
            with torch.autocast("cpu", dtype=cast_to):
                actual = outcome(operation, name, arguments)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_autocast_keeps_the_dtype_of_no_classes() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = reference.all_pair_distance(torch.empty(0, 4), torch.empty(0, 4), 1e-6)
    assert (distance.shape, distance.dtype) == ((0, 0), torch.float32)


@pytest.mark.parametrize("key", schema.AUTOCAST_KEYS)
@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_every_operation_declares_what_autocast_does(name: str, key: str) -> None:
    for namespace in (schema.NAMESPACE, schema.TRITON_NAMESPACE):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return features, self.head(features.relu())


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 6, generator=generator), torch.arange(24) % 4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_m", [4, None])
@pytest.mark.parametrize("dtype", HALVES)
def test_loss_of_an_autocast_network_is_accumulated_in_float32(
    dtype: torch.dtype, top_m: int | None, backend: str
) -> None:
    x, y = batch()
    network = Network()
    with torch.autocast("cpu", dtype=dtype):
        features, logits = network(x)
        value = cwbr_fused.loss(features, logits, y, top_m=top_m, backend=backend)
    assert features.dtype == logits.dtype == dtype
    assert value.dtype == torch.float32
    outside = cwbr_fused.loss(features, logits, y, top_m=top_m, backend=backend)
    assert torch.equal(value, outside)
    truth = reference.loss(features.double(), logits.double(), y, top_m=top_m)
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=0)
    with torch.autocast("cpu", dtype=dtype):
        (inside,) = torch.autograd.grad(value, features, retain_graph=True)
    (gradient,) = torch.autograd.grad(outside, features, retain_graph=True)
    (wanted,) = torch.autograd.grad(truth, features)
    assert gradient.dtype == dtype
    assert torch.equal(inside, gradient)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(
        gradient, wanted, rtol=rounding, atol=rounding * float(wanted.abs().max())
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "soft targets"])
@pytest.mark.parametrize("dtype", HALVES)
def test_cwbr_does_the_same_inside_autocast_as_outside(
    dtype: torch.dtype, soft: bool, backend: str
) -> None:
    x, y = batch()
    targets = torch.nn.functional.one_hot(y, 4) * 0.8 + 0.05 if soft else y
    results = []
    for inside in (True, False):
        network, cwbr = Network(), cwbr_fused.CWBR(4, backend=backend)
        for _ in range(3):
            network.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                features, logits = network(x)
                ce = cross_entropy(logits, targets)
                with torch.autocast("cpu", dtype=dtype, enabled=inside):
                    energy = cwbr(features, logits, targets)
            ce.backward()
        gradient = network.body.weight.grad
        results.append((energy, gradient, *cwbr.state_dict().values()))
        assert energy != 0
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", HALVES)
def test_scale_match_weights_an_autocast_cross_entropy_in_float32(dtype: torch.dtype) -> None:
    x, y = batch()
    network = Network()
    with torch.autocast("cpu", dtype=dtype):
        features, logits = network(x)
        ce = cross_entropy(logits, y)
        total = cwbr_fused.scale_match(ce, cwbr_fused.loss(features, logits, y))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(2 * ce.item(), rel=1e-4)
    for log in ("overlap", "log_overlap"):
        # In half precision eps is lost beside, and the quotient beyond, the largest number.
        terms = (torch.tensor(v, dtype=dtype, requires_grad=True) for v in (2.0, 1e-7))
        half_ce, half_reg = terms
        total = cwbr_fused.scale_match(half_ce, half_reg, objective=log)
        total.backward()
        assert total.dtype == torch.float32
        assert total.isfinite()
        assert half_ce.grad is not None
        assert half_ce.grad.item() == 1


def step(network: Network, scaler: torch.amp.GradScaler, x: Tensor, y: Tensor, mask: Tensor) -> Any:
    """One scaled training step; `mask` is added to the logits. Returns the loss."""
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        features, logits = network(x)
        reg = cwbr_fused.loss(features, logits + mask, y, objective="log_overlap")
        total = cwbr_fused.scale_match(cross_entropy(logits, y), reg, objective="log_overlap")
    scaler.scale(total).backward()
    scaler.step(optimizer)
    scaler.update()
    return total.detach()


@pytest.mark.parametrize("bad", ["inf feature", "nan feature", "float16 overflow", "nan logit"])
def test_grad_scaler_skips_a_broken_batch_and_trains_on(bad: str) -> None:
    x, y = batch()
    network, scaler = Network(), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    broken, mask = x.clone(), torch.zeros(24, 4)
    values = {"inf feature": float("inf"), "nan feature": float("nan"), "float16 overflow": 1e5}
    if bad in values:
        broken[5, 2] = values[bad]
    else:
        mask[5, 2] = float("nan")
    before = [p.detach().clone() for p in network.parameters()]

    assert not step(network, scaler, broken, y, mask).isfinite()
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))
    assert scaler.get_scale() == 2.0**7

    assert step(network, scaler, x, y, torch.zeros(24, 4)).isfinite()
    assert all(p.isfinite().all() for p in network.parameters())
    assert not any(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_scaling_the_loss_saves_half_precision_gradients_from_underflow(backend: str) -> None:
    x, y = batch()
    logits = x[:, :4]
    z, scale = x.half().requires_grad_(), 2.0**16
    value = cwbr_fused.loss(z, logits, y, backend=backend) * 1e-6
    (unscaled,) = torch.autograd.grad(value, z, retain_graph=True)
    (scaled,) = torch.autograd.grad(value * scale, z)
    truth = z.detach().double().requires_grad_()
    (wanted,) = torch.autograd.grad(reference.loss(truth, logits, y) * 1e-6, truth)
    assert ((unscaled == 0) & (wanted != 0)).any()
    torch.testing.assert_close(scaled.double() / scale, wanted, rtol=1e-3, atol=1e-12)
