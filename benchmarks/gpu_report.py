"""`make gpu-report`: what every GPU kernel costs by its machine code, compiled without a GPU.

Writes benchmarks/results/gpu_report.csv and .md. Triton's kernels are compiled ahead of time for
each architecture with the tile sizes and specialisations that a launch on it would use; the CUDA
kernels' rows are read from the compiled extension, where it was built with them.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, fields
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cwbr_fused
from benchmarks import gpu_report_cuda
from benchmarks.gpu_report_cuda import (
    Row,
    disassembly,
    innermost_loops,
    occupancy,
    resource_usage,
    table,
)
from cwbr_fused.operations import extension

RESULTS = Path(__file__).parent / "results"
ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
PROCESSORS = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_103": 160,
    "sm_120": 170,
    "gfx90a": 104,
    "gfx942": 304,
    "gfx1100": 96,
}
EPS = 1e-6


def write(rows: list[Row], folder: Path = RESULTS) -> None:
    """The one table of all GPU kernels, as CSV and as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "gpu_report.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    text = f"""# GPU kernels by their machine code

Compiled ahead of time, nothing was run. Stack and shared memory in bytes; loads_128 are loads of
128 bits from global memory, as written, not as executed; instructions and MUFU (reciprocals and
logarithms) are per unordered pair and dimension of the inner loop, its loads included. For gfx942
the registers are vector registers and local accesses are spilled ones. Made by `make gpu-report`.

{table(rows)}
"""
    (folder / "gpu_report.md").write_text(text)


def _nvidia_row(binary: Any, name: str, arch: str, labels: dict[str, str]) -> Row:
    """The row of kernel `name`, whose shared memory is asked for at launch."""
    shared, warps = binary.metadata.shared, binary.metadata.num_warps
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        ((_, used),) = resource_usage(Path(file.name)).items()
        body = disassembly(Path(file.name), arch if arch == "sm_80" else arch + "a")[name]
    instructions = mufu = None
    if name in VISITS_PER_MUFU:
        # Of several loops, the one that shares reciprocals and logarithms most.
        found = [ops for ops in innermost_loops(body) if _count_mufu(ops)]
        loop = max(found, key=lambda ops: len(ops) / _count_mufu(ops))
        visits = VISITS_PER_MUFU[name] * _count_mufu(loop)
        instructions, mufu = len(loop) / visits, _count_mufu(loop) / visits
    return Row(
        **labels,
        arch=arch,
        registers=used["REG"],
        stack=used["STACK"],
        local_accesses=sum(i.startswith(("LDL", "STL")) for _, i in body),
        loads_128=sum(i.startswith("LDG.E.128") for _, i in body),
        shared=shared,
        occupancy=occupancy(arch, used["REG"], shared, 32 * warps),
        instructions=instructions,
        mufu=mufu,
    )


def _count_mufu(opcodes: list[str]) -> int:
    return sum(op.startswith("MUFU") for op in opcodes)


def _amd_row(binary: Any, labels: dict[str, str]) -> Row:
    """The row of an AMD kernel: 512 vector registers are shared by up to 8 waves."""
    assembly = binary.asm["amdgcn"]

    def field(name: str) -> int:
        return int(re.findall(rf"{name}:\s*(\d+)", assembly)[-1])

    registers = max(1, field(r"\.vgpr_count"))
    return Row(
        **labels,
        arch="gfx942",
        registers=registers,
        stack=field(r"\.private_segment_fixed_size"),
        local_accesses=field(r"\.vgpr_spill_count"),
        loads_128=len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", assembly)),
        shared=binary.metadata.shared,
        occupancy=min(8, 512 // (8 * -(-registers // 8))) / 8,
        instructions=None,
        mufu=None,
    )


class _Target:
    """Stands in for Triton's driver: a device of one architecture that is not there."""

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        nvidia, lanes = arch.startswith("sm_"), 64 if arch.startswith("gfx9") else 32
        self.target = GPUTarget(
            "cuda" if nvidia else "hip", int(arch[3:]) if nvidia else arch, lanes
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target.arch)

    def get_current_stream(self, device: Any = None) -> int:
        return 0


