"""`make ablation`: runs what is missing, in the order of its worth, and writes the summary.

Every run is one file in `runs/ablation`; stopping and starting again loses at most the runs under
way. `--only METHOD ...` runs these, `--summary` only summarises, `--cost` only times the steps,
`--limit N` starts N runs at most, `--seconds S` starts none after S seconds.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from benchmarks.ablation import cost
from benchmarks.ablation.methods import METHODS
from benchmarks.ablation.settings import SETTINGS
from benchmarks.ablation.summary import Job, load, summarise
from benchmarks.ablation.training import execute

RUNS = Path("runs/ablation")
MAIN = ("ce", "CWBR", "pull")
# (setting, methods, seeds) in the order in which they are started.
PLAN: tuple[tuple[str, tuple[str, ...], range], ...] = (
    ("resnet, 5 images", (*MAIN, "ce again"), range(5)),
    ("resnet, 50 images", MAIN, range(5)),
    ("resnet, 15 images", MAIN, range(5)),
    ("resnet, 5 images", ("random push", "ce pk", "published"), range(3)),
    ("fine-tuning, 5 images", MAIN, range(3)),
    ("resnet, 15 images", ("ce pk",), range(3)),
    ("vit, 50 images", MAIN, range(3)),
    ("resnet, 50 images", ("ce pk", "ce again"), range(3)),
    (
        "resnet, 5 images",
        ("random push", "ce pk", "repaired", "pair bank", "fixed ratio"),
        range(5),
    ),
    ("resnet, 15 images", ("random push", "ce again", "ce pk", "published"), range(5)),
    ("resnet, 1000 classes", (*MAIN, "random push"), range(3)),
    ("fine-tuning, 5 images", (*MAIN, "random push"), range(5)),
    ("vit, 50 images", MAIN, range(5)),
    ("resnet, 15 images", ("log overlap", "repaired"), range(2)),
)


def missing() -> Iterator[Job]:
    planned = {
        Job(setting, method, seed): None
        for setting, methods, seeds in PLAN
        for seed in seeds
        for method in methods
    }
    yield from (job for job in planned if not job.path(RUNS).exists())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--only", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.cost:
        cost.write()
        return
    wanted = [job for job in missing() if job.method in options.only]
    jobs = [] if options.summary else wanted[: options.limit]
    started, under_way = time.monotonic(), set[Future[Job]]()
    with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
        for number, job in enumerate(jobs, 1):
            if len(under_way) >= options.workers:
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    print(f"{time.monotonic() - started:6.0f} s", *future.result(), flush=True)
            if time.monotonic() - started > options.seconds:
                print(f"{len(jobs) - number + 1} runs are left for another time")
                break
            under_way.add(pool.submit(execute, job, RUNS))
        for future in under_way:
            print(f"{time.monotonic() - started:6.0f} s", *future.result(), flush=True)
    summarise(load(RUNS, SETTINGS, range(9)))


if __name__ == "__main__":
    main()
