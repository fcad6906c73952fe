"""What is measured: named problems of realistic size, made from a seed.

Three kinds:
- "loss": the whole regularizer of one training step, from features, logits and targets;
- "pairs": one layer's overlap of all pairs of K classes, from their moments;
- "cwbr": what `CWBR` adds to a step: each sample's own class and, of all C by their logits, the
  `top_m` most confused with it; the energy of each layer against a bank of class means.

The values are such that distances are about 3: with independent noise instead, every distance of a
wide layer exceeds 104, where exp(-D) is 0 in float32, and a provider that computes nothing would
pass as right. It also means that no kernel gains by leaving hopeless pairs early.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

EPS = 1e-6


@dataclass(frozen=True)
class Workload:
    """A problem by its sizes; L = len(dims) layers.

    Attributes:
        groups: K, the classes of the batch (their expected number, where samples is 0).
        classes: C.
        samples: of each class in the batch; 0 draws the classes of a batch uniformly.
        batch: B; 0 for the kinds that start from moments.
        top_m: pairs; confused classes per sample for "cwbr"; None for all.
        patient: its strongest peers may take longer: a goal or the figure needs them.
    """

    name: str
    kind: Literal["loss", "pairs", "cwbr"]
    dims: tuple[int, ...]
    groups: int
    classes: int
    batch: int = 0
    samples: int = 0
    top_m: int | None = None
    patient: bool = False

    @property
    def all_elements(self) -> int:
        """Elements of the (pairs, D) tensors, all layers, when every pair is formed.

        Of "cwbr" nobody forms more than (B, 1 + top_m, D).
        """
        if self.kind == "cwbr":
            assert self.top_m is not None
            return self.batch * (1 + self.top_m) * sum(self.dims)
        return self.groups**2 * sum(self.dims)

    @property
    def chosen_elements(self) -> int:
        """The same when only the chosen pairs are formed."""
        if self.top_m is None or self.kind == "cwbr":
            return self.all_elements
        return min(self.top_m * sum(self.dims), self.all_elements)

    @property
    def images(self) -> int:
        """Of its batch; where only moments are given, two per class, the smallest such batch."""
        return self.batch or 2 * self.groups

    def shrunk(self) -> Workload:
        """The same kind of problem, small enough to run in milliseconds."""
        return replace(
            self,
            name=f"{self.name} shrunk",
            dims=tuple(min(d, 16) for d in self.dims),
            groups=min(self.groups, 8),
            classes=min(self.classes, 40),
            batch=min(self.batch, 8 * (self.samples or 8)),
            top_m=None if self.top_m is None else min(self.top_m, 12),
        )


@dataclass(frozen=True)
class Inputs:
    """The tensors of a problem; what its kind does not need is empty or None.

    Shapes: features L x (B, D); logits (B, C); targets (B,); means, vars L x (K, D); weights (K, K)
    symmetric with zero diagonal; bank_means L x (C, D); bank_vars L x (D,).
    """

    workload: Workload
    features: tuple[Tensor, ...] = ()
    logits: Tensor | None = None
    targets: Tensor | None = None
    means: tuple[Tensor, ...] = ()
    vars: tuple[Tensor, ...] = ()
    weights: Tensor | None = None
    bank_means: tuple[Tensor, ...] = ()
    bank_vars: tuple[Tensor, ...] = ()

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """Where gradients are wanted."""
        return (*self.features, *self.means, *self.vars)

    def double(self) -> Inputs:
        """The same numbers in float64, as new leaves."""

        def convert(value: Tensor) -> Tensor:
            return value.detach().double().requires_grad_(value.requires_grad)

        return replace(
            self,
            features=tuple(map(convert, self.features)),
            logits=None if self.logits is None else convert(self.logits),
            means=tuple(map(convert, self.means)),
            vars=tuple(map(convert, self.vars)),
            weights=None if self.weights is None else convert(self.weights),
            bank_means=tuple(map(convert, self.bank_means)),
            bank_vars=tuple(map(convert, self.bank_vars)),
        )


def _moments(rows: int, dims: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Means and variances (rows, dims) whose pairwise distances are about 3 in total."""
    mean = torch.randn(rows, dims, generator=generator) * (6 / dims) ** 0.5
    var = torch.exp(torch.randn(rows, dims, generator=generator) * 2 * (3 / dims) ** 0.5)
    return mean, var


def _targets(workload: Workload, generator: torch.Generator) -> Tensor:
    if workload.samples == 0:
        return torch.randint(workload.classes, (workload.batch,), generator=generator)
    drawn = torch.randperm(workload.classes, generator=generator)[: workload.groups]
    grouped = drawn.repeat_interleave(workload.samples)
    return grouped[torch.randperm(len(grouped), generator=generator)]


