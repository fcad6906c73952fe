"""Measures one workload with every provider that may run it, and says why the others may not."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import measure
from benchmarks.providers import MEMORY_LIMIT, PLAIN, RUN, Checker, Provider, table
from benchmarks.results import Results, Row, device_name
from benchmarks.workloads import BY_NAME, Workload, make

# A provider predicted to need longer for one call is left out, and so is one that did need longer.
CALL_LIMIT_SECONDS = 20.0
# Spent on the repeated rounds, per provider, mode and workload.
BUDGET_SECONDS = 0.5
CHILD_LIMIT_SECONDS = 180.0


@dataclass
class Session:
    """One device, number of threads and file of results."""

    results: Results
    device: str
    threads: int

    def __post_init__(self) -> None:
        self.device_name = device_name(self.device)

    def row(
        self,
        workload: str,
        provider: str,
        mode: str,
        metric: str,
        samples: list[float],
        base: list[float] | None = None,
        note: str = "",
    ) -> Row:
        """The row of these samples; of none, with a note, where there is no number."""
        median, p20, p80 = measure.spread(samples) if samples else (None, None, None)
        return Row(
            workload,
            provider,
            mode,
            metric,
            median,
            p20,
            p80,
            measure.ratio(samples, base) if samples and base else None,
            len(samples),
            note,
            self.device_name,
            self.threads,
            torch.__version__,
            self.results.current,
        )

    def providers(self, workload: Workload) -> dict[str, Provider]:
        return {
            name: provider
            for name, provider in table(self.device).items()
            if provider.missing is None and provider.takes(workload)
        }

    def done(self, workload: Workload, metric: str) -> bool:
        return self.has(workload.name, self.providers(workload), metric)

    def has(self, workload: str, providers: Iterable[str], metric: str) -> bool:
        return self.results.has(workload, providers, metric, self.device_name, self.threads)

    def predicted_seconds(self, provider: Provider, workload: Workload, mode: str) -> float:
        """From the largest workload of the kind in the results: the time per element is alike."""
        elements, milliseconds = 0, 0.0
        for row in self.results.rows.values():
            same = (row.provider, row.mode, row.metric, row.device, row.threads) == (
                provider.name,
                mode,
                "time_ms",
                self.device_name,
                self.threads,
            )
            other = BY_NAME.get(row.workload)
            if not same or other is None or other.kind != workload.kind or row.median is None:
                continue
            if provider.elements(other) > elements:
                elements, milliseconds = provider.elements(other), row.median
        return milliseconds / 1e3 * provider.elements(workload) / elements if elements else 0.0

    def objection(self, provider: Provider, workload: Workload, mode: str) -> str | None:
        """Why this run is not even tried."""
        predicted = provider.predicted_bytes(workload, mode)
        if predicted > MEMORY_LIMIT:
            return f"out of memory by prediction: {predicted / 1e9:.1f} GB"
        slow = self.predicted_seconds(provider, workload, mode)
        return f"too slow by prediction: {slow:.0f} s" if slow > CALL_LIMIT_SECONDS else None

    def time(self, workload: Workload, providers: Mapping[str, Provider]) -> list[Row]:
        """Interleaved times, per mode, of those of `providers` that may run and are right."""
        torch._dynamo.reset()
        inputs = make(workload, self.device)
        checker = Checker(inputs)
        rows = []
        for mode, run in RUN.items():
            calls: dict[str, Callable[[], object]] = {}
            for name, provider in providers.items():
                note = self.objection(provider, workload, mode) or self.trial(
                    checker, provider, mode
                )
                if note is None:
                    calls[name] = partial(run, provider, inputs)
                else:
                    rows.append(self.row(workload.name, name, mode, "time_ms", [], note=note))
            samples = measure.interleave(calls, BUDGET_SECONDS, self.device)
            milliseconds = {name: [s * 1e3 for s in taken] for name, taken in samples.items()}
            base = milliseconds.get(PLAIN)
            rows += [
                self.row(workload.name, name, mode, "time_ms", taken, base)
                for name, taken in milliseconds.items()
            ]
        return rows

    def trial(self, checker: Checker, provider: Provider, mode: str) -> str | None:
        """Run once, as warm-up and check: the reason not to time it, or None."""
        notes: list[str | None] = []
        taken = measure.seconds(lambda: notes.append(checker.complaint(provider, mode)))
        if notes[0] is None and taken > CALL_LIMIT_SECONDS and not provider.compiled:
            return f"too slow: {taken:.0f} s"
        return notes[0]

    def memory(self, workload: Workload, providers: Mapping[str, Provider]) -> list[Row]:
        """Peak extra memory of forward+backward, each provider in a process of its own."""
        rows, base = [], None
        for name, provider in providers.items():
            note = self.objection(provider, workload, "step") or ""
            samples: list[float] = []
            if not note:
                arguments = (workload.name, name, self.device, str(self.threads))
                try:
                    peak = measure.in_fresh_process(
                        "benchmarks.memory", *arguments, timeout=CHILD_LIMIT_SECONDS
                    )
                    samples = [peak / 1e6]
                except (RuntimeError, subprocess.TimeoutExpired) as failure:
                    note = f"failed: {failure}".replace("\n", " ")[-200:]
            if name == PLAIN:
                base = samples
            rows.append(self.row(workload.name, name, "step", "peak_extra_mb", samples, base, note))
        return rows

    def calls(self, workload: Workload, providers: Mapping[str, Provider]) -> list[Row]:
        """Dispatcher calls (CPU) or kernel launches (GPU) of forward+backward.

        Their number does not depend on the sizes, except for peers that loop over chunks.
        """
        inputs = make(workload, self.device)
        count = measure.count_calls if self.device == "cpu" else measure.count_launches
        rows, base = [], None
        for name, provider in providers.items():
            note = self.objection(provider, workload, "step") or ""
            if provider.compiled and self.device == "cpu":
                note = "not counted: compiled CPU kernels bypass the dispatcher"
            samples: list[float] = []
            if not note:
                RUN["step"](provider, inputs)
                samples = [count(partial(RUN["step"], provider, inputs))]
            if name == PLAIN:
                base = samples
            rows.append(self.row(workload.name, name, "step", "calls", samples, base, note))
        return rows


MEASUREMENTS = {
    "time_ms": Session.time,
    "peak_extra_mb": Session.memory,
    "calls": Session.calls,
}
