"""`make ablation`: runs what is missing, in the order of its worth, and writes the summary.

Every run is one file in `runs/ablation`; stopping and starting again loses at most the runs under
way. `--only SETTING ...` runs these, `--summary` only summarises the runs, `--tables` only makes
table, picture and README from `results/ablation.csv`, `--cost` only times the steps, `--limit N`
starts N runs at most, `--seconds S` starts none after S seconds.
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
from benchmarks.ablation.bases import BASES
from benchmarks.ablation.methods import METHODS
from benchmarks.ablation.settings import SETTINGS
from benchmarks.ablation.summary import Job, load, publish, read, record, rows
from benchmarks.ablation.training import execute

RUNS = Path("runs/ablation")
MAIN = ("alone", "CWBR")
RIVALS = tuple(name for name, method in METHODS.items() if method.rival)
SECTIONS, TUNED = "package sections", "typefaces, fine-tuned"
# (settings, bases, methods, seeds) in the order in which they are started.
FIRST, ALL = ("characters, 5 images", "typefaces"), tuple(SETTINGS)
IMAGES = tuple(name for name in ALL if name != SECTIONS)
MOST = ("cross-entropy", "ArcFace")
OTHERS = tuple(base for base in BASES if base not in MOST)
PLAN: tuple[tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], range], ...] = (
    (FIRST, MOST, (*MAIN, "pull"), range(5)),
    ((SECTIONS, TUNED), MOST, (*MAIN, "pull"), range(3)),
    (FIRST, OTHERS, MAIN, range(3)),
    (ALL, MOST, (*MAIN, "pull"), range(5)),
    (FIRST, ("cross-entropy",), (*RIVALS, "published"), range(3)),
    ((SECTIONS, TUNED), ("label smoothing", "averaged"), MAIN, range(3)),
    (IMAGES, OTHERS, MAIN, range(3)),
)


def planned() -> Iterator[Job]:
    """Every job once."""
    yield from dict.fromkeys(
        Job(setting, base, method, seed)
        for settings, bases, methods, seeds in PLAN
        for seed in seeds
        for base in bases
        for setting in settings
        for method in methods
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--summary", action="store_true")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--base", nargs="+", choices=BASES, default=list(BASES))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.cost:
        cost.write()
        return
    wanted = [
        job
        for job in planned()
        if job.setting in options.only and job.base in options.base and not job.path(RUNS).exists()
    ]
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
    record(load(RUNS, planned()))
    publish(rows(read()))


if __name__ == "__main__":
    main()
