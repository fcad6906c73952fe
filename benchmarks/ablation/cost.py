"""What CWBR adds to a training step: both kinds of step in turn, in one process, one thread.

Thread time counts the processor's time, so another process beside this one disturbs it little. The
forward and backward pass of a CPU model run in the calling thread, tensor hooks included.
"""

from __future__ import annotations

import csv
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.ablation.methods import METHODS
from benchmarks.ablation.settings import SETTINGS, Glyphs
from benchmarks.ablation.training import take_step
from cwbr_fused import FeatureCatcher

COST = Path(__file__).parents[1] / "results" / "ablation_cost.csv"
WARM_UP, STEPS = 4, 30


def measure(setting_name: str) -> tuple[float, float]:
    """Median seconds of a step with cross-entropy alone, and median ratio of CWBR's to its."""
    torch.set_num_threads(1)
    setting = replace(SETTINGS[setting_name], steps=WARM_UP + STEPS)
    torch.manual_seed(0)
    network = setting.network(setting.classes)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    catcher = FeatureCatcher(network, setting.layers)
    optimizer = setting.optimizer(network.parameters())
    methods = {name: METHODS[name].make(setting.classes) for name in ("ce", "CWBR")}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for images, targets in Glyphs(setting, 0).batches("shuffle"):
        for name, step in methods.items():
            started = time.thread_time()
            take_step(network, catcher, optimizer, step, images, targets)
            seconds[name].append(time.thread_time() - started)
    plain, ours = (seconds[name][WARM_UP:] for name in methods)
    ratio = statistics.median(b / a for a, b in zip(plain, ours, strict=True))
    return statistics.median(plain), ratio


def write() -> None:
    """Measures every setting and keeps the result."""
    with COST.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["setting", "step of cross-entropy, s", "with CWBR, times"])
        for name in SETTINGS:
            plain, ratio = measure(name)
            writer.writerow([name, f"{plain:.4f}", f"{ratio:.4f}"])
            print(f"{name}: {plain:.3f} s, with CWBR {100 * (ratio - 1):+.1f} %", flush=True)
