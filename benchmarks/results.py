"""The rows that benchmarks produce, in a small CSV that a later run resumes from."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from benchmarks.measure import ROOT
from cwbr_fused.operations import extension

FOLDER = ROOT / "benchmarks" / "results"
# What the numbers depend on: committing results or documents makes none of them stale.
MEASURED_PATHS = ("cwbr_fused", "csrc", "triton_kernels", "setup.py", "benchmarks/*.py")

# Workload, provider, mode, metric, device, threads.
Key = tuple[str, str, str, str, str, int]


@dataclass(frozen=True)
class Row:
    """One measured number, or the reason why there is none.

    Attributes:
        mode: "forward", "backward", "step" (forward+backward), or "machine".
        metric: with its unit: time_ms, peak_extra_mb (10^6 bytes), calls, ...
        median, p20, p80: over `rounds` samples; median is None where `note` says why.
        ratio_to_eager: median over rounds of the ratio to the eager provider, where that ran.
    """

    workload: str
    provider: str
    mode: str
    metric: str
    median: float | None
    p20: float | None
    p80: float | None
    ratio_to_eager: float | None
    rounds: int
    note: str
    device: str
    threads: int
    torch: str
    commit: str

    @property
    def key(self) -> Key:
        """What is unique in a file of results."""
        return (
            self.workload,
            self.provider,
            self.mode,
            self.metric,
            self.device,
            self.threads,
        )


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}"


def default_path(device: str) -> Path:
    """The CSV of a kind of machine: of CPUs, the instruction set that the kernels use there."""
    name = device
    if device == "cpu":
        built = extension.missing("cpu") is None
        name = f"cpu-{torch.ops.cwbr_fused_build.cpu_isa() if built else 'reference'}"
    return FOLDER / f"{name}.csv"


def commit() -> str:
    """The last commit that touched what is measured; "+" behind it for uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", *arguments, "--", *MEASURED_PATHS]
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return run.stdout.strip()

    head = git("log", "-1", "--format=%h") or "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _number(text: str) -> float | None:
    return float(text) if text else None


class Results:
    """The CSV at `path`; every `add` is on disk when it returns."""

    def __init__(self, path: Path, current: str) -> None:
        """Args: current: the commit whose rows count as done; others are replaced when measured."""
        self.path, self.current = path, current
        self.rows: dict[Key, Row] = {}
        if path.exists():
            with path.open(newline="") as file:
                self.rows = {row.key: row for row in map(self._parse, csv.DictReader(file))}

    @staticmethod
    def _parse(cells: dict[str, str]) -> Row:
        return Row(
            workload=cells["workload"],
            provider=cells["provider"],
            mode=cells["mode"],
            metric=cells["metric"],
            median=_number(cells["median"]),
            p20=_number(cells["p20"]),
            p80=_number(cells["p80"]),
            ratio_to_eager=_number(cells["ratio_to_eager"]),
            rounds=int(cells["rounds"]),
            note=cells["note"],
            device=cells["device"],
            threads=int(cells["threads"]),
            torch=cells["torch"],
            commit=cells["commit"],
        )

    def has(
        self, workload: str, providers: Iterable[str], metric: str, device: str, threads: int
    ) -> bool:
        """Whether this commit's rows hold `metric` of `workload` for every one of `providers`."""
        done = {
            row.provider
            for row in self.rows.values()
            if (row.workload, row.metric, row.device, row.threads, row.commit)
            == (workload, metric, device, threads, self.current)
        }
        return set(providers) <= done

    def drop_others(self) -> None:
        """Forget rows of other commits: after a whole run, of what is no longer measured."""
        self.rows = {key: row for key, row in self.rows.items() if row.commit == self.current}
        self._write()

    def add(self, rows: Iterable[Row]) -> None:
        self.rows |= {row.key: row for row in rows}
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".part")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            for row in self.rows.values():
                cells = asdict(row)
                for name in ("median", "p20", "p80", "ratio_to_eager"):
                    if cells[name] is not None:
                        cells[name] = f"{cells[name]:.4g}"
                writer.writerow(cells)
        unfinished.replace(self.path)