@contextmanager
def compile_only(arch: str) -> Iterator[list[Any]]:
    """Kernels launched meanwhile are compiled for `arch` and not run: (kernel, binary, options).

    Triton keeps the stand-in device afterwards: for processes that run no kernel.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    tuning: Any = importlib.import_module(extension.triton_kernels().__name__ + ".tuning")
    compiled: list[Any] = []
    run, processors = JITFunction.run, tuning.processors

    def warm_up(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binary = run(kernel, *args, grid=grid, warmup=True, **options)
        compiled.append((kernel, binary, options))
        return binary

    JITFunction.run, tuning.processors = warm_up, lambda device: PROCESSORS[arch]
    driver.set_active(_Target(arch))
    try:
        yield compiled
    finally:
        JITFunction.run, tuning.processors = run, processors


def call_every_operation(kernels: Any, dtype: torch.dtype) -> Iterator[str]:
    """Calls each operation with uninitialised tensors of realistic sizes; gives its name after."""
    batch, dims, n_classes, pairs = 512, 2048, 1000, 64
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32

    def floats(*shape: int, dtype: torch.dtype = accumulation) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def integers(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64)

    z, logits, targets = (
        floats(batch, dims, dtype=dtype),
        floats(batch, n_classes, dtype=dtype),
        integers(batch),
    )
    order, offsets, classes = kernels.group_by_class(targets, 2)
    yield "group_by_class"
    kernels.plan(logits, targets, pairs, 2)
    yield "plan"
    kernels.confusion_weights(logits, order, offsets, classes)
    yield "confusion_weights"
    kernels.top_pairs(floats(256, 256), pairs)
    yield "top_pairs"
    moments = kernels.class_moments(z, order, offsets, EPS)
    yield "class_moments"
    kernels.class_moments_backward(*moments, z, *moments, order, offsets, EPS)
    yield "class_moments_backward"
    seen = torch.zeros(n_classes, dtype=torch.bool)
    rivals, weight, own = kernels.top_confusions(logits, targets, seen, 5)
    yield "top_confusions"
    layers = 4
    bank, var = [floats(n_classes, dims)] * layers, [floats(dims)] * layers
    count, updates = [floats(n_classes)] * layers, [floats()] * layers
    size, of_batch = floats(batch), floats(batch, layers * dims)
    acting = targets[:, None], floats(batch, 0), own, rivals, weight, seen, 1.0
    joint = floats(batch, layers * dims, dtype=dtype)
    kernels.class_attraction(joint, bank, of_batch[0], floats(layers), *acting)
    yield "class_attraction"
    kernels.observe_classes(
        *(bank, count, var, updates, targets, size, of_batch, of_batch), 0.95, 1e-3
    )
    yield "observe_classes"
    kernels.follow_classes(bank, count, targets, floats(layers, batch), of_batch, 0.9)
    yield "follow_classes"
    chosen, weights = integers(pairs, 2), floats(pairs)
    kernels.pair_distance(*moments, chosen, EPS)
    yield "pair_distance"
    kernels.pair_distance_backward(weights, *moments, chosen, EPS)
    yield "pair_distance_backward"
    for groups in (200, 1000):
        mean, alpha = floats(groups, dims), floats(groups, groups)
        kernels.all_pair_distance(mean, mean, EPS)
        yield "all_pair_distance"
        kernels.all_pair_distance_backward(alpha, mean, mean, EPS)
        yield "all_pair_distance_backward"
    for log in (False, True):
        kernels.weighted_overlap(mean, mean, alpha, EPS, log)
        yield "weighted_overlap"
        kernels.weighted_overlap_backward(floats(), floats(), mean, mean, alpha, EPS, log)
        yield "weighted_overlap_backward"
        features, planned = [z, z[:, :256]], (order, offsets, chosen, weights, EPS, log)
        _, *saved = kernels.regularizer(features, *planned)
        yield "regularizer"
        kernels.regularizer_backward(floats(), features, *saved, *planned)
        yield "regularizer_backward"


# Kernel -> (pair, dimension)s for each MUFU instruction of its inner loop, whatever the unrolling:
# one reciprocal and one logarithm for eight; four reciprocals for each (its logarithm is computed
# in full precision); one reciprocal for each.
VISITS_PER_MUFU = {
    "_tile_kernel": 4.0,
    "_pair_distance_kernel": 0.25,
    "_pairs_backward_kernel": 1.0,
    "_pair_distance_backward_kernel": 1.0,
}


# The options that tell the rows of one kernel apart.
TILE_OPTIONS = ("ROWS", "COLUMNS", "TILES", "LOG")


def triton_rows(arch: str) -> list[Row]:
    """A row for each kernel and tile size of the Triton backend."""
    dtypes = [torch.float32, torch.float64] + [torch.bfloat16] * (arch == "sm_90")
    kernels = extension.triton_kernels()
    rows: dict[tuple[Any, ...], Row] = {}
    with compile_only(arch) as compiled:
        for dtype in dtypes:
            for call in call_every_operation(kernels, dtype):
                for kernel, binary, options in compiled:
                    tiles = [f"{k}={v}" for k, v in options.items() if k in TILE_OPTIONS]
                    name = " ".join((kernel.fn.__name__, str(dtype).removeprefix("torch."), *tiles))
                    key = (kernel.fn.__name__, binary.hash)
                    if key not in rows:
                        labels = {
                            "backend": "triton",
                            "operation": kernel.fn.__module__.rpartition(".")[2],
                            "direction": "backward" if call.endswith("_backward") else "forward",
                            "kernel": name,
                        }
                        rows[key] = _triton_row(kernel.fn.__name__, binary, arch, labels)
                compiled.clear()
    # Some specialisations differ in nothing that is reported.
    return list(dict.fromkeys(rows.values()))


def _triton_row(name: str, binary: Any, arch: str, labels: dict[str, str]) -> Row:
    if arch == "gfx942":
        return _amd_row(binary, labels)
    return _nvidia_row(binary, name, arch, labels)


def cuda_rows(archs: Sequence[str]) -> list[Row]:
    """The rows of the compiled extension; none where it has no CUDA kernels."""
    libraries = Path(cwbr_fused.__path__[0]).glob("_cuda*.so")
    if extension.missing("cuda") is not None:
        return []
    return [r for library in libraries for r in gpu_report_cuda.rows(library) if r.arch in archs]


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("gpu_report: unset TRITON_INTERPRET, the interpreter compiles nothing")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", choices=ARCHS, default=ARCHS)
    parser.add_argument(
        "--backend", nargs="+", choices=("triton", "cuda"), default=("triton", "cuda")
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    rows: list[Row] = []
    if "triton" in options.backend:
        # A process for each: Triton compiles on one core, and holds one device.
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as processes:
            rows += chain.from_iterable(processes.map(triton_rows, options.arch))
    if "cuda" in options.backend:
        rows += cuda_rows(options.arch)
    write(rows, options.out)
    print((options.out / "gpu_report.md").read_text())


if __name__ == "__main__":
    main()
