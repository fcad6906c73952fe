"""`make gpu-check`: everything that only a GPU can show, by one command.

Runs the tests of the GPU backends, checks every provider against float64 truth, times it, counts
its launches, measures its peak memory, and captures a step in a CUDA graph. Writes
benchmarks/results/gpu_check.json and .md.

    python -m benchmarks.gpu_check --dry-run --out FOLDER

does the same as far as it goes without a GPU: tiny problems under Triton's interpreter. Its times
say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.providers import PLAIN, RUN, TOLERANCE, Checker, Provider, step, table
from benchmarks.results import FOLDER, commit, device_name
from benchmarks.workloads import REALISTIC, SWEEP, Inputs, Workload, make

TESTS = ("test_triton_*.py", "test_cuda_*.py", "test_loss.py", "test_ops.py")
FUSED = ("cwbr triton", "cwbr cuda")
PROVIDERS = (PLAIN, "plain compiled", "gathered", "gathered compiled", *FUSED)
# Of the device's memory; a provider predicted to need more is left out.
MEMORY_SHARE = 0.8
# How far a replayed graph may be from the step it captured, relative to the largest entry.
GRAPH_TOLERANCE = 1e-6
FAILED = "failed: "


@dataclass
class Measured:
    """One provider on one workload; times in ms as (median, 20th, 80th percentile).

    Attributes:
        note: why there are no numbers, or why some are missing.
        error: of value and gradients against float64, relative to their largest entries.
        launches: GPU kernels of one step.
        graph: time of the step replayed from a CUDA graph.
    """

    workload: str
    provider: str
    note: str = ""
    error: float | None = None
    forward: tuple[float, ...] | None = None
    step: tuple[float, ...] | None = None
    graph: tuple[float, ...] | None = None
    launches: int | None = None
    peak_extra_bytes: int | None = None

    @property
    def failed(self) -> bool:
        """Whether kernels of ours were started and were wrong, or did not do all they should."""
        wrong = self.error is not None and not self.error <= TOLERANCE
        return self.provider in FUSED and (wrong or self.note.startswith(FAILED))


@dataclass
class Report:
    """What one run found."""

    device: str
    torch: str
    commit: str
    dry_run: bool
    tests: str = "not run"
    tests_passed: bool = False
    measured: list[Measured] = field(default_factory=list)


def run_tests(select: list[str]) -> tuple[str, bool]:
    """The last line of pytest's output, and whether all passed."""
    folder = measure.ROOT / "tests"
    files = [str(f) for pattern in TESTS for f in sorted(folder.glob(pattern))]
    command = [sys.executable, "-m", "pytest", "-q", *files, *select]
    done = subprocess.run(command, cwd=measure.ROOT, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return lines[-1] if lines else done.stderr[-200:], done.returncode == 0


def quantiles(call: Any, device: str) -> tuple[float, ...]:
    """Milliseconds of one call: median, 20th and 80th percentile."""
    if device == "cpu":
        return measure.spread([1e3 * measure.seconds(call) for _ in range(3)])
    from triton.testing import do_bench

    return tuple(do_bench(call, quantiles=[0.5, 0.2, 0.8]))


def capture(provider: Provider, inputs: Inputs) -> torch.cuda.CUDAGraph:
    """A step as a CUDA graph, shown to compute what the step computes.

    Raises:
        RuntimeError: the step waits for the device, or the replay gives something else.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step(provider, inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(provider, inputs)
    for tensor in results:
        tensor.fill_(float("nan"))
    graph.replay()
    for got, wanted in zip(results, expected, strict=True):
        error = float((got - wanted).abs().max() / wanted.abs().max())
        if not error <= GRAPH_TOLERANCE:
            raise RuntimeError(f"the replayed graph is off by {error:.1e}")
    return graph


def measure_one(provider: Provider, inputs: Inputs, checker: Checker, device: str) -> Measured:
    """All numbers of one provider; a failure becomes the note."""
    row = Measured(inputs.workload.name, provider.name)
    try:
        row.error = checker.error(provider)
        row.forward = quantiles(partial(RUN["forward"], provider, inputs), device)
        row.step = quantiles(partial(step, provider, inputs), device)
        if device == "cpu":
            row.note = "no GPU: no graph, launches or memory"
            return row
        row.launches = measure.count_launches(partial(step, provider, inputs))
        row.peak_extra_bytes = measure.peak_extra_bytes(partial(step, provider, inputs), device)
        if provider.name in FUSED:
            row.graph = quantiles(capture(provider, inputs).replay, device)
    except Exception as failure:
        row.note = f"{FAILED}{type(failure).__name__}: {str(failure).splitlines()[:1]}"
    return row


def measure_workload(workload: Workload, device: str, dry_run: bool) -> Iterator[Measured]:
    """Every provider that can do `workload` here, and why the others can not."""
    inputs = make(workload, device)
    checker = Checker(inputs)
    memory = 0 if dry_run else torch.cuda.get_device_properties(0).total_memory
    for name in PROVIDERS:
        provider = table(device)[name]
        if dry_run and name == "cwbr triton":
            provider = replace(provider, missing=None)
        predicted = provider.predicted_bytes(workload, "step")
        if not provider.takes(workload):
            continue
        if provider.missing is not None:
            yield Measured(workload.name, name, note=provider.missing)
        elif not dry_run and predicted > MEMORY_SHARE * memory:
            yield Measured(workload.name, name, note=f"would need {predicted / 1e9:.0f} GB")
        else:
            yield measure_one(provider, inputs, checker, device)


def _cell(value: Any, factor: float = 1) -> str:
    if value is None:
        return ""
    return f"{factor * (value[0] if isinstance(value, tuple) else value):.3g}"


def markdown(report: Report) -> str:
    """The report as a table."""
    kind = "**Dry run without a GPU: the times say nothing.** " if report.dry_run else ""
    lines = [
        "# GPU check",
        "",
        f"{kind}{report.device}, torch {report.torch}, commit {report.commit}. Median times in ms,",
        "peak extra memory in MB. Made by `make gpu-check`.",
        "",
        f"Tests: {report.tests}",
        "",
        "| workload | provider | error | forward | step | graph | launches | memory | note |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for m in report.measured:
        numbers = (m.error, m.forward, m.step, m.graph, m.launches)
        cells = [*map(_cell, numbers), _cell(m.peak_extra_bytes, 1e-6)]
        lines.append("| " + " | ".join([m.workload, m.provider, *cells, m.note]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny, on the CPU; needs --out")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results")
    parser.add_argument("--only", nargs="+", default=[], help="workloads whose name contains one")
    parser.add_argument("--pytest", nargs=argparse.REMAINDER, default=[], help="more options")
    options = parser.parse_args()
    if options.dry_run:
        if options.out is None:
            parser.error("--dry-run needs --out: its numbers are no results")
        if os.environ.get("TRITON_INTERPRET") != "1":
            # It has to be set before Triton is imported, which torch has done by now.
            command = [sys.executable, "-m", "benchmarks.gpu_check", *sys.argv[1:]]
            os.execve(sys.executable, command, os.environ | {"TRITON_INTERPRET": "1"})
    elif not torch.cuda.is_available():
        sys.exit("gpu_check: torch sees no GPU; --dry-run shows what would be done")
    device = "cpu" if options.dry_run else "cuda"
    folder = options.out or FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    report = Report(device_name(device), torch.__version__, commit(), options.dry_run)
    report.tests, report.tests_passed = run_tests(options.pytest)
    for workload in (*REALISTIC, *SWEEP):
        if options.only and not any(part in workload.name for part in options.only):
            continue
        chosen = workload.shrunk() if options.dry_run else workload
        report.measured += measure_workload(chosen, device, options.dry_run)
        # After each, so that an interrupted run has its results.
        (folder / "gpu_check.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
        (folder / "gpu_check.md").write_text(markdown(report))
    print(markdown(report))
    sys.exit(0 if report.tests_passed and not any(m.failed for m in report.measured) else 1)


if __name__ == "__main__":
    main()
