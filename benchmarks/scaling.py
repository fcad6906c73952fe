"""What a second thread brings: the same call with one and with two, in turn, in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch

from benchmarks import machine, measure
from benchmarks.providers import RUN
from benchmarks.results import Row
from benchmarks.session import BUDGET_SECONDS, OWN, Session
from benchmarks.workloads import BY_NAME, REALISTIC, Workload, make

METRIC = "two_threads_speedup"
WORKLOADS = (*REALISTIC, *(BY_NAME[f"pairs K={k} D=768"] for k in (64, 200, 500, 1000)))


def with_threads(count: int, call: Callable[[], object]) -> None:
    torch.set_num_threads(count)
    call()


def speedups(call: Callable[[], object]) -> list[float]:
    """Time with one thread over that with two, round by round."""
    calls = {str(count): partial(with_threads, count, call) for count in (1, 2)}
    for run in calls.values():
        run()
    one, two = measure.interleave(calls, 2 * BUDGET_SECONDS).values()
    return [a / b for a, b in zip(one, two, strict=False)]


def measure_speedups(session: Session, workloads: Iterable[Workload] = WORKLOADS) -> list[Row]:
    """Of this package's kernels, and of as many independent multiply-adds as the machine can do."""
    peaks = [machine.vector_fmas_per_second(2) / machine.vector_fmas_per_second(1)]
    rows = [session.row("machine", "measured", "machine", METRIC, peaks)]
    for workload in workloads:
        inputs, providers = make(workload, session.device), session.providers(workload)
        for name in set(OWN) & providers.keys():
            for mode, run in RUN.items():
                samples = speedups(partial(run, providers[name], inputs))
                rows.append(session.row(workload.name, name, mode, METRIC, samples))
    torch.set_num_threads(session.threads)
    return rows
