"""What nvcc made of the CUDA kernels: registers, stack, occupancy and the instructions that matter.

    python -m benchmarks.gpu_report_cuda LIBRARY

reads the kernels of a compiled extension (or of one object file) with cuobjdump and prints a table.
No GPU is needed.

The instructions per (pair, dimension) are those of the innermost loop, address arithmetic and loads
included, divided by how many pairs and dimensions one turn of it covers. That number is read off
the loop itself: the difference of two means and the sum of two variances take one FADD each in
every pair and dimension, and nothing else in these loops is an FADD.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from benchmarks import markdown

# Kernel, or kernel and what its template argument does: the operation, its direction, the threads
# of a block, and the bytes of shared memory asked for at launch in float32 and in float64.
KERNELS = {
    "group_by_class_kernel": ("group_by_class", "forward", 1024, 32904, 32904),
    "sort_chunk_kernel": ("group_by_class", "forward", 1024, 32904, 32904),
    "merge_chunks_kernel": ("group_by_class", "forward", 1024, 0, 0),
    "lay_out_kernel": ("group_by_class", "forward", 1024, 128, 128),
    "class_moments_kernel": ("class_moments", "forward", 128, 0, 0),
    "class_moments_backward_kernel": ("class_moments", "backward", 128, 0, 0),
    "mean_softmax_kernel": ("confusion_weights", "forward", 512, 256, 512),
    "symmetrize_kernel": ("confusion_weights", "forward", 512, 0, 0),
    "select_chunk_kernel AlphaWeights": ("top_pairs", "forward", 512, 1168, 1168),
    "select_chunk_kernel SymmetricWeights": ("plan", "forward", 512, 1168, 1168),
    "sort_selected_kernel": ("top_pairs", "forward", 512, 1168 + 4096 * 8, 1168 + 2048 * 16),
    "pair_distance_kernel": ("pair_distance", "forward", 128, 128, 256),
    "touching_kernel": ("pair_distance", "backward", 128, 128, 128),
    "pair_distance_backward_kernel": ("pair_distance", "backward", 128, 0, 0),
    "pack_kernel": ("all_pair_distance", "both", 256, 5504, 7680),
    "tile_kernel WriteDistances": ("all_pair_distance", "forward", 256, 37008, 35088),
    "tile_kernel SumOverlaps": ("weighted_overlap", "forward", 256, 37008, 35088),
    "tile_kernel WriteGradients": ("weighted_overlap", "backward", 256, 37008, 35088),
    "tile_kernel SumAndWrite": ("weighted_overlap", "both", 256, 37008, 35088),
    "tile_backward_kernel BothSides": ("all_pair_distance", "backward", 64, 50176, 41472),
    "tile_backward_kernel TileGradients": ("weighted_overlap", "backward", 64, 50176, 41472),
    "gather_parts_kernel": ("all_pair_distance", "backward", 256, 0, 0),
    "layer_distances_kernel": ("regularizer", "forward", 128, 132, 264),
    "distance_gradients_kernel": ("regularizer", "backward", 128, 132, 264),
    "regularizer_backward_kernel": ("regularizer", "backward", 128, 0, 0),
    "top_confusions_kernel": ("top_confusions", "forward", 512, 392, 520),
    "class_attraction_kernel": ("class_attraction", "forward", 128, 288, 576),
    "class_weights_kernel": ("observe_classes", "forward", 128, 128, 256),
    "scatter_kernel": ("observe_classes", "forward", 128, 128, 256),
    "variances_kernel": ("observe_classes", "forward", 256, 1156, 2312),
    "follow_classes_kernel": ("follow_classes", "forward", 128, 0, 0),
}

# Of one multiprocessor: registers, bytes of shared memory, threads, blocks; and what each block's
# shared memory costs beyond what it asks for.
PROCESSORS = {
    "sm_80": (65536, 164 << 10, 2048, 32, 1024),
    "sm_90": (65536, 228 << 10, 2048, 32, 1024),
    "sm_100": (65536, 228 << 10, 2048, 32, 1024),
    "sm_120": (65536, 100 << 10, 1536, 24, 1024),
}


@dataclass(frozen=True)
class Row:
    """One kernel on one architecture."""

    backend: str
    operation: str
    direction: str
    kernel: str
    arch: str
    registers: int
    stack: int
    local_accesses: int
    loads_128: int  # of global memory
    shared: int
    occupancy: float
    instructions: float | None  # per (pair, dimension), for the kernels that measure all pairs
    mufu: float | None


def find_tool(name: str) -> str | None:
    """The path of cuobjdump or c++filt: on PATH, in CUDA_HOME, or in Triton's wheel."""
    folders = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/"), "bin")]
    triton = find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


def _output(tool: str, *args: str, text: str | None = None) -> str:
    path = find_tool(tool)
    if path is None:
        raise FileNotFoundError(f"{tool}: not on PATH, in CUDA_HOME or in the package triton")
    done = subprocess.run([path, *args], capture_output=True, text=True, check=True, input=text)
    return done.stdout


def _demangled(names: list[str]) -> dict[str, str]:
    plain = _output("c++filt", text="\n".join(names)).splitlines()
    return dict(zip(names, plain, strict=True))


Usage = dict[tuple[str, str], dict[str, int]]


