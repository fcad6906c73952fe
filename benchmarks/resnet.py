"""The share of a real training step: ResNet-50 on 224 x 224 images, four layers regularized."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cwbr_fused
from benchmarks import measure
from benchmarks.providers import Provider, step
from benchmarks.results import Row
from benchmarks.session import Session
from benchmarks.workloads import RESNET50, Inputs, Workload

# CUB's classes, in a batch that a training step on two CPU cores can afford.
WORKLOAD = Workload("ResNet-50 step", "loss", RESNET50, 8, 200, 32, 4, 64)
# A step takes seconds on a CPU: these providers, this often.
TIMED, ROUNDS = ("plain", "cwbr cpu", "cwbr triton", "cwbr cuda"), 3


class Bottleneck(nn.Module):
    """(B, planes_in, H, W) -> (B, 4 planes, H/stride, W/stride), He et al. 2015, v1.5."""

    def __init__(self, planes_in: int, planes: int, stride: int) -> None:
        super().__init__()
        out = 4 * planes
        self.body = nn.Sequential(
            nn.Conv2d(planes_in, planes, 1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, planes, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(planes),
            nn.ReLU(inplace=True),
            nn.Conv2d(planes, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or planes_in != out:
            self.shortcut = nn.Sequential(
                nn.Conv2d(planes_in, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.relu(self.body(x) + self.shortcut(x))
        return out


class ResNet50(nn.Module):
    """(B, 3, H, W) -> the outputs of its four stages, and logits (B, classes)."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, padding=3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1),
        )
        self.stages = nn.ModuleList()
        planes_in = 64
        for index, (planes, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3))):
            stage = nn.Sequential()
            for block in range(blocks):
                stage.append(Bottleneck(planes_in, planes, 2 if index and not block else 1))
                planes_in = 4 * planes
            self.stages.append(stage)
        self.head = nn.Linear(planes_in, classes)

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        x, maps = self.stem(images), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps, self.head(x.mean((2, 3)))


class Trainer:
    """A training step with SGD, with any provider's regularizer or none."""

    def __init__(self, workload: Workload, device: str, pixels: int = 224) -> None:
        torch.manual_seed(0)
        self.workload = workload
        self.model = ResNet50(workload.classes).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.images = torch.randn(workload.batch, 3, pixels, pixels, device=device)
        targets = torch.randperm(workload.classes)[: workload.groups]
        self.targets = targets.repeat_interleave(workload.samples).to(device)

    def inputs(self, maps: list[Tensor], logits: Tensor) -> Inputs:
        features = tuple(x.mean((2, 3)) for x in maps)
        return Inputs(self.workload, features, logits.detach(), self.targets)

    def step(self, provider: Provider | None) -> None:
        maps, logits = self.model(self.images)
        total = cross_entropy(logits, self.targets)
        if provider is not None:
            reg = provider.call(self.inputs(maps, logits))
            total = cwbr_fused.scale_match(total, reg)
        self.optimizer.zero_grad()
        total.backward()
        self.optimizer.step()

    def leaves(self) -> Inputs:
        """The regularizer's inputs of one step, cut off from the network."""
        with torch.no_grad():
            maps, logits = self.model(self.images)
            inputs = self.inputs(maps, logits)
        for z in inputs.features:
            z.requires_grad_()
        return inputs


def measure_steps(session: Session, trainer: Trainer) -> list[Row]:
    """Step time without and with each provider, and each regularizer's own time as a share.

    On a CPU the difference of two steps drowns in their noise: the share is the time of the
    regularizer alone, forward and backward on the step's features, over a step without it.
    """
    workload = trainer.workload.name
    providers = session.providers(trainer.workload)
    providers = {name: providers[name] for name in TIMED if name in providers}
    steps: dict[str, Callable[[], object]] = {"none": partial(trainer.step, None)}
    steps |= {name: partial(trainer.step, provider) for name, provider in providers.items()}
    for call in steps.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, call in steps.items():
            taken[name].append(measure.seconds(call, session.device))
    inputs = trainer.leaves()
    alone = measure.interleave(
        {name: partial(step, provider, inputs) for name, provider in providers.items()},
        1.0,
        session.device,
    )
    rows = [
        session.row(workload, name, "training step", "time_ms", [s * 1e3 for s in samples])
        for name, samples in taken.items()
    ]
    without = measure.spread(taken["none"])[0]
    for name, samples in alone.items():
        shares = [100 * s / without for s in samples]
        rows.append(session.row(workload, name, "training step", "share_percent", shares))
    return rows
