"""Measures one workload with every provider that may run it, and says why the others may not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks import measure, memory
from benchmarks.providers import EAGER, RUN, Checker, Provider, table
from benchmarks.results import Key, Results, Row, device_name
from benchmarks.workloads import BY_NAME, Workload, make

# A provider predicted to need longer for one call is left out; the strongest peers of a workload
# that is `patient` may take more.
CALL_LIMIT_SECONDS, PATIENT_SECONDS = 8.0, 45.0
# So is one predicted to need more than this share of the memory available at the start, or more
# bytes than any machine is asked for.
MEMORY_SHARE, MEMORY_MOST = 0.75, 18e9
# Spent on the repeated rounds, per provider, mode and workload.
BUDGET_SECONDS = 0.6
CHILD_LIMIT_SECONDS = 180.0
# This package's kernels, by provider.
OWN = ("cwbr cuda", "cwbr cpu", "cwbr triton")


@dataclass
class Session:
    """One device, number of threads and file of results.

    `few` leaves out all but the eager formulas, their fastest form and this package's kernels.
    """

    results: Results
    device: str
    threads: int
    few: bool = False

    def __post_init__(self) -> None:
        self.device_name = device_name(self.device)
        self.memory_limit = min(MEMORY_SHARE * measure.available_bytes(self.device), MEMORY_MOST)

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
            if not self.few or name in self._few(workload)
        }

    @staticmethod
    def _few(workload: Workload) -> tuple[str, ...]:
        fastest = "gathered compiled" if workload.kind == "loss" else "eager compiled"
        return (EAGER, fastest, *OWN)

    def done(self, workload: Workload, metric: str) -> bool:
        return self.has(workload.name, self.providers(workload), metric)

    def has(self, workload: str, providers: Iterable[str], metric: str) -> bool:
        return self.results.has(workload, providers, metric, self.device_name, self.threads)

    def predicted_seconds(self, provider: Provider, workload: Workload, mode: str) -> float:
        """From the next smaller workload alike in the results: as long per element.

        0 where there is none.
        """
        known = []
        for row in self.results.rows.values():
            mine = self.key(row.workload, provider.name, mode, "time_ms") == row.key
            other = BY_NAME.get(row.workload)
            if mine and other is not None and other.kind == workload.kind and row.median:
                elements = provider.elements(other)
                if elements < provider.elements(workload):
                    known.append((elements, row.median / 1e3))
        if not known:
            return 0.0
        elements, taken = max(known)
        return taken * provider.elements(workload) / elements

    def key(self, workload: str, provider: str, mode: str, metric: str) -> Key:
        return workload, provider, mode, metric, self.device_name, self.threads

    def objection(
        self, provider: Provider, workload: Workload, mode: str, limit: float = CALL_LIMIT_SECONDS
    ) -> str | None:
        """Why this run, which may take `limit` seconds, is not even tried."""
        predicted = provider.predicted_bytes(workload, mode)
        if predicted > self.memory_limit:
            return f"out of memory by prediction: {predicted / 1e9:.1f} GB"
        slow = self.predicted_seconds(provider, workload, mode)
        return f"too slow by prediction: {slow:.0f} s" if slow > limit else None

    def may_take(self, provider: Provider, workload: Workload) -> float:
        """Seconds of a call: more for the strongest peers where they are needed."""
        patient = workload.patient and provider.name in self._few(workload)
        return PATIENT_SECONDS if patient else CALL_LIMIT_SECONDS

    def time(self, workload: Workload, providers: Mapping[str, Provider]) -> list[Row]:
        """Interleaved times, per mode, of those of `providers` that may run and are right."""
        torch._dynamo.reset()
        inputs = make(workload, self.device)
        checker = Checker(inputs)
        rows = []
        for mode, run in RUN.items():
            calls: dict[str, Callable[[], object]] = {}
            known: dict[str, float] = {}
            for name, provider in providers.items():
                limit = self.may_take(provider, workload)
                note = self.objection(provider, workload, mode, limit)
                if note is None:
                    note, taken = checker.judge(provider, mode)
                    if provider.steady:
                        known[name] = taken
                if note is None:
                    calls[name] = partial(run, provider, inputs)
                else:
                    rows.append(self.row(workload.name, name, mode, "time_ms", [], note=note))
            samples = measure.interleave(calls, BUDGET_SECONDS, self.device, known)
            milliseconds = {name: [s * 1e3 for s in taken] for name, taken in samples.items()}
            base = milliseconds.get(EAGER)
            rows += [
                self.row(workload.name, name, mode, "time_ms", taken, base)
                for name, taken in milliseconds.items()
            ]
        return rows

    def memory(self, workload: Workload, providers: Mapping[str, Provider]) -> list[Row]:
        """Peak extra memory of forward+backward, each provider in a process of its own."""
        rows, base = [], None
        for name, provider in providers.items():
            # What compiles does it twice.
            patience = self.may_take(provider, workload) / (1 + provider.compiled)
            limit = max(CALL_LIMIT_SECONDS, patience)
            note = self.objection(provider, workload, "step", limit) or ""
            samples: list[float] = []
            if not note:
                arguments = (workload.name, name, self.device, self.threads)
                try:
                    peak = measure.in_child(
                        memory.peak_extra_bytes, *arguments, timeout=CHILD_LIMIT_SECONDS
                    )
                    samples = [peak / 1e6]
                except RuntimeError as failure:
                    note = f"failed: {failure}".replace("\n", " ")[-200:]
            if name == EAGER:
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
            note = self.objection(provider, workload, "step") or self.too_slow(workload, name)
            if provider.compiled and self.device == "cpu":
                note = "not counted: compiled CPU kernels bypass the dispatcher"
            samples: list[float] = []
            if not note:
                if not provider.steady:
                    RUN["step"](provider, inputs)
                samples = [count(partial(RUN["step"], provider, inputs))]
            if name == EAGER:
                base = samples
            rows.append(self.row(workload.name, name, "step", "calls", samples, base, note))
        return rows

    def too_slow(self, workload: Workload, provider: str) -> str:
        """Why a step that was timed is not done again for a count; nothing where it may be."""
        row = self.results.rows.get(self.key(workload.name, provider, "step", "time_ms"))
        taken = row.median / 1e3 if row is not None and row.median is not None else 0.0
        return f"too slow: {taken:.0f} s" if taken > CALL_LIMIT_SECONDS else ""


MEASUREMENTS = {
    "time_ms": Session.time,
    "peak_extra_mb": Session.memory,
    "calls": Session.calls,
}
