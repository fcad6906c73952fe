"""Who computes a workload: one table, every provider called alike and checked against float64."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from benchmarks import measure, peers
from benchmarks.fused import fused
from benchmarks.workloads import Inputs, Workload
from cwbr_fused import backends

EAGER = "eager"
KINDS = ("loss", "pairs", "cwbr")
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
        compiled: its first call compiles for the sizes of its inputs.
        steady: its first call takes as long as any other, whatever the values: a slow one is not
            called again to be timed.
        missing: why it cannot run on this machine; None where it can.
    """

    name: str
    call: Callable[[Inputs], Tensor]
    copies: tuple[float, float] = (0, 0)
    chosen_only: bool = False
    kinds: tuple[str, ...] = KINDS
    compiled: bool = False
    steady: bool = False
    missing: str | None = None

    def takes(self, workload: Workload) -> bool:
        return workload.kind in self.kinds

    def elements(self, workload: Workload) -> int:
        """Elements of the (pairs, D) tensor that it forms, or would form."""
        return workload.chosen_elements if self.chosen_only else workload.all_elements

    def predicted_bytes(self, workload: Workload, mode: str) -> float:
        return 4 * self.elements(workload) * self.copies[list(RUN).index(mode)]


def peer(inputs: Inputs, overlap: peers.Overlap) -> Tensor:
    return peers.AROUND[inputs.workload.kind](inputs, overlap)


def _keops_missing() -> str | None:
    if importlib.util.find_spec("pykeops") is None:
        return "pykeops is not installed"
    os.environ.setdefault("PYKEOPS_VERBOSE", "0")
    return None


def table(device: str) -> dict[str, Provider]:
    """All providers by name, eager first; those that cannot run here say why in `missing`."""

    steady = device == "cpu"

    def compiled(overlap: peers.Overlap) -> Callable[[Inputs], Tensor]:
        return torch.compile(partial(peer, overlap=overlap), dynamic=False)

    of_all = partial(Provider, kinds=("loss", "pairs"))
    of_chosen = partial(Provider, kinds=("loss",), chosen_only=True)
    providers = [
        Provider(EAGER, partial(peer, overlap=peers.eager), (4, 8), steady=steady),
        Provider("eager compiled", compiled(peers.eager), (0, 2), compiled=True),
        of_all("chunked", partial(peer, overlap=peers.chunked), (0, 4.2), steady=steady),
        of_all(
            "chunked checkpoint", partial(peer, overlap=peers.chunked_checkpoint), steady=steady
        ),
        of_chosen("gathered", partial(peer, overlap=peers.gathered), (4, 10), steady=steady),
        of_chosen("gathered compiled", compiled(peers.gathered), (0.5, 1.2), compiled=True),
        Provider(
            "keops",
            partial(peer, overlap=peers.keops),
            kinds=("pairs",),
            compiled=True,
            missing=_keops_missing(),
        ),
    ]
    for backend in ("reference", "cpu", "triton", "cuda"):
        missing = backends.rejection(backend, device)
        if backend == "triton" and device == "cpu":
            missing = "Triton's interpreter shows what is computed, not how fast"
        call = partial(fused, backend=backend)
        providers.append(
            Provider(
                f"cwbr {backend}",
                call,
                steady=steady and backend == "reference",
                missing=missing,
            )
        )
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
        self.device = inputs.leaves[0].device.type
        self.truth = step(Provider("truth", partial(peer, overlap=overlap)), double)

    def attempt(self, provider: Provider, mode: str = "step") -> tuple[float, float]:
        """The largest error of value and gradients, each relative to its largest entry; the seconds
        that the call took."""
        results: list[Tensor] = []
        taken = measure.seconds(
            lambda: results.extend(RUN[mode](provider, self.inputs)), self.device
        )
        worst = 0.0
        for got, wanted in zip(results, self.truth[: len(results)], strict=True):
            if got.shape != wanted.shape:
                return float("inf"), taken
            error = (got.double() - wanted).abs().max() / wanted.abs().max()
            worst = max(worst, float(error.nan_to_num(nan=float("inf"))))
        return worst, taken

    def error(self, provider: Provider, mode: str = "step") -> float:
        return self.attempt(provider, mode)[0]

    def judge(self, provider: Provider, mode: str = "step") -> tuple[str | None, float]:
        """Why `provider` must not be timed, None where it is right; the seconds of its call."""
        try:
            error, taken = self.attempt(provider, mode)
        except Exception as failure:
            return f"failed: {type(failure).__name__}: {str(failure).splitlines()[:1]}", 0.0
        return None if error <= TOLERANCE else f"wrong: off by {error:.1e} from float64", taken

    def complaint(self, provider: Provider, mode: str = "step") -> str | None:
        """Why `provider` must not be timed; None where it is right."""
        return self.judge(provider, mode)[0]