def resource_usage(library: Path) -> Usage:
    """REG, STACK, SHARED, ... of every (arch, mangled kernel name)."""
    usage: Usage = {}
    arch = name = ""
    for line in _output("cuobjdump", "--dump-resource-usage", str(library)).splitlines():
        if match := re.match(r"arch = (sm_\d+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif line.strip().startswith("REG:"):
            pairs = re.findall(r"([A-Z]+):(\d+)", line)
            usage[arch, name] = {key: int(value) for key, value in pairs}
    return usage


Instructions = list[tuple[int, str]]


@lru_cache(maxsize=8)
def disassembly(library: Path, arch: str) -> dict[str, Instructions]:
    """(address, instruction) of every kernel, by mangled name."""
    kernels: dict[str, Instructions] = {}
    body: Instructions = []
    for line in _output("cuobjdump", "-sass", "-arch", arch, str(library)).splitlines():
        if match := re.search(r"Function : (\S+)", line):
            body = kernels.setdefault(match[1], [])
        elif match := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?(.*?)\s*;", line):
            body.append((int(match[1], 16), match[2]))
    return kernels


Loop = tuple[int, int]


def loops(body: Instructions) -> list[Loop]:
    """First and last address of every loop."""
    found = []
    for address, instruction in body:
        target = re.match(r"BRA\b.*?0x([0-9a-f]+)", instruction)
        if target and int(target[1], 16) <= address:
            found.append((int(target[1], 16), address))
    return found


def within(inner: Loop, outer: Loop) -> bool:
    return outer[0] <= inner[0] and inner[1] <= outer[1] and inner != outer


def opcodes(body: Instructions, loop: Loop) -> list[str]:
    return [instruction.split()[0] for at, instruction in body if loop[0] <= at <= loop[1]]


def innermost_loops(body: Instructions) -> Iterator[list[str]]:
    """The opcodes of every loop that contains no other."""
    found = loops(body)
    for loop in found:
        if not any(within(other, loop) for other in found):
            yield opcodes(body, loop)


def count(ops: list[str], name: str) -> int:
    return sum(op.split(".")[0] == name for op in ops)


def _pair_loops(body: Instructions) -> list[list[str]]:
    """The opcodes of the innermost loops over pairs and dimensions, fewest MUFU for each first."""
    found = [o for o in innermost_loops(body) if count(o, "FADD") >= 16 and count(o, "MUFU") >= 8]
    return sorted(found, key=lambda ops: count(ops, "MUFU") / count(ops, "FADD"))


def pair_loop(body: Instructions) -> tuple[float, float] | None:
    """Instructions and MUFU per (pair, dimension) of the loop where pairs share a denominator, or
    of the only loop over pairs and dimensions."""
    for ops in _pair_loops(body)[:1]:
        pair_dimensions = count(ops, "FADD") / 2
        return len(ops) / pair_dimensions, count(ops, "MUFU") / pair_dimensions
    return None


def stage_instructions(library: Path, arch: str) -> Iterator[float]:
    """Instructions per (pair, dimension) of a whole stage, for each float32 kernel over tiles.

    A stage is the smallest loop around the two ways to add one up, of which one runs, two turns.
    """
    for name, body in disassembly(library, arch).items():
        if "11tile_kernelIf" not in name:
            continue
        ways = _pair_loops(body)
        around = [opcodes(body, loop) for loop in loops(body)]
        stage = min(
            (ops for ops in around if count(ops, "MUFU") == sum(count(w, "MUFU") for w in ways)),
            key=len,
        )
        once = len(stage) - sum(len(ops) for ops in ways)
        yield (once + 2 * len(ways[0])) / count(ways[0], "FADD")


def _key(plain: str) -> str | None:
    """The entry of KERNELS for a demangled name."""
    match = re.search(r"cwbr::cuda::(\w+_kernel)(?:<.*?cwbr::cuda::(\w+))?", plain)
    if match is None:
        return None
    specific = f"{match[1]} {match[2]}"
    return specific if specific in KERNELS else match[1]


def occupancy(arch: str, registers: int, shared: int, threads: int) -> float:
    """The share of a multiprocessor's threads that can be resident."""
    all_registers, all_shared, all_threads, all_blocks, reserved = PROCESSORS[arch]
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = all_registers // per_warp // (threads // 32)
    by_shared = all_shared // (-(-(shared + reserved) // 128) * 128)
    blocks = min(by_registers, by_shared, all_threads // threads, all_blocks)
    return blocks * threads / all_threads


def rows(library: Path) -> Iterator[Row]:
    """A row for every kernel and architecture in a compiled extension."""
    usage = resource_usage(library)
    plain = _demangled(sorted({name for _, name in usage}))
    sass = {arch: disassembly(library, arch) for arch in sorted({arch for arch, _ in usage})}
    for (arch, name), used in sorted(
        usage.items(), key=lambda item: (item[0][0], plain[item[0][1]])
    ):
        key = _key(plain[name])
        if key is None:
            continue
        operation, direction, threads, in_float, in_double = KERNELS[key]
        shared = in_double if "<double" in plain[name] else in_float
        body = sass[arch][name]
        cost = pair_loop(body) if key.startswith("tile_") and "<double" not in plain[name] else None
        yield Row(
            backend="cuda",
            operation=operation,
            direction=direction,
            kernel=plain[name].removeprefix("void ").replace("cwbr::cuda::", "").split("(")[0],
            arch=arch,
            registers=used["REG"],
            stack=used["STACK"],
            local_accesses=sum(i.startswith(("LDL", "STL")) for _, i in body),
            loads_128=sum(i.startswith("LDG.E.128") for _, i in body),
            shared=shared,
            occupancy=occupancy(arch, used["REG"], shared, threads),
            instructions=cost[0] if cost else None,
            mufu=cost[1] if cost else None,
        )


def table(report: list[Row]) -> str:
    """The rows as Markdown."""

    def cell(value: object) -> str:
        return "" if value is None else f"{value:.2f}" if isinstance(value, float) else str(value)

    return markdown.table(
        [field.name for field in fields(Row)],
        [[cell(value) for value in astuple(row)] for row in report],
    ).rstrip()


if __name__ == "__main__":
    print(table(list(rows(Path(sys.argv[1])))))
