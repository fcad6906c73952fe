"""One training run, and what is measured on the trained network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.ablation.methods import METHODS, Step
from benchmarks.ablation.settings import SETTINGS, Glyphs, Setting
from benchmarks.ablation.summary import Job
from cwbr_fused import FeatureCatcher, to_vec
from cwbr_fused.diagnostics import linear_probe, top_confusing_pairs

PAIRS = 20
EVALUATION_BATCH = 256

Result = dict[str, Any]


def run(setting_name: str, method_name: str, seed: int) -> Result:
    """Trains and measures; the same seed gives every method the same weights and batches."""
    torch.set_num_threads(1)
    setting, method = SETTINGS[setting_name], METHODS[method_name]
    data = Glyphs(setting, seed)
    torch.manual_seed(seed + method.init_offset)
    network = setting.network(setting.classes)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    catcher = FeatureCatcher(network, setting.layers)
    step = method.make(setting.classes)
    _train(setting, network, catcher, step, data, method.sampler)
    return _measure(network, catcher, data)


def execute(job: Job, folder: Path) -> Job:
    """Runs the job and keeps its result in a file, which appears when it is whole."""
    path = job.path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    result = run(*job)
    with partial.open("wb") as file:
        np.savez(file, **result)
    os.replace(partial, path)
    return job


def _train(
    setting: Setting,
    network: nn.Module,
    catcher: FeatureCatcher,
    step: Step,
    data: Glyphs,
    kind: str,
) -> None:
    optimizer = setting.optimizer(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.peak_lr, total_steps=setting.steps, pct_start=0.2
    )
    network.train()
    for images, targets in data.batches(kind):
        take_step(network, catcher, optimizer, step, images, targets)
        schedule.step()


def take_step(
    network: nn.Module,
    catcher: FeatureCatcher,
    optimizer: torch.optim.Optimizer,
    step: Step,
    images: Tensor,
    targets: Tensor,
) -> None:
    """One training step with a method."""
    logits = network(images)
    ce = cross_entropy(logits, targets)
    total = step(catcher.feats, logits, targets, ce)
    catcher.clear()
    optimizer.zero_grad(set_to_none=True)
    total.backward()
    optimizer.step()


@torch.no_grad()
def _outputs(
    network: nn.Module, catcher: FeatureCatcher, data: Glyphs, part: str
) -> tuple[Tensor, dict[str, Tensor]]:
    logits: list[Tensor] = []
    vectors: dict[str, list[Tensor]] = {name: [] for name in data.setting.layers}
    for images in data.images[part].split(EVALUATION_BATCH):
        logits.append(network(data.prepared(images)))
        for name, feature in catcher.feats.items():
            vectors[name].append(to_vec(feature))
        catcher.clear()
    return torch.cat(logits), {name: torch.cat(v) for name, v in vectors.items()}


def _measure(network: nn.Module, catcher: FeatureCatcher, data: Glyphs) -> Result:
    """Pairs are picked on the validation fonts; all else is of the test fonts, but val_accuracy."""
    network.eval()
    _, train = _outputs(network, catcher, data, "train")
    val_logits, _ = _outputs(network, catcher, data, "val")
    test_logits, test = _outputs(network, catcher, data, "test")
    targets = data.targets
    pairs, _ = top_confusing_pairs(val_logits, targets["val"], PAIRS)
    probes = [
        linear_probe(train[name], targets["train"], test[name], targets["test"])
        for name in data.setting.layers
    ]
    return {
        "val_accuracy": (val_logits.argmax(1) == targets["val"]).double().mean().item(),
        "predictions": test_logits.argmax(1).to(torch.int16).numpy(),
        "targets": targets["test"].to(torch.int16).numpy(),
        "pairs": pairs.to(torch.int16).numpy(),
        "probes": np.array(probes),
    }