def _spread(targets: Tensor) -> Tensor:
    """+1, -1, +1, ... within each class, 0 for an odd class's last: about one variance for all."""
    order = torch.argsort(targets, stable=True)
    _, sizes = torch.unique_consecutive(targets[order], return_counts=True)
    start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    rank, size = torch.arange(len(targets)) - start, sizes.repeat_interleave(sizes)
    sign = torch.where((rank == size - 1) & (size % 2 == 1), 0, 1 - 2 * (rank % 2))
    return torch.empty(len(targets)).scatter(0, order, sign.float())


def _features(targets: Tensor, dims: int, generator: torch.Generator) -> Tensor:
    rows, row = torch.unique(targets, return_inverse=True)
    mean, var = _moments(len(rows), dims, generator)
    return mean[row] + var.sqrt()[row] * _spread(targets)[:, None]


def make(workload: Workload, device: str = "cpu", seed: int = 0) -> Inputs:
    """The inputs of `workload`, the same for every provider."""
    generator = torch.Generator().manual_seed(seed)

    def leaf(x: Tensor) -> Tensor:
        return x.to(device).requires_grad_()

    if workload.kind == "loss":
        targets = _targets(workload, generator)
        logits = 2 * torch.randn(workload.batch, workload.classes, generator=generator)
        features = tuple(leaf(_features(targets, d, generator)) for d in workload.dims)
        return Inputs(workload, features, logits.to(device), targets.to(device))
    if workload.kind == "cwbr":
        return _bank_of_means(workload, device, generator)

    moments = [_moments(workload.groups, d, generator) for d in workload.dims]
    means, variances = (tuple(leaf(m) for m in column) for column in zip(*moments, strict=True))
    weights = torch.rand(workload.groups, workload.groups, generator=generator).triu(1)
    weights = (weights + weights.T).to(device)
    return Inputs(workload, means=means, vars=variances, weights=weights)


def _bank_of_means(workload: Workload, device: str, generator: torch.Generator) -> Inputs:
    """Samples about the means of their classes, with the variances that all classes share."""
    targets = _targets(workload, generator)
    logits = 2 * torch.randn(workload.batch, workload.classes, generator=generator)
    features, means, variances = [], [], []
    for dims in workload.dims:
        mean, var = _moments(workload.classes, dims, generator)
        noise = torch.randn(workload.batch, dims, generator=generator)
        features.append((mean[targets] + var[0].sqrt() * noise).to(device).requires_grad_())
        means.append(mean.to(device))
        variances.append(var[0].clone().to(device))
    return Inputs(
        workload,
        tuple(features),
        logits.to(device),
        targets.to(device),
        bank_means=tuple(means),
        bank_vars=tuple(variances),
    )


def _loss(
    name: str, dims: tuple[int, ...], groups: int, samples: int, classes: int, top_m: int
) -> Workload:
    return Workload(name, "loss", dims, groups, classes, groups * samples, samples, top_m)


RESNET50 = (256, 512, 1024, 2048)
REALISTIC = (
    _loss("8x4", (2048,), 8, 4, 1000, 64),
    _loss("8x4 three layers", RESNET50[1:], 8, 4, 1000, 64),
    _loss("128x4 C=1000", (2048,), 128, 4, 1000, 64),
    _loss("128x4 C=10000", (2048,), 128, 4, 10_000, 64),
    _loss("CUB ResNet-50", RESNET50, 32, 4, 200, 64),
    _loss("iNat-18 ViT-B", (768,) * 4, 64, 4, 8142, 256),
    _loss("iNat-21 ViT-L", (1024,) * 4, 256, 4, 10_000, 1024),
    _loss("Herbarium Swin-B", (128, 256, 512, 1024), 512, 4, 15_501, 4096),
    Workload("shuffled DDP", "loss", (768,) * 4, 641, 10_000, 4096, 0, 1024),
    Workload("CWBR bank", "cwbr", (768,) * 4, 256, 10_000, 256, top_m=5),
    Workload("CWBR landmarks", "cwbr", (512,), 128, 81_313, 128, top_m=5),
)
SWEEP_DIMS = (768, 2048, 256)
SWEEP_GROUPS = (64, 200, 500, 1000, 2000, 5000)
# K and D that goals are set for, and the largest for the eager formulas in the figure.
PATIENT = ((200, 2048), (1000, 768), (1000, 2048), (500, 768))
SWEEP = tuple(
    Workload(f"pairs K={k} D={d}", "pairs", (d,), k, k, patient=(k, d) in PATIENT)
    for d in SWEEP_DIMS
    for k in SWEEP_GROUPS
)
BY_NAME = {w.name: w for w in (*REALISTIC, *SWEEP)}
