"""Rows of benchmark results, made up."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.providers import EAGER
from benchmarks.results import Row


def row(workload: str = "w", provider: str = EAGER, **changed: object) -> Row:
    whole = Row(
        workload, provider, "step", "time_ms", 1.0, 0.9, 1.2, 1.0, 5, "", "cpu", 1, "2", "abc"
    )
    return replace(whole, **changed)  # type: ignore[arg-type]
