"""`make bench`: every measurement of this machine into one CSV; run again to go on where it ended.

python -m benchmarks.run [--device cpu|cuda] [--out FILE] [--minutes N] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks import operations, resnet, scaling
from benchmarks.results import Results, Row, commit, default_path
from benchmarks.session import MEASUREMENTS, Session
from benchmarks.workloads import BY_NAME, REALISTIC, SWEEP, Workload


@dataclass(frozen=True)
class Unit:
    """A piece of work that is done whole or not at all."""

    name: str
    session: Session
    done: Callable[[], bool]
    measured: Callable[[], list[Row]]


def _workload_unit(session: Session, workload: Workload, metric: str) -> Unit:
    def measured() -> list[Row]:
        return MEASUREMENTS[metric](session, workload, session.providers(workload))

    done = partial(session.done, workload, metric)
    return Unit(f"{workload.name}, {metric}", session, done, measured)


def _operation_unit(session: Session, case: str, with_memory: bool) -> Unit:
    names = [f"cwbr {name}" for name in operations.usable_backends(session.device)]
    metrics = ("time_ms", "peak_extra_mb") if with_memory else ("time_ms",)

    def done() -> bool:
        return all(session.has(case, names, metric) for metric in metrics)

    measured = partial(operations.measure_case, session, case, with_memory)
    return Unit(case, session, done, measured)


def _machine_unit(session: Session) -> Unit:
    done = partial(session.has, "machine", ["measured"], "triad_gb_per_s")
    return Unit("machine", session, done, partial(operations.measure_machine, session))


def _threads_unit(session: Session) -> Unit:
    done = partial(session.has, "machine", ["measured"], scaling.METRIC)
    return Unit("two threads", session, done, partial(scaling.measure_speedups, session))


def _training_unit(session: Session) -> Unit:
    def done() -> bool:
        workloads = (resnet.SMALLER, resnet.LARGER)
        return all(session.has(workload.name, ["none"], "time_ms") for workload in workloads)

    return Unit("ResNet-50", session, done, partial(resnet.measure_steps, session))


def units(sessions: list[Session]) -> Iterator[Unit]:
    """All of them, the most wanted first. The first session, of one thread, does everything."""
    figure, wide, narrow = SWEEP[:6], SWEEP[6:12], SWEEP[12:]
    one = sessions[0]
    for workload in (*REALISTIC, *figure, *wide):
        yield _workload_unit(one, workload, "time_ms")
    for workload in (*REALISTIC, *figure, BY_NAME["pairs K=1000 D=2048"]):
        yield _workload_unit(one, workload, "peak_extra_mb")
    for session in sessions:
        yield _training_unit(session)
    for workload in REALISTIC:
        yield _workload_unit(one, workload, "calls")
    for session in sessions[1:]:
        for workload in (*REALISTIC, *figure[1:4]):
            yield _workload_unit(session, workload, "time_ms")
    for session in sessions:
        if session.device == "cpu":
            yield _machine_unit(session)
            if session is not one:
                yield _threads_unit(session)
        for case in operations.cases() if session is one else operations.base_cases():
            yield _operation_unit(session, case, session is one)
    for workload in narrow:
        yield _workload_unit(one, workload, "time_ms")


def run(todo: Iterable[Unit], results: Results, limit: float) -> bool:
    """Do what is not done, each on disk before the next; False if `limit` minutes ended first."""
    start = time.monotonic()
    for unit in todo:
        if unit.done():
            continue
        minutes = (time.monotonic() - start) / 60
        label = f"{unit.name}, threads={unit.session.threads}"
        if minutes > limit:
            print(f"{minutes:.0f} minutes are over; run again to go on with: {label}")
            return False
        print(f"{minutes:5.1f} min  {label}", flush=True)
        torch.set_num_threads(unit.session.threads)
        results.add(unit.measured())
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/cpu-<isa>.csv")
    parser.add_argument(
        "--minutes", type=float, default=float("inf"), help="start nothing new after this"
    )
    parser.add_argument("--only", nargs="+", default=[], help="units whose name contains one")
    arguments = parser.parse_args()

    results = Results(arguments.out or default_path(arguments.device), commit())
    counts = (1, 2) if arguments.device == "cpu" else (torch.get_num_threads(),)
    sessions = [Session(results, arguments.device, n, few=n != counts[0]) for n in counts]

    def wanted() -> Iterator[Unit]:
        for unit in units(sessions):
            if not arguments.only or any(part in unit.name for part in arguments.only):
                yield unit

    if run(wanted(), results, arguments.minutes) and not arguments.only:
        results.drop_others()
    print(f"{len(results.rows)} rows in {results.path}")


if __name__ == "__main__":
    main()
