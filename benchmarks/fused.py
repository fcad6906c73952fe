"""This package as a provider: each kind of workload by its public functions and operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cwbr_fused
from benchmarks.workloads import Inputs
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.operations.backends import Backend


def fused(inputs: Inputs, backend: Backend) -> Tensor:
    """This package."""
    workload = inputs.workload
    if workload.kind == "loss":
        assert inputs.logits is not None
        assert inputs.targets is not None
        return cwbr_fused.loss(
            inputs.features, inputs.logits, inputs.targets, top_m=workload.top_m, backend=backend
        )
    if workload.kind == "cwbr":
        return _attraction(inputs, backend)
    assert inputs.weights is not None
    return cwbr_fused.functional.bhat_confusion_loss(
        inputs.means[0], inputs.vars[0], inputs.weights, top_m=None, backend=backend
    )


class _Attraction(torch.autograd.Function):
    """Mean energy over samples, dimensions and layers; its gradient comes with it."""

    @staticmethod
    def forward(ctx: Any, operation: Any, bank: Any, acting: Any, *features: Tensor) -> Tensor:
        ctx.widths = [z.shape[1] for z in features]
        ctx.gradient, numbers = operation(torch.cat(features, 1), *bank, *acting)
        value: Tensor = numbers[0].mean()
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.gradient.split(ctx.widths, 1)
        return *(None,) * 3, *(g * (grad / (g.numel() * len(gradients))) for g in gradients)


def _attraction(inputs: Inputs, backend: str) -> Tensor:
    """The two operations of `CWBR`: the classes once per step, then the energy of all layers."""
    assert inputs.logits is not None
    assert inputs.targets is not None
    seen = torch.ones(inputs.workload.classes, dtype=torch.bool, device=inputs.logits.device)
    operations = OPERATIONS[backend]
    rivals, probability, own = operations.top_confusions(
        inputs.logits, inputs.targets, seen, inputs.workload.top_m
    )
    shares = probability[:, :0]
    acting = inputs.targets[:, None], shares, own, rivals, probability, seen, 1.0
    var = torch.cat(inputs.bank_vars)
    bank = inputs.bank_means, var, var.new_ones(len(inputs.bank_means))
    value: Tensor = _Attraction.apply(operations.class_attraction, bank, acting, *inputs.features)
    return value
