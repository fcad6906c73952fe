"""Starts the tests of compiled code in a process of its own, in which Triton does not interpret."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
ROOT = Path(__file__).parents[2]


def test_compiled_operations() -> None:
    """Those of `compiled_operations.py` that are not marked `whole`; `make ptx` runs them all."""
    paths = (ROOT, ROOT / "tests" / "ptx")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    options = ["-q", "-p", "plugin", "-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not whole"]
    command = [sys.executable, "-m", "pytest", *options, "tests/ptx/compiled_operations.py"]
    run = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stdout + run.stderr
