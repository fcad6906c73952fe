"""This package as a provider: each kind of workload by its public functions and operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cwbr_fused
from benchmarks.workloads import Inputs
from cwbr_fused.operations.autograd import OPERATIONS


def fused(inputs: Inputs, backend: str) -> Tensor:
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
    """Mean energy of a layer over samples and dimensions; its gradient comes with it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, *others: Any) -> Tensor:
        *arguments, backend = others
        energy, ctx.gradient = OPERATIONS[backend].class_attraction(z, *arguments)
        value: Tensor = energy.mean() / z.shape[1]
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * (grad / ctx.gradient.numel()), *(None,) * 5


def _attraction(inputs: Inputs, backend: str) -> Tensor:
    """The two operations of `CWBR`: the classes once per step, then each layer's energy."""
    assert inputs.logits is not None
    assert inputs.targets is not None
    seen = torch.ones(inputs.workload.classes, dtype=torch.bool, device=inputs.logits.device)
    confused, probability, _ = OPERATIONS[backend].top_confusions(
        inputs.logits, inputs.targets, seen, inputs.workload.top_m
    )
    index = torch.cat([inputs.targets[:, None], confused], 1)
    coefficient = torch.cat([torch.ones_like(probability[:, :1]), -probability], 1)
    layers = zip(inputs.features, inputs.bank_means, inputs.bank_vars, strict=True)
    values = [
        _Attraction.apply(z, mean, var, index, coefficient, backend) for z, mean, var in layers
    ]
    return torch.stack(values).mean()
