"""Kernels are compiled for every size, also where Triton makes a constant of it, and no oftener."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cwbr_fused.operations.schema import SCHEMAS

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "compile_operations.py"


WHOLE = os.environ.get("CWBR_COMPILE_WHOLE") == "1"
NVIDIA = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")
AMD = ("gfx90a", "gfx942", "gfx1100")
ARCHS = (*NVIDIA, *AMD) if WHOLE else ("sm_90",)
DTYPES = ("float32", "float64", "bfloat16", "float16") if WHOLE else ("float32",)


def compile_operations(*options: str) -> list[dict[str, Any]]:
    """What the script prints, in a process in which Triton compiles instead of interpreting."""
    command = [sys.executable, str(SCRIPT), *options]
    done = subprocess.run(command, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHS)
def test_every_operation_compiles_with_each_size_equal_to_1_in_turn(arch: str, dtype: str) -> None:
    rows = compile_operations(*("--ptx",) * (not WHOLE), "--arch", arch, "--dtype", dtype)
    assert {row["operation"] for row in rows} == set(SCHEMAS)
    assert [row for row in rows if "error" in row] == []
    assert {(row["kernel"], row["stack"]) for row in rows if row.get("stack")} == set()


def test_another_batch_size_compiles_nothing_again() -> None:
    """Nor another number of groups or pairs, whether odd, 1 or a multiple of 16."""
    rows = compile_operations("--ptx", "--batch", "23", "48", "7", "4", "3", "2", "1")
    binaries: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        binaries.setdefault((row["operation"], row["kernel"]), set()).add(row["hash"])
    assert binaries
    assert {kernel: len(found) for kernel, found in binaries.items() if len(found) > 1} == {}
