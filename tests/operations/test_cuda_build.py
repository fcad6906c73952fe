"""The whole extension with its CUDA kernels: built by nvcc against this torch, loaded, and read.

No GPU is needed: torch's dispatcher says which kernels are registered, cuobjdump what nvcc made of
them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from emulation.harness import KERNELS as SOURCES
from emulation.harness import compile_emulated

from benchmarks.gpu_report_cuda import KERNELS, Row, find_tool, rows, stage_instructions
from cwbr_fused.operations.schema import SCHEMAS

ROOT = Path(__file__).parents[2]
ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "sm_120"}


def toolkit() -> str | None:
    """A CUDA toolkit: CUDA_HOME, whichever nvcc is on PATH, or NVIDIA's wheels."""
    if "CUDA_HOME" in os.environ or shutil.which("nvcc"):
        return os.environ.get("CUDA_HOME", "")
    wheels = find_spec("nvidia.cu13") if find_spec("nvidia") else None
    for folder in wheels.submodule_search_locations or [] if wheels else []:
        if (Path(folder) / "bin" / "nvcc").exists():
            return folder
    return None


@pytest.fixture(scope="module")
def extension(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The extension, built in a copy of the sources for the default architectures."""
    home = toolkit()
    if home is None:
        pytest.skip("no nvcc: not on PATH, in CUDA_HOME or in the package nvidia-cuda-nvcc")
    copy = tmp_path_factory.mktemp("build")
    for name in ("csrc", "cwbr_fused", "triton_kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "*.pyc"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    # -O0 is for the CPU's kernels, which nothing here looks at.
    environment = {**os.environ, "CWBR_BUILD": "cuda", "CFLAGS": "-O0"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    if home:
        environment["CUDA_HOME"] = home
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (library,) = (copy / "cwbr_fused").glob("_cuda*.so")
    return library


@pytest.fixture(scope="module")
def report(extension: Path) -> list[Row]:
    if find_tool("cuobjdump") is None:
        pytest.skip("no cuobjdump: not on PATH, in CUDA_HOME or in the package triton")
    return list(rows(extension))


def test_the_dispatcher_knows_a_cuda_kernel_of_every_operation(extension: Path) -> None:
    code = (
        "import torch; from cwbr_fused.operations import extension, schema; "
        "assert extension.missing('cuda') is None, extension.missing('cuda'); "
        "has = torch._C._dispatch_has_kernel_for_dispatch_key; "
        "print([n for n in schema.SCHEMAS if has('cwbr_fused::' + n, 'CUDA')])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=extension.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(list(SCHEMAS))


def test_the_library_knows_which_gpus_it_is_for(extension: Path) -> None:
    code = (
        "import torch; from cwbr_fused.operations import extension; "
        "print(torch.ops.cwbr_fused_build.cuda_architectures(), "
        "*[extension.runs_on(extension._architectures, c) for c in ((7, 5), (8, 9), (13, 0))])"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=extension.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["8.0;9.0;10.0;12.0+PTX", "False", "True", "True"]


def test_gpus_without_asynchronous_copies_are_refused() -> None:
    home = toolkit()
    if home is None:
        pytest.skip("no nvcc: not on PATH, in CUDA_HOME or in the package nvidia-cuda-nvcc")
    environment = {**os.environ, "CWBR_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": "7.5;8.0"}
    if home:
        environment["CUDA_HOME"] = home
    command = [sys.executable, "setup.py", "--name"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: expected architectures from 8.0 on, got 7.5" in done.stderr


def test_every_kernel_is_in_the_report_for_every_architecture(report: list[Row]) -> None:
    for arch in ARCHITECTURES:
        kernels = {row.kernel.split("<")[0] for row in report if row.arch == arch}
        assert kernels == {key.split()[0] for key in KERNELS}
    assert {row.arch for row in report} == ARCHITECTURES


def test_no_kernel_uses_the_stack(report: list[Row]) -> None:
    assert [row for row in report if row.stack or row.local_accesses] == []


def test_moments_read_the_features_128_bits_at_a_time(report: list[Row]) -> None:
    """All samples of a chunk, if the rows of the features are aligned."""
    moments = [row for row in report if row.kernel.startswith("class_moments_kernel")]
    assert {row.arch for row in moments} == ARCHITECTURES
    assert all(row.loads_128 >= 8 for row in moments), moments


def test_all_pairs_keep_to_their_instruction_budget(report: list[Row]) -> None:
    """Per (pair, dimension) in the inner loop, shared-memory loads included."""
    measured = [row for row in report if row.instructions is not None]
    assert {row.arch for row in measured} == ARCHITECTURES
    for row in measured:
        limit = 12 if row.kernel.startswith("tile_backward") else 6.5
        assert row.instructions is not None
        assert row.instructions <= limit, row
        if limit == 6.5:
            assert row.mufu is not None
            assert row.mufu <= 0.26, row


def test_loading_the_tiles_stays_within_budget(extension: Path, report: list[Row]) -> None:
    """7.5 per (pair, dimension) for a whole stage: copies, logarithms and early exit included."""
    for arch in ARCHITECTURES:
        costs = list(stage_instructions(extension, arch))
        assert costs
        assert max(costs) <= 7.5


def test_two_blocks_of_tiles_fit_a_multiprocessor(report: list[Row]) -> None:
    for row in report:
        if row.kernel.startswith("tile_kernel"):
            assert row.occupancy * 2048 >= 2 * 256, row


def test_the_report_knows_how_much_shared_memory_a_launch_asks_for(tmp_path: Path) -> None:
    shared = {
        "mean_softmax_kernel": "SoftmaxShared",
        "select_chunk_kernel AlphaWeights": "SelectSharedOf",
        "pair_distance_kernel": "SumShared",
        "pack_kernel": "PackShared",
        "tile_kernel SumOverlaps": "TileShared",
        "tile_backward_kernel BothSides": "BackwardShared",
        "layer_distances_kernel": "RegularizerShared",
        "top_confusions_kernel": "ConfusionsShared",
        "class_attraction_kernel": "AttractionShared",
        "class_weights_kernel": "SumShared",
        "scatter_kernel": "SumShared",
        "variances_kernel": "VariancesShared",
    }
    prints = "".join(
        f'  printf("%zu %zu\\n", sizeof({name}<float>), sizeof({name}<double>));\n'
        for name in shared.values()
    )
    source = tmp_path / "sizes.cpp"
    source.write_text(
        "#include <cstdio>\n#define CWBR_CUDA\n#define CWBR_WITHOUT_TORCH\n"
        '#include "emulation.h"\n#include "operations.h"\nusing namespace cwbr::cuda;\n'
        "template <class A> using SelectSharedOf = SelectShared;\n"
        f"int main() {{\n{prints}}}\n"
    )
    program = compile_emulated(tmp_path / "sizes", kernels=SOURCES, source=source)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")
    for key, line in zip(shared, lines, strict=False):
        assert tuple(map(int, line.split())) == KERNELS[key][3:], key
