"""Every Triton kernel compiled ahead of time for NVIDIA and AMD, and its machine code examined."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton_inputs import EPS, TRITON, rand

ROOT = Path(__file__).parents[2]
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")

Table = list[dict[str, str]]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Table:
    """The report's rows; compiled in a process of its own, where Triton does not interpret."""
    folder = tmp_path_factory.mktemp("report")
    command = [sys.executable, "-m", "benchmarks.gpu_report", "--backend", "triton"]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    subprocess.run([*command, "--out", str(folder)], cwd=ROOT, env=environment, check=True)
    with (folder / "gpu_report.csv").open() as file:
        return list(csv.DictReader(file))


def kernels_of(source: Path) -> set[str]:
    """Names of the kernels (not of the functions they call) that a module defines."""
    functions = [line for line in source.read_text().splitlines() if line.startswith("def ")]
    return {f[4:].split("(")[0] for f in functions if f[4:].split("(")[0].endswith("_kernel")}


def test_every_kernel_compiles_for_every_architecture(report: Table) -> None:
    written = set().union(*(kernels_of(f) for f in (ROOT / "triton_kernels").glob("*.py")))
    assert written
    for arch in ARCHS:
        assert {row["kernel"].split()[0] for row in report if row["arch"] == arch} == written


def test_no_kernel_uses_the_stack_or_spills(report: Table) -> None:
    offenders = [r for r in report if int(r["stack"]) or int(r["local_accesses"])]
    assert offenders == []


@pytest.mark.parametrize("arch", ARCHS)
def test_moments_read_the_features_128_bits_at_a_time(report: Table, arch: str) -> None:
    """A group's first sample and the four of a tile, if the rows of the features are aligned.

    AMD's wavefronts hold two of the four in each lane.
    """
    least = 2 if arch == "gfx942" else 5
    rows = [r for r in report if r["kernel"].startswith("_moments_kernel") and r["arch"] == arch]
    assert {"float32", "float64"} <= {row["kernel"].split()[1] for row in rows}
    assert [row for row in rows if int(row["loads_128"]) < least] == []


# Instructions, loads and loop included, and reciprocals and logarithms, for each pair i < j and
# dimension.
BUDGET = {("_tile_kernel", "forward"): (9.5, 0.3), ("_pairs_backward_kernel", "backward"): (16, 1)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(("kernel", "direction"), BUDGET, ids=lambda x: str(x))
def test_inner_loops_keep_their_instruction_budget(
    report: Table, kernel: str, direction: str, arch: str
) -> None:
    instructions, mufu = BUDGET[kernel, direction]
    name = f"{kernel} float32"
    rows = [r for r in report if r["kernel"].startswith(name) and r["arch"] == arch]
    assert rows
    for row in rows:
        assert row["direction"] == direction
        assert 0 < float(row["instructions"]) <= instructions
        assert 0 < float(row["mufu"]) <= mufu


@pytest.mark.parametrize(("arch", "code"), [("sm_90", "ptx"), ("gfx942", "amdgcn")])
def test_a_class_outside_the_logits_traps_on_the_device_in_production(arch: str, code: str) -> None:
    """The assertion is in the machine code, without any debug setting."""
    script = (
        "import torch; from benchmarks.gpu_report import compile_only, extension\n"
        f"with compile_only({arch!r}) as compiled:\n"
        "    targets = torch.zeros(9, dtype=torch.int64)\n"
        "    extension.triton_kernels().plan(torch.zeros(9, 3), targets, 4, 2)\n"
        "codes = {k.fn.__name__: b.asm for k, b, _ in compiled}\n"
        f"print(codes['_rank_kernel'][{code!r}])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True)
    assert run.returncode == 0, run.stderr
    trap = "__assertfail" if arch == "sm_90" else "s_trap"
    assert trap in run.stdout


def test_autotuning_is_opt_in_takes_the_fastest_and_remembers_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tuning: Any = TRITON.tuning
    timed: list[int] = []

    def do_bench(start: Any) -> float:
        timed.append(start.args[0]["COLUMNS"])
        return abs(timed[-1] - 64)

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(tuning, "_fastest", {})
    candidates = tuning.all_pairs(torch.empty(100, 20))

    def choose() -> Any:
        return tuning.choose("all pairs", torch.empty(100, 20), candidates, lambda options: options)

    assert choose() is candidates[0]
    assert timed == []
    monkeypatch.setenv("CWBR_TRITON_AUTOTUNE", "1")
    assert choose()["COLUMNS"] == 64
    assert timed == [c["COLUMNS"] for c in candidates]
    tuning._fastest.clear()
    assert choose()["COLUMNS"] == 64
    assert len(timed) == len(candidates)
    assert list(json.loads((tmp_path / "cwbr_fused_autotune.json").read_text()).values()) == [1]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("candidate", [0, 1, 2])
def test_every_candidate_tile_gives_the_same_distances(
    candidate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    mean, var = rand(20, 9, dtype=torch.float64), rand(20, 9, seed=1, dtype=torch.float64)
    default = TRITON.all_pair_distance(mean, var, EPS)
    grads = TRITON.all_pair_distance_backward(default, mean, var, EPS)
    monkeypatch.setattr(
        TRITON.tuning, "choose", lambda name, sizes, tiles, start: tiles[candidate % len(tiles)]
    )
    torch.testing.assert_close(TRITON.all_pair_distance(mean, var, EPS), default)
    other = TRITON.all_pair_distance_backward(default, mean, var, EPS)
    torch.testing.assert_close(other, grads)
