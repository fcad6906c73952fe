"""`make gpu-check` as far as it goes without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_check

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def check(out: Path, *options: str) -> tuple[int, list[dict[str, Any]]]:
    command = [sys.executable, "benchmarks/gpu_check.py", "--out", str(out), *options]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=os.environ)
    lines = (out / "results.jsonl").read_text().splitlines() if out.exists() else []
    return done.returncode, [json.loads(line) for line in lines]


def test_a_rehearsal_goes_through_the_steps_that_need_no_gpu(tmp_path: Path) -> None:
    names = ("machine", "operations", "training steps", "times")
    status, rows = check(tmp_path / "out", "--rehearse", "--only", *names)
    outcomes = {row["of"]["step"]: row["of"]["outcome"] for row in rows if row["step"] == "driver"}
    assert outcomes == dict.fromkeys(names, "passed")
    assert status == 0
    assert [row for row in rows if row.get("ok") is False] == []
    checked = [row for row in rows if row["step"] == "operations" and row["ok"]]
    assert len(checked) >= 19
    assert all((tmp_path / "out" / f"{name.replace(' ', '_')}.log").exists() for name in names)


def test_a_folder_with_results_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("")
    assert check(tmp_path, "--rehearse", "--only", "machine") == (2, [])


def step(*command: str, seconds: float = 30, restarts: bool = False) -> gpu_check.Step:
    return gpu_check.Step("a step", command, seconds, restarts)


def test_a_step_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    hang = step("sh", "-c", "sleep 60 & sleep 60")
    outcome, took = gpu_check.run(hang, tmp_path, 1, dict(os.environ))
    assert outcome == "ran out of time"
    assert took < 10


def test_a_step_that_an_error_of_the_device_ended_goes_on_after_it(tmp_path: Path) -> None:
    script = (
        "import json, sys\n"
        "number = int(sys.argv[1])\n"
        f"with open({str(tmp_path / 'results.jsonl')!r}, 'a') as file:\n"
        "    print(json.dumps({'step': 'a step', 'name': number}), file=file)\n"
        f"sys.exit({gpu_check.POISONED} if number < 3 else 0)\n"
    )
    poisoned = step(sys.executable, "-c", script, restarts=True)
    outcome, _ = gpu_check.run(poisoned, tmp_path, 30, dict(os.environ))
    assert outcome == "passed"
    assert [row["name"] for row in gpu_check.results(tmp_path)] == [0, 1, 2, 3]


def test_a_failed_step_is_told_with_its_status(tmp_path: Path) -> None:
    outcome, _ = gpu_check.run(step("sh", "-c", "exit 3"), tmp_path, 30, dict(os.environ))
    assert outcome == "failed, status 3"
