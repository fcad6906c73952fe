"""The CUDA kernels on real threads under ThreadSanitizer: no race, and a removed barrier shows.

Blocks run one after the other here; races between blocks are left to the emulation on fibers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from arguments import operation_arguments
from emulation.defects import Defect, find_defects, plant
from emulation.harness import HERE, compile_emulated, write_arguments

from cwbr_fused.operations.schema import SCHEMAS

DEFECTS = find_defects()
# A barrier of each file that has some, and an operation that passes it.
RACES = {
    "class_attraction.cuh": "class_attraction",
    "common.cuh": "plan",
    "confusion_weights.cuh": "confusion_weights",
    "follow_classes.cuh": "follow_classes",
    "observe_classes.cuh": "observe_classes",
    "top_confusions.cuh": "top_confusions",
    "top_pairs.cuh": "top_pairs",
    "pack_rows.cuh": "all_pair_distance",
    "pair_tiles.cuh": "all_pair_distance",
    "pair_tiles_backward.cuh": "all_pair_distance_backward",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operations on threads, with the switchable defects planted."""
    folder = tmp_path_factory.mktemp("races")
    flags = ("-DEMULATE_THREADS", "-fsanitize=thread", "-g1")
    probe = folder / "probe.cpp"
    probe.write_text("int main() {}")
    if (
        shutil.which("g++")
        and subprocess.run(["g++", *flags, probe, "-o", folder / "p"]).returncode
    ):
        pytest.skip("g++ has no ThreadSanitizer here")
    kernels = plant(DEFECTS, folder)
    return compile_emulated(folder / "races", *flags, kernels=kernels, source=HERE / "races.cpp")


def run(program: Path, operation: str, defect: int) -> str:
    """What the program and ThreadSanitizer say; the latter needs addresses that are not random."""
    fixed = ["setarch", "-R"] if shutil.which("setarch") else []
    arguments = program.parent / f"{operation}.arguments"
    write_arguments(arguments, operation_arguments(torch.float32, "cuda")[operation])
    command = [*fixed, str(program), operation, str(arguments), str(defect)]
    # A defect may also make the program run for ever: stop at the first report.
    environment = {**os.environ, "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    return done.stdout + done.stderr


@pytest.mark.parametrize("operation", SCHEMAS)
def test_threads_of_a_block_do_not_race(program: Path, operation: str) -> None:
    assert run(program, operation, -1) == "done\n"


@pytest.mark.parametrize(
    "defect",
    [[d for d in DEFECTS if d.file == file and d.kind == "barrier"][-1] for file in RACES],
    ids=str,
)
def test_a_removed_barrier_is_reported_as_a_race(program: Path, defect: Defect) -> None:
    assert "WARNING: ThreadSanitizer: data race" in run(program, RACES[defect.file], defect.number)
