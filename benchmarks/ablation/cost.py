"""What CWBR adds to a training step: both kinds of step in turn, in one process, one thread.

Thread time counts the processor's time, so another process beside this one disturbs it little. The
forward and backward pass of a CPU model run in the calling thread, tensor hooks included.
"""

from __future__ import annotations

import csv
import statistics
import time
from pathlib import Path

import torch

from benchmarks.ablation.settings import SETTINGS
from benchmarks.ablation.summary import Job
from benchmarks.ablation.training import Run

COST = Path(__file__).parents[1] / "results" / "ablation_cost.csv"
WARM_UP, STEPS = 4, 30


def measure(setting: str) -> tuple[float, float]:
    """Median seconds of a step with cross-entropy alone, and median ratio of CWBR's to its."""
    torch.set_num_threads(1)
    runs = [Run(Job(setting, "cross-entropy", method, 0)) for method in ("alone", "CWBR")]
    seconds: list[list[float]] = [[], []]
    for inputs, targets in runs[0].data.batches(WARM_UP + STEPS, runs[0].setting.batch_size):
        for run, spent in zip(runs, seconds, strict=True):
            started = time.thread_time()
            run.step(inputs, targets)
            spent.append(time.thread_time() - started)
    plain, ours = (spent[WARM_UP:] for spent in seconds)
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
