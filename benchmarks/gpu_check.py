"""`make gpu-check`: everything that only a GPU can show, by one command in ten minutes.

    python benchmarks/gpu_check.py --out FOLDER

The driver needs Python alone; torch, Triton, pytest and nvcc are used where they are installed, and
nothing is downloaded. Every step is a process of its own with a time limit and a log, so that an
illegal memory access or a hang ends one step and not the check. Each result is one line of
`FOLDER/results.jsonl`, written when it is known. The most telling steps come first.

    python benchmarks/gpu_check.py --out FOLDER --rehearse

goes through the same steps on a machine without a GPU, on Triton's interpreter. Its times say
nothing, and it takes longer.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = [sys.executable, str(ROOT / "benchmarks" / "gpu_steps.py")]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
# A step ends with this status where an error of the device has spoilt its process.
POISONED = 75
BUDGET_SECONDS = 580.0
# The interpreter is slow, and so may be the machine.
REHEARSAL_PATIENCE = 10.0


@dataclass(frozen=True)
class Step:
    """A command, the seconds it may take, and what of it a rehearsal changes.

    Attributes:
        restarts: the command is started again, with how many results there are, while it ends
            with POISONED.
        needs: a program without which the step is skipped.
    """

    name: str
    command: tuple[str, ...]
    seconds: float
    restarts: bool = False
    needs: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


def tests(*patterns: str) -> tuple[str, ...]:
    """The files of tests/operations with these names."""
    folder = ROOT / "tests" / "operations"
    return tuple(str(path) for pattern in patterns for path in sorted(folder.glob(pattern)))


def steps(out: Path) -> list[Step]:
    """In order of what a first run on a GPU must show."""
    hardware = {"CWBR_HARDWARE": "1"}
    cuda = tests("test_cuda_kernels.py", "test_cuda_batch.py", "test_cuda_pairs.py")
    # A few tests under each tool; those that plant a failure stay out.
    reduced = (*PYTEST, *tests("test_cuda_batch.py"), "-k", "not defect", "--maxfail=1")
    sanitize = [
        Step(
            f"sanitizer {tool}",
            ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", *reduced),
            45,
            needs="compute-sanitizer",
            environment=hardware,
        )
        for tool in ("memcheck", "racecheck", "synccheck")
    ]
    junit = f"--junit-xml={out / 'triton.xml'}"
    return [
        Step("machine", (*STEPS, "machine"), 40),
        Step("operations", (*STEPS, "operations"), 120, restarts=True),
        Step("training steps", (*STEPS, "training"), 60, restarts=True),
        Step("times", (*STEPS, "times"), 60),
        Step("cuda on hardware", (*PYTEST, *cuda), 120, needs="nvcc", environment=hardware),
        *sanitize,
        Step("triton tests", (*PYTEST, junit, *tests("test_triton_*.py", "test_bank_*.py")), 150),
        Step("peers", (*STEPS, "peers"), 60),
    ]


def run(step: Step, out: Path, seconds: float, environment: Mapping[str, str]) -> tuple[str, float]:
    """How a step ended, and after how many seconds; its output goes to a log of its own."""
    start = time.monotonic()
    status: int | None = POISONED
    log = out / f"{step.name.replace(' ', '_')}.log"
    with log.open("wb") as file:
        while status == POISONED and time.monotonic() - start < seconds:
            command = [*step.command, *([str(done(out, step.name))] if step.restarts else [])]
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            try:
                status = process.wait(max(1.0, seconds - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
            if not step.restarts:
                break
    took = time.monotonic() - start
    if status is None:
        return "ran out of time", took
    return ("passed" if status == 0 else f"failed, status {status}"), took


def done(out: Path, step: str) -> int:
    """How many results a step has written so far."""
    file = out / "results.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum(json.loads(line)["step"] == step for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="an empty or new folder")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU")
    parser.add_argument("--only", nargs="+", help="names of steps")
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if (out / "results.jsonl").exists():
        parser.error(f"--out: expected a folder without results, got {options.out}")
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    environment["GPU_CHECK_RESULTS"] = str(out / "results.jsonl")
    patience = REHEARSAL_PATIENCE if options.rehearse else 1.0
    if options.rehearse:
        environment |= {"GPU_CHECK_REHEARSAL": "1", "TRITON_INTERPRET": "1"}
    started, failed = time.monotonic(), False
    for step in steps(out):
        if options.only and step.name not in options.only:
            continue
        left = patience * BUDGET_SECONDS - (time.monotonic() - started)
        program = step.needs
        if program and shutil.which(program) is None:
            outcome, took = f"skipped: no {program} on PATH", 0.0
        elif options.rehearse and step.environment:
            outcome, took = "skipped: needs a GPU", 0.0
        elif left < 5:
            outcome, took = "skipped: no time left", 0.0
        else:
            own = environment | dict(step.environment) | {"GPU_CHECK_STEP": step.name}
            outcome, took = run(step, out, min(patience * step.seconds, left), own)
        failed |= outcome.startswith(("failed", "ran out"))
        line = {"step": step.name, "outcome": outcome, "seconds": round(took, 1)}
        with (out / "results.jsonl").open("a") as file:
            print(json.dumps({"step": "driver", "of": line}), file=file)
        print(f"{step.name:20} {outcome} ({took:.0f} s)", flush=True)
    bad = [row for row in results(out) if row.get("ok") is False]
    for row in bad:
        print("WRONG:", json.dumps(row))
    return int(failed or bool(bad))


def results(out: Path) -> list[dict[str, object]]:
    """Every line written so far."""
    file = out / "results.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


if __name__ == "__main__":
    sys.exit(main())
