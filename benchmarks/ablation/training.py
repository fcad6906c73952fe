"""One training run, and what is measured on the trained network."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.ablation import bases
from benchmarks.ablation.bases import BASES
from benchmarks.ablation.methods import METHODS, Method
from benchmarks.ablation.settings import SETTINGS
from benchmarks.ablation.summary import Job
from cwbr_fused import FeatureCatcher, to_vec

EVALUATION_BATCH = 256

Result = dict[str, Any]


class Run:
    """A network in training; the same seed gives every method the same weights and batches."""

    def __init__(self, job: Job) -> None:
        self.base = BASES[job.base]
        setting = SETTINGS[job.setting]
        self.setting = replace(setting, steps=setting.steps * self.base.times)
        self.data = setting.data(setting.classes, job.seed)
        if self.base.mixup and not self.data.inputs["train"].is_floating_point():
            raise ValueError(
                f"{job.base}: the inputs of {job.setting} are indices, not to be mixed"
            )
        torch.manual_seed(job.seed)
        network = bases.with_head(self.setting.network(self.setting.classes), self.base)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.catcher = FeatureCatcher(self.network, self.setting.layers)
        widths = self._widths()
        self.method: Method = METHODS[job.method].make(self.setting.classes, widths)
        self.optimizer = self.setting.optimizer(nn.ModuleList([self.network, self.method]))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer,
            [group["lr"] for group in self.optimizer.param_groups],
            total_steps=self.setting.steps,
            pct_start=0.2,
            cycle_momentum="momentum" in self.optimizer.defaults,  # not that of Adam
        )
        self.mixing = torch.Generator().manual_seed(job.seed + 1)

    @torch.no_grad()
    def _widths(self) -> dict[str, int]:
        """How long the pooled vector of each layer is."""
        self.network.eval()
        self.network(self.data.prepared(self.data.inputs["val"][:1]))
        widths = {name: to_vec(layer).shape[1] for name, layer in self.catcher.feats.items()}
        self.catcher.clear()
        return widths

    def train(self) -> None:
        average = (
            bases.MovingAverage(self.network, self.base.average) if self.base.average else None
        )
        self.network.train()
        for inputs, targets in self.data.batches(self.setting.steps, self.setting.batch_size):
            self.step(inputs, targets)
            self.schedule.step()
            if average is not None:
                average.follow()
        if average is not None:
            average.take_over()

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        inputs, targets = bases.mixed(self.base, inputs, targets, self.setting.classes, self.mixing)
        logits = self.network(inputs)
        loss = bases.loss(self.base, logits, targets)
        total = self.method(self.catcher.feats, logits, targets, loss)
        self.catcher.clear()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        self.optimizer.step()

    @torch.no_grad()
    def predictions(self, part: str) -> Tensor:
        self.network.eval()
        logits = []
        for inputs in self.data.inputs[part].split(EVALUATION_BATCH):
            logits.append(self.network(self.data.prepared(inputs)))
            self.catcher.clear()
        return torch.cat(logits).argmax(1)


def run(job: Job) -> Result:
    torch.set_num_threads(1)
    started = time.process_time()
    training = Run(job)
    training.train()
    correct = {
        part: training.predictions(part) == training.data.targets[part]
        for part in ("train", "val", "test")
    }
    accuracy = {part: 100 * float(right.double().mean()) for part, right in correct.items()}
    return {**accuracy, "seconds": time.process_time() - started}


def execute(job: Job, folder: Path) -> Job:
    """Runs the job and keeps its result in a file, which appears when it is whole."""
    path = job.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    result = run(job)
    with partial.open("wb") as file:
        np.savez(file, **result)
    os.replace(partial, path)
    return job
