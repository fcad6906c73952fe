"""Differentiable operations: autograd over the registered forward and backward operations.

Each class calls the forward and the backward operation of one backend, so that a new kernel needs
no code here. Differentiating a gradient again is an error that says what to use instead.

Functions take the name of the backend and look up `OPERATIONS[backend]`, because torch.compile can
trace a string.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cwbr_fused.operations import reference, schema
from cwbr_fused.operations.backends import PLAIN

_REFERENCE = SimpleNamespace(**{name: schema.pure_pytorch(name) for name in schema.SCHEMAS})
OPERATIONS: dict[str, Any] = {
    PLAIN: _REFERENCE,
    "reference": _REFERENCE,
    "cpu": getattr(torch.ops, schema.NAMESPACE),
    "cuda": getattr(torch.ops, schema.NAMESPACE),
    "triton": getattr(torch.ops, schema.TRITON_NAMESPACE),
}

Gradients = tuple[Tensor | None, ...]


class _FirstOrder(torch.autograd.Function):
    """Identity on a gradient; differentiating it is the error."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Gradients:
        raise RuntimeError(
            "cwbr_fused: expected a first derivative, got a second one: the fused kernels have no "
            "double backward; call the function of the same name in cwbr_fused.reference"
        )


def first_order(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """Marks what `backward` returns, so that differentiating it raises an error.

    `once_differentiable` reacts only to an incoming gradient that requires grad itself. With the
    usual `autograd.grad(loss, x, create_graph=True)` it would silently make the result a constant.
    """

    @wraps(backward)
    def guarded(ctx: Any, *grads: Tensor) -> Gradients:
        with torch.no_grad():
            results = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        sources = (*grads, *ctx.saved_tensors)
        return tuple(r if r is None else _FirstOrder.apply(r, *sources) for r in results)

    return guarded


def class_moments(
    z: Tensor, order: Tensor, offsets: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    """The differentiable operation of a backend or of `PLAIN`, as all functions here."""
    if backend == PLAIN:
        return reference.class_moments(z, order, offsets, eps)
    mean, var = ClassMoments.apply(z, order, offsets, eps, backend)
    return mean, var


def pair_distance(mean: Tensor, var: Tensor, pairs: Tensor, eps: float, backend: str) -> Tensor:
    """Of these pairs of classes, (P,): `reference.pair_distance` on that backend."""
    if backend == PLAIN:
        return reference.pair_distance(mean, var, pairs, eps)
    distance: Tensor = PairDistance.apply(mean, var, pairs, eps, backend)
    return distance


def all_pair_distance(mean: Tensor, var: Tensor, eps: float, backend: str) -> Tensor:
    """Of all pairs of classes, (K, K): `reference.all_pair_distance` on that backend."""
    if backend == PLAIN:
        return reference.all_pair_distance(mean, var, eps)
    distance: Tensor = AllPairDistance.apply(mean, var, eps, backend)
    return distance


class ClassMoments(torch.autograd.Function):
    """(z, order, offsets, eps, backend) -> mean, var; gradient to z."""

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, order: Tensor, offsets: Tensor, eps: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        mean, var = OPERATIONS[backend].class_moments(z, order, offsets, eps)
        ctx.save_for_backward(z, mean, var, order, offsets)
        ctx.eps, ctx.backend = eps, backend
        return mean, var

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        z, mean, var, order, offsets = ctx.saved_tensors
        grad = OPERATIONS[ctx.backend].class_moments_backward(
            grad_mean, grad_var, z, mean, var, order, offsets, ctx.eps
        )
        return grad, None, None, None, None


class PairDistance(torch.autograd.Function):
    """(mean, var, pairs, eps, backend) -> D (M,); gradients to mean and var."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, pairs: Tensor, eps: float, backend: str
    ) -> Tensor:
        ctx.save_for_backward(mean, var, pairs)
        ctx.eps, ctx.backend = eps, backend
        distance: Tensor = OPERATIONS[backend].pair_distance(mean, var, pairs, eps)
        return distance

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, pairs = ctx.saved_tensors
        operation = OPERATIONS[ctx.backend].pair_distance_backward
        return *operation(grad, mean, var, pairs, ctx.eps), None, None, None


class AllPairDistance(torch.autograd.Function):
    """(mean, var, eps, backend) -> D (K, K); gradients to mean and var."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, eps: float, backend: str) -> Tensor:
        ctx.save_for_backward(mean, var)
        ctx.eps, ctx.backend = eps, backend
        distance: Tensor = OPERATIONS[backend].all_pair_distance(mean, var, eps)
        return distance

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operation = OPERATIONS[ctx.backend].all_pair_distance_backward
        return *operation(grad, *ctx.saved_tensors, ctx.eps), None, None


# The gradients of an overlap are computed together with its value if they are no larger than this.
# A step then needs at most 16 MiB beside its inputs and outputs, including some for the kernels.
KEPT_BYTES = (1 << 24) - 3 * (1 << 17)
# They are stored times this factor, because overlaps of distant pairs are too small for float32.
KEPT_UNIT = 2.0**32


def weighted_overlap(
    mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool, backend: str
) -> Tensor:
    """The differentiable operation, which measures all distances once if the gradients fit."""
    if backend == PLAIN:
        return reference.weighted_overlap(mean, var, alpha, eps, log)
    wanted = torch.is_grad_enabled() and (mean.requires_grad or var.requires_grad)
    if wanted and 2 * mean.numel() * mean.element_size() <= KEPT_BYTES:
        kept: Tensor = OverlapWithGradient.apply(mean, var, alpha, eps, log, backend)
        return kept
    value: Tensor = WeightedOverlap.apply(mean, var, alpha, eps, log, backend)
    return value


class OverlapWithGradient(torch.autograd.Function):
    """(mean, var, alpha, eps, log, backend) -> scalar; gradients to mean and var, kept."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool, backend: str
    ) -> Tensor:
        ctx.unit = 1.0 if log else KEPT_UNIT
        value: Tensor
        value, grad_mean, grad_var = OPERATIONS[backend].weighted_overlap_with_gradient(
            mean.new_full((), ctx.unit), mean, var, alpha, eps, log
        )
        ctx.save_for_backward(mean, var, grad_mean, grad_var)
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, grad_mean, grad_var = ctx.saved_tensors
        factor = grad / ctx.unit
        return factor * grad_mean, factor * grad_var, None, None, None, None


class WeightedOverlap(torch.autograd.Function):
    """(mean, var, alpha, eps, log, backend) -> scalar; gradients to mean and var, in backward."""

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool, backend: str
    ) -> Tensor:
        value: Tensor = OPERATIONS[backend].weighted_overlap(mean, var, alpha, eps, log)
        ctx.save_for_backward(value, mean, var, alpha)
        ctx.eps, ctx.log, ctx.backend = eps, log, backend
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        operation = OPERATIONS[ctx.backend].weighted_overlap_backward
        grads = operation(grad, *ctx.saved_tensors, ctx.eps, ctx.log)
        return *grads, None, None, None, None


class Regularizer(torch.autograd.Function):
    """(order, offsets, pairs, weights, eps, log, backend, *features) -> scalar.

    The fused path: one forward and one backward operation for all layers. Gradients to features.
    """

    @staticmethod
    def forward(
        ctx: Any,
        order: Tensor,
        offsets: Tensor,
        pairs: Tensor,
        weights: Tensor,
        eps: float,
        log: bool,
        backend: str,
        *features: Tensor,
    ) -> Tensor:
        value: Tensor
        value, mean, var, distance = OPERATIONS[backend].regularizer(
            features, order, offsets, pairs, weights, eps, log
        )
        ctx.save_for_backward(*features, *mean, *var, distance, order, offsets, pairs, weights)
        ctx.eps, ctx.log, ctx.backend, ctx.layers = eps, log, backend, len(features)
        return value

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, layers = ctx.saved_tensors, ctx.layers
        features, moments = saved[:layers], saved[layers:-5]  # of every layer, or none
        mean, var = moments[: len(moments) // 2], moments[len(moments) // 2 :]
        grads = OPERATIONS[ctx.backend].regularizer_backward(
            grad, features, mean, var, *saved[-5:], ctx.eps, ctx.log
        )
        needed = ctx.needs_input_grad[7:]
        return *(None,) * 7, *(g if n else None for g, n in zip(grads, needed, strict=True))
