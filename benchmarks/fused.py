"""This package as a provider: each kind of workload by its public functions and operations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import cwbr_fused
from benchmarks.workloads import EPS, Inputs
from cwbr_fused.operations.autograd import OPERATIONS

# Rows of a batch that meet the bank at once: with a few bank rows each they fit a cache.
BLOCK_ROWS = 32


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
    if workload.kind == "pairs":
        return cwbr_fused.functional.bhat_confusion_loss(
            inputs.means[0], inputs.vars[0], inputs.weights, top_m=None, backend=backend
        )
    return _bank(inputs, inputs.weights, backend)


def _bank(inputs: Inputs, weights: Tensor, backend: str) -> Tensor:
    """The largest columns of a row by the operation that finds the largest logits."""
    everything = torch.ones(inputs.workload.classes, dtype=torch.bool, device=weights.device)
    columns, *_ = OPERATIONS[backend].top_confusions(
        weights, inputs.targets, everything, inputs.workload.top_m
    )
    chosen = weights.gather(1, columns)
    share = chosen / chosen.sum().clamp(min=EPS)
    layers = zip(inputs.means, inputs.vars, inputs.bank_means, inputs.bank_vars, strict=True)
    with_gradient = torch.is_grad_enabled()
    values = [
        _BankOverlap.apply(*layer, columns, share, backend, with_gradient) for layer in layers
    ]
    return torch.stack(values).mean()


class _BankOverlap(torch.autograd.Function):
    """`sum(share exp(-D))` over the pairs of a batch row and a bank row of a layer.

    Bank rows have no gradient, and need stay no longer than their pairs' gradients take: a block of
    the batch's rows is joined by its bank rows, and the gradient comes with the value.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, var: Tensor, *others: Any) -> Tensor:
        bank_mean, bank_var, columns, share, backend, with_gradient = others
        operations = OPERATIONS[backend]
        block, per_row = min(BLOCK_ROWS, len(mean)), columns.shape[1]
        moments = mean.new_empty(2, block * (1 + per_row), mean.shape[1])
        position = torch.arange(block * per_row, device=mean.device)
        block_pairs = torch.stack([position // per_row, position + block], 1)
        value: Tensor = mean.new_zeros(())
        gradients = []
        for first in range(0, len(mean), block):
            rows = slice(first, first + block)
            bank_rows = columns[rows].flatten()
            count = len(mean[rows])
            for joined, own, bank in zip(moments, (mean, var), (bank_mean, bank_var), strict=True):
                joined[:count] = own[rows]
                torch.index_select(bank, 0, bank_rows, out=joined[block : block + len(bank_rows)])
            pairs = block_pairs[: len(bank_rows)]
            overlap = share[rows].flatten() * torch.exp(
                -operations.pair_distance(*moments, pairs, EPS)
            )
            value = value + overlap.sum()
            if with_gradient:
                both = operations.pair_distance_backward(-overlap, *moments, pairs, EPS)
                gradients.append([gradient[:count] for gradient in both])
        ctx.gradients = [torch.cat(of_blocks) for of_blocks in zip(*gradients, strict=True)]
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * grad for gradient in ctx.gradients), *(None,) * 6


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
