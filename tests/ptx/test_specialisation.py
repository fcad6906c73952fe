"""Kernels are compiled for every size, also where Triton makes a constant of it, and no oftener."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "compile_operations.py"


def compile_operations(*options: str) -> list[dict[str, Any]]:
    """What the script prints, in a process in which Triton compiles instead of interpreting."""
    command = [sys.executable, str(SCRIPT), "--ptx", *options]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_operation_compiles_with_each_size_equal_to_1_in_turn() -> None:
    rows = compile_operations()
    assert {row["operation"] for row in rows}
    assert [row for row in rows if "error" in row] == []


def test_another_batch_size_compiles_nothing_again() -> None:
    """Nor another number of groups or pairs, whether odd, 1 or a multiple of 16."""
    rows = compile_operations("--batch", "23", "48", "7", "4", "3", "2", "1")
    binaries: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        binaries.setdefault((row["operation"], row["kernel"]), set()).add(row["hash"])
    assert binaries
    assert {kernel: len(found) for kernel, found in binaries.items() if len(found) > 1} == {}
