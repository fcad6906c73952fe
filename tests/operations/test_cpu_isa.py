"""The C++ kernels on every other instruction set that this processor has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_inputs import CPU_KERNELS

HERE = Path(__file__).parent

pytestmark = CPU_KERNELS


def run_with(isa: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CWBR_CPU_ISA": isa, "OMP_NUM_THREADS": "2"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


ONE_DISTANCE = (
    "import torch, cwbr_fused.operations.schema; one = torch.ones(2, 2);"
    "print(torch.ops.cwbr_fused.all_pair_distance(one, one, 1e-6))"
)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
@pytest.mark.skipif("CWBR_CPU_ISA" in os.environ, reason="runs in the process that forces none")
def test_every_test_of_the_kernels_holds_on_instruction_set(isa: str) -> None:
    if isa == torch.ops.cwbr_fused_build.cpu_isa():
        pytest.skip(f"all other tests run on {isa}")
    trial = run_with(isa, "-c", ONE_DISTANCE)
    if f"this processor has no {isa}" in trial.stderr:
        pytest.skip(trial.stderr.splitlines()[-1])
    assert trial.returncode == 0, trial.stderr
    names = ("test_cpu_*.py", "test_batch_kernels.py", "test_bank_*.py")
    files = [str(file) for name in names for file in HERE.glob(name)]
    options = ("-q", "-x", "-p", "no:cacheprovider", "-k", "not triton and not cuda")
    result = run_with(isa, "-m", "pytest", *options, *files)
    assert result.returncode == 0, result.stdout[-3000:]


def test_an_unknown_instruction_set_is_an_error_that_names_the_choices() -> None:
    result = run_with("sse9", "-c", ONE_DISTANCE)
    assert result.returncode != 0
    assert "CWBR_CPU_ISA: expected avx512, avx2 or portable, got sse9" in result.stderr
