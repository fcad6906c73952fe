"""A real training step to compare with: ResNet-50, 224 x 224 images, SGD, four layers regularized.

Its time per image, which does not depend on the batch, says what share of a step of any batch the
regularizer of that batch would be.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cwbr_fused
from benchmarks import measure
from benchmarks.providers import Provider
from benchmarks.results import Row
from benchmarks.session import OWN, Session
from benchmarks.workloads import RESNET50, Inputs, Workload

# A step takes seconds on a CPU.
ROUNDS = 3


def _training(batch: int) -> Workload:
    """CUB's classes, four samples each."""
    return Workload(f"ResNet-50 B={batch}", "loss", RESNET50, batch // 4, 200, batch, 4, 64)


# Batches that two CPU cores can afford. The time per image is taken from the larger one.
SMALLER, LARGER = _training(16), _training(32)


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


def measure_steps(session: Session) -> list[Row]:
    """Step times without a regularizer, at two batch sizes, and with this package's, interleaved.

    The difference of a step with and one without drowns in their noise. It is no measure of the
    regularizer, whose own time is that of its workload.
    """
    smaller, larger = (Trainer(workload, session.device) for workload in (SMALLER, LARGER))
    steps: dict[tuple[str, str], Callable[[], object]] = {
        (trainer.workload.name, "none"): partial(trainer.step, None)
        for trainer in (smaller, larger)
    }
    for name, provider in session.providers(SMALLER).items():
        if name in OWN:
            steps[SMALLER.name, name] = partial(smaller.step, provider)
    for call in steps.values():
        call()
    taken: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
    for _ in range(ROUNDS):
        for key, call in steps.items():
            taken[key].append(measure.seconds(call, session.device))
    return [
        session.row(workload, name, "training step", "time_ms", [s * 1e3 for s in samples])
        for (workload, name), samples in taken.items()
    ]
