"""Who computes a workload: one table, every provider called alike and checked against float64."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

import cwbr_fused
from benchmarks import peers
from benchmarks.workloads import EPS, Inputs, Workload
from cwbr_fused import backends, reference
from cwbr_fused.ops import OPERATIONS, PairDistance

PLAIN = "plain"
MEMORY_LIMIT = 8e9
# Of the value, and of gradients relative to their largest entry.
TOLERANCE = 1e-4
# The check of an all-pairs workload weights so many pairs: its truth then costs M x D.
CHECKED_PAIRS = 4096


@dataclass(frozen=True)
class Provider:
    """One way to compute a workload.

    Attributes:
        call: Inputs -> scalar.
        copies: peak extra memory in (forward, step), in copies of the tensor (pairs, D), measured
            at sizes where that tensor dominates.
        chosen_only: the pairs of that tensor are the chosen ones, not all.
        kinds: the kinds of workloads it can do.
        most_groups: the largest K it is asked to do.
        missing: why it cannot run on this machine; None where it can.
    """

    name: str
    call: Callable[[Inputs], Tensor]
    copies: tuple[float, float] = (0, 0)
    chosen_only: bool = False
    kinds: tuple[str, ...] = ("loss", "pairs", "bank", "cwbr")
    most_groups: float = float("inf")
    missing: str | None = None

    @property
    def compiled(self) -> bool:
        return self.name.endswith("compiled")

    def takes(self, workload: Workload) -> bool:
        return workload.kind in self.kinds and workload.groups <= self.most_groups

    def elements(self, workload: Workload) -> int:
        """Elements of the (pairs, D) tensor that it forms, or would form."""
        return workload.chosen_elements if self.chosen_only else workload.all_elements

    def predicted_bytes(self, workload: Workload, mode: str) -> float:
        return 4 * self.elements(workload) * self.copies[list(RUN).index(mode)]


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
        return _fused_attraction(inputs, backend)
    assert inputs.weights is not None
    if workload.kind == "pairs":
        return cwbr_fused.functional.bhat_confusion_loss(
            inputs.means[0], inputs.vars[0], inputs.weights, top_m=None, backend=backend
        )
    return _fused_bank(inputs, inputs.weights, backend)


def _fused_bank(inputs: Inputs, weights: Tensor, backend: str) -> Tensor:
    """The bank rows that occur in a pair join the batch's; the pairs index the joined rows.

    The largest columns of a row by the operation that finds the largest logits.
    """
    workload, own = inputs.workload, inputs.targets
    everything = torch.ones(workload.classes, dtype=torch.bool, device=weights.device)
    found, *_ = OPERATIONS[backend].top_confusions(weights, own, everything, workload.top_m)
    rows = torch.arange(len(found), device=found.device).repeat_interleave(found.shape[1])
    columns = found.flatten()
    joined = torch.arange(len(columns), device=rows.device) + len(weights)
    pairs = torch.stack([rows, joined], dim=1)
    moments = zip(inputs.means, inputs.vars, inputs.bank_means, inputs.bank_vars, strict=True)
    values = []
    for mean, var, bank_mean, bank_var in moments:
        means, variances = (
            torch.cat([mean, bank_mean[columns]]),
            torch.cat([var, bank_var[columns]]),
        )
        d = PairDistance.apply(means, variances, pairs, EPS, backend)
        values.append(reference.overlap(d, weights[rows, columns], EPS, False))
    return torch.stack(values).mean()


class _Attraction(torch.autograd.Function):
    """Mean energy of a layer over samples and dimensions; its gradient comes with it."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, *others: Any) -> Tensor:
        *arguments, backend = others
        energy, ctx.gradient = OPERATIONS[backend].class_attraction(z, *arguments)
        return energy.mean() / z.shape[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.gradient * (grad / ctx.gradient.numel()), *(None,) * 5


def _fused_attraction(inputs: Inputs, backend: str) -> Tensor:
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


def peer(inputs: Inputs, overlap: peers.Overlap) -> Tensor:
    return peers.AROUND[inputs.workload.kind](inputs, overlap)


def _keops_missing() -> str | None:
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed"
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")
    return None


def table(device: str) -> dict[str, Provider]:
    """All providers by name, plain first; those that cannot run here say why in `missing`."""

    def compiled(overlap: peers.Overlap) -> Callable[[Inputs], Tensor]:
        return torch.compile(partial(peer, overlap=overlap), dynamic=False)

    of_chosen = partial(Provider, chosen_only=True, kinds=("loss", "bank"))
    providers = [
        Provider(PLAIN, partial(peer, overlap=peers.plain), (4, 8)),
        Provider("plain compiled", compiled(peers.plain), (0, 2)),
        Provider(
            "chunked",
            partial(peer, overlap=peers.chunked),
            (0, 4.2),
            kinds=("loss", "pairs", "bank"),
        ),
        # Against a bank it fails: one step at C = 10,000 takes more than 12 GB.
        Provider(
            "chunked checkpoint",
            partial(peer, overlap=peers.chunked_checkpoint),
            kinds=("loss", "pairs"),
        ),
        of_chosen("gathered", partial(peer, overlap=peers.gathered), (4, 10)),
        of_chosen("gathered compiled", compiled(peers.gathered), (0.5, 1.2)),
        Provider(
            "keops",
            partial(peer, overlap=peers.keops),
            kinds=("pairs",),
            most_groups=200,
            missing=_keops_missing(),
        ),
    ]
    for backend in ("reference", "cpu", "triton", "cuda"):
        missing = backends.rejection(backend, device)
        if backend == "triton" and device == "cpu":
            missing = "Triton's interpreter shows what is computed, not how fast"
        call = partial(fused, backend=backend)
        providers.append(Provider(f"cwbr {backend}", call, missing=missing))
    return {provider.name: provider for provider in providers}


def step(provider: Provider, inputs: Inputs) -> tuple[Tensor, ...]:
    """Forward and backward: the value, then a gradient for each leaf."""
    value = provider.call(inputs)
    return value.detach(), *torch.autograd.grad(value, inputs.leaves)


def forward(provider: Provider, inputs: Inputs) -> tuple[Tensor]:
    """The value alone, as in evaluation."""
    with torch.no_grad():
        return (provider.call(inputs),)


RUN: dict[str, Callable[[Provider, Inputs], tuple[Tensor, ...]]] = {
    "forward": forward,
    "step": step,
}


def _checkable(inputs: Inputs) -> tuple[Inputs, Inputs, peers.Overlap]:
    """The inputs to check on, the same in float64, and the peer that gives the truth."""
    if inputs.workload.kind != "pairs":
        return inputs, inputs.double(), peers.gathered
    assert inputs.weights is not None
    groups = len(inputs.weights)
    i, j = torch.triu_indices(groups, groups, 1, device=inputs.weights.device)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randperm(len(i), generator=generator)[:CHECKED_PAIRS].to(i.device)
    i, j = i[drawn], j[drawn]
    weights = torch.zeros_like(inputs.weights)
    weights[i, j] = weights[j, i] = inputs.weights[i, j]
    sparse = replace(inputs, weights=weights)

    def truth(
        x: peers.Gaussians, y: peers.Gaussians, w: Tensor, chosen: peers.Chosen | None
    ) -> Tensor:
        return peers.gathered(x, y, w, (i, j))

    return sparse, sparse.double(), truth


class Checker:
    """Compares providers with the float64 truth of one workload, at its full size."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs, double, overlap = _checkable(inputs)
        self.truth = step(Provider("truth", partial(peer, overlap=overlap)), double)

    def error(self, provider: Provider, mode: str = "step") -> float:
        """The largest error of value and gradients, each relative to its largest entry."""
        worst = 0.0
        results = RUN[mode](provider, self.inputs)
        for got, wanted in zip(results, self.truth[: len(results)], strict=True):
            if got.shape != wanted.shape:
                return float("inf")
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            worst = max(worst, float(error.nan_to_num(nan=float("inf"))))
        return worst

    def complaint(self, provider: Provider, mode: str = "step") -> str | None:
        """Why `provider` must not be timed; None where it is right."""
        try:
            error = self.error(provider, mode)
        except Exception as failure:
            return f"failed: {type(failure).__name__}: {str(failure).splitlines()[:1]}"
        return None if error <= TOLERANCE else f"wrong: off by {error:.1e} from float64"
