"""Every operation under torch.library's own checks, and every Function under gradcheck."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from arguments import operation_arguments
from kernel_inputs import flat, written
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cwbr_fused.operations import autograd, backends, schema

EPS = 1e-6
# "reference" calls the closed forms directly, "cpu" through the dispatcher, whatever is built.
BACKENDS = ("reference", "cpu")


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_operation_passes_opcheck(name: str) -> None:
    operation = getattr(torch.ops.cwbr_fused, name).default
    torch.library.opcheck(operation, operation_arguments()[name])


@pytest.mark.parametrize(("device", "layers_kept"), [("cpu", 0), ("cuda", 2)])
def test_moments_are_kept_for_the_gradient_on_a_gpu_alone(device: str, layers_kept: int) -> None:
    features, *planned = operation_arguments()["regularizer"]
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty_like(x, device=device) for x in (*features, *planned[:4])]
        _, mean, var, _ = torch.ops.cwbr_fused.regularizer(tensors[:2], *tensors[2:], *planned[4:])
    shapes = [(len(planned[1]) - 1, z.shape[1]) for z in features[:layers_kept]]
    assert [t.shape for t in mean] == [t.shape for t in var] == shapes


def tensors(argument: Any) -> list[Tensor]:
    return flat(argument) if isinstance(argument, (Tensor, list)) else []


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_operation_changes_what_its_schema_says_and_nothing_else(name: str) -> None:
    arguments, untouched = operation_arguments()[name], operation_arguments()[name]
    versions = [[t._version for t in tensors(a)] for a in arguments]
    getattr(torch.ops.cwbr_fused, name)(*arguments)
    for position, (given, old) in enumerate(zip(arguments, untouched, strict=True)):
        every = zip(tensors(given), tensors(old), versions[position], strict=True)
        for now, before, version in every:
            if position in written(name):
                assert not torch.equal(now, before)
                assert now._version > version
            else:
                assert now._version == version
                torch.testing.assert_close(now, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in schema.SCHEMAS if written(name)])
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_what_was_saved_before_it_was_written_cannot_be_differentiated(
    name: str, backend: str
) -> None:
    if reason := backends.rejection(backend, "cpu"):
        pytest.skip(reason)
    for position in written(name):
        arguments = operation_arguments(torch.float32)[name]
        saved = tensors(arguments[position])[-1]
        loss = (torch.ones_like(saved, requires_grad=True) * saved).sum()
        getattr(autograd.OPERATIONS[backend], name)(*arguments)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def functions(backend: str) -> dict[str, tuple[Any, tuple[Tensor, ...]]]:
    """Name -> (differentiable function, its inputs), for each autograd Function."""
    arguments = operation_arguments()
    z, order, offsets, _ = arguments["class_moments"]
    mean, var, pairs, _ = arguments["pair_distance"]
    alpha = arguments["weighted_overlap"][2]
    _, _, planned_pairs, weights = arguments["regularizer"][1:5]

    def moments(z: Tensor) -> tuple[Tensor, ...]:
        mean, var = autograd.ClassMoments.apply(z, order, offsets, EPS, backend)
        return mean, var

    cases: dict[str, tuple[Any, tuple[Tensor, ...]]] = {
        "class_moments": (moments, (z,)),
        "pair_distance": (
            lambda mean, var: autograd.PairDistance.apply(mean, var, pairs, EPS, backend),
            (mean, var),
        ),
        "all_pair_distance": (
            lambda mean, var: autograd.AllPairDistance.apply(mean, var, EPS, backend),
            (mean, var),
        ),
    }
    for log in (False, True):
        cases[f"weighted_overlap log={log}"] = (
            lambda mean, var, log=log: autograd.weighted_overlap(
                mean, var, alpha, EPS, log, backend
            ),
            (mean, var),
        )
        cases[f"regularizer log={log}"] = (
            lambda z, log=log: autograd.Regularizer.apply(
                order, offsets, planned_pairs, weights, EPS, log, backend, z, z[:, :3] * 2
            ),
            (z,),
        )
    return cases


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", functions("reference"))
def test_function_has_the_numerical_derivative(name: str, backend: str) -> None:
    function, inputs = functions(backend)[name]
    assert torch.autograd.gradcheck(function, tuple(x.clone().requires_grad_() for x in inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", functions("reference"))
def test_second_derivative_is_refused_not_dropped(name: str, backend: str) -> None:
    function, inputs = functions(backend)[name]
    leaves = [x.clone().requires_grad_() for x in inputs]
    output = function(*leaves)
    value = output.sum() if isinstance(output, Tensor) else sum(o.sum() for o in output)
    gradients = torch.autograd.grad(value, leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no double backward.*cwbr_fused\.reference"):
        torch.autograd.grad(sum(g.sum() for g in gradients), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needed", [(True, False), (False, True), (True, True)])
def test_each_subset_of_requires_grad_gets_the_same_gradient(
    needed: tuple[bool, bool], backend: str
) -> None:
    z, order, offsets, _ = operation_arguments()["class_moments"]
    _, _, pairs, weights = operation_arguments()["regularizer"][1:5]
    features = [z.clone(), z[:, :4].clone()]
    moments = [t.clone() for t in operation_arguments()["pair_distance"][:2]]
    for inputs, function in (
        (
            features,
            lambda a, b: autograd.Regularizer.apply(
                order, offsets, pairs, weights, EPS, False, backend, a, b
            ),
        ),
        (moments, lambda a, b: autograd.AllPairDistance.apply(a, b, EPS, backend).sum()),
    ):
        full = [x.clone().requires_grad_() for x in inputs]
        expected = torch.autograd.grad(function(*full), full)
        partial = [x.clone().requires_grad_(n) for x, n in zip(inputs, needed, strict=True)]
        function(*partial).backward()
        for x, n, gradient in zip(partial, needed, expected, strict=True):
            assert (x.grad is not None) == n
            if n:
                torch.testing.assert_close(x.grad, gradient, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_and_sliced_gradients_are_read_by_their_strides(backend: str) -> None:
    z, order, offsets, _ = operation_arguments()["class_moments"]
    mean, var, pairs, _ = operation_arguments()["pair_distance"]
    for function, inputs in (
        (lambda z: autograd.ClassMoments.apply(z, order, offsets, EPS, backend)[1], (z,)),
        (lambda m, v: autograd.AllPairDistance.apply(m, v, EPS, backend), (mean, var)),
        (lambda m, v: autograd.PairDistance.apply(m, v, pairs, EPS, backend), (mean, var)),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function(*leaves)
        dense = torch.randn(output.shape, dtype=output.dtype)
        wide = torch.stack([dense, dense + 1], dim=-1)
        strided = wide[..., 0]
        expanded = torch.ones((), dtype=output.dtype).expand(output.shape)
        for gradient in (strided, expanded, dense.flip(0)):
            expected = torch.autograd.grad(output, leaves, gradient.contiguous(), retain_graph=True)
            actual = torch.autograd.grad(output, leaves, gradient, retain_graph=True)
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs_give_the_contiguous_result(backend: str) -> None:
    z, order, offsets, _ = operation_arguments()["class_moments"]
    _, _, pairs, weights = operation_arguments()["regularizer"][1:5]
    wide = torch.stack([z, z + 1], dim=-1)
    assert not wide[..., 0].is_contiguous()
    results = []
    for features in (z, wide[..., 0], z.T.contiguous().T, z.flip(0).flip(0)):
        leaf = features.detach().requires_grad_()
        value = autograd.Regularizer.apply(
            order, offsets, pairs, weights, EPS, False, backend, leaf
        )
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)
