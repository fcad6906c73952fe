"""Predicts what a GPU needs for the Triton kernels: counted work over public peak rates.

    python -m benchmarks.roofline

prints the table in NOTES_triton.md. Nothing is measured: a prediction is the largest of the times
that memory, instruction issue, float32 and the special functions need, plus the launches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.markdown import table
from benchmarks.workloads import REALISTIC, Workload
from cwbr_fused.operations import extension

# Assumptions: the time between two small kernels of a stream, and that of one turn of a loop that a
# single program goes through. Most turns wait for their loads at a barrier. A turn of `top_pairs`
# that makes keys of 4,096 pairs issues 833 instructions for each of 16 warps and is bound by that.
LAUNCH_SECONDS = 2.5e-6
TURN_SECONDS = 0.7e-6
KEYS_SECONDS = 1.9e-6
# The CUDA backend sorts larger batches in the global memory of one block.
SORTED_IN_SHARED_MEMORY = 4096


@dataclass(frozen=True)
class Device:
    """Peak rates: of a multiprocessor in lanes per clock, of the device in bytes per second."""

    name: str
    processors: int
    clock: float
    float32: int
    memory: float
    issue: int = 128
    mufu: int = 16

    def seconds(self, work: Work) -> float:
        lanes = self.processors * self.clock
        arithmetic = max(
            work.issued / (lanes * self.issue),
            work.float32 / (lanes * self.float32),
            work.mufu / (lanes * self.mufu),
        )
        return (
            max(arithmetic, work.bytes / self.memory) + work.launches * LAUNCH_SECONDS + work.serial
        )


DEVICES = (
    Device("A100", 108, 1.41e9, 64, 2.0e12),
    Device("H100", 132, 1.98e9, 128, 3.35e12),
    Device("B200", 148, 1.965e9, 128, 8.0e12),
)


@dataclass(frozen=True)
class Work:
    """Instructions are counted per lane. Bytes are of main memory: nothing that a cache holds.

    `serial` are the seconds of loops that a single program goes through while the others wait.
    """

    bytes: float = 0
    issued: float = 0
    float32: float = 0
    mufu: float = 0
    launches: int = 0
    serial: float = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            *(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True))
        )


def visited_pairs(groups: int) -> int:
    """Pairs in the tiles that run, whole tiles counted; tile sizes as in triton_kernels/tuning."""
    rows, columns = 16, 32 if groups <= 256 else 64 if groups <= 512 else 128
    row_tiles, column_tiles = -(-groups // rows), -(-groups // columns)
    tiles = sum(min(row_tiles, (c + 1) * columns // rows) for c in range(column_tiles))
    return tiles * rows * columns


def all_pairs_forward(groups: int, dims: int) -> Work:
    """Pack, tiles, overlap. Per (pair, dimension) as in results/gpu_report.md for sm_90."""
    visits = visited_pairs(groups) * dims
    moments = 2 * 4 * groups * dims
    weights = 4 * groups * groups / 2
    return Work(2 * moments + weights, 9.4 * visits, 6.4 * visits, 0.25 * visits, 3)


def all_pairs_backward(groups: int, dims: int, processors: int = 132) -> Work:
    """The distances again, then each pair once, and the copies of the sums.

    A visit of blocks of 16 rows reads and writes the sums of one; what the second-level cache holds
    of them is not known, so all is counted. As many copies as on an H100.
    """
    blocks, dim_blocks = -(-groups // 16), -(-dims // 32)
    warps = 2 if groups < 256 else 4 if groups < 512 else 8
    copies = extension.triton_kernels().tuning.copies(blocks, dim_blocks, warps, processors)
    visited_blocks = -(-blocks // warps) * warps * (blocks // 2 + 1)
    visits = visited_blocks * 16 * 16 * dims
    moments, weights = 2 * 4 * groups * dims, 4 * groups * groups
    moved = 2 * 8 * 16 * dims * visited_blocks + 2 * copies * moments
    pairs = Work(2 * moments + 3 * weights + moved, 15.9 * visits, 13.2 * visits, visits, 3)
    return all_pairs_forward(groups, dims) + pairs


def eager_forward_bytes(elements: int) -> int:
    """Eager PyTorch on K x K x D: 12 tensors read and 11 written, by ten operations and a sum."""
    return 23 * 4 * elements


def selection_seconds(groups: int, top_m: int, block: int = 4096) -> float:
    """A program of `top_pairs`: sample, pass over all pairs, candidates, ranking."""
    pairs = groups * (groups - 1) // 2
    expected = top_m * block / pairs
    rank = expected + 4 * expected**0.5 + 4
    sampled = pairs > block and 2 * rank < block
    candidates = rank * pairs / block if sampled else pairs
    with_keys = -(-pairs // block) + 5 * math.ceil(candidates / block)
    others = 5 * sampled + -(-top_m // 128)
    return with_keys * KEYS_SECONDS + others * TURN_SECONDS


def hub_seconds(listed_pairs: float) -> float:
    """The backward pass of one class: a block goes through its pairs, a turn of loads for each."""
    return listed_pairs * TURN_SECONDS


def sort_seconds(batch: int, threads: int = 1024) -> float:
    """`group_by_class` of the CUDA backend: the stages of a bitonic sort, where one block waits."""
    if batch <= SORTED_IN_SHARED_MEMORY:
        return 0.0
    digits = math.ceil(math.log2(batch))
    turns: int = digits * (digits + 1) // 2 * (2**digits // 2 // threads)
    return turns * TURN_SECONDS


def loss_step(workload: Workload, itemsize: int = 2) -> Work:
    """Plan, forward and backward of all layers; features and logits in half precision.

    Each class is taken to be in the same number of listed pairs.

    Every row of a pair is counted from memory at its first use only: what the kernels read again
    (16 bytes per pair and dimension forward, 16 per end of a pair backward) is held by the caches.
    """
    assert workload.top_m is not None
    batch, dims, groups = workload.batch, sum(workload.dims), workload.groups
    pairs = min(workload.top_m, groups * (groups - 1) // 2)
    logits = batch * workload.classes
    # The selection of the pairs and the layout of the groups.
    serial = selection_seconds(groups, pairs) + 2 * -(-batch // 1024) * TURN_SECONDS
    plan = Work(itemsize * logits, 0, 0, logits, 4, serial)
    features, moments = itemsize * batch * dims, 2 * 4 * groups * dims
    ends = pairs * dims
    forward = Work(features + 2 * moments, 62 * ends, 34 * ends, 4 * ends, 2)
    walk = hub_seconds(2 * pairs / groups)
    backward = Work(2 * features + moments, 2 * 20 * ends, 2 * 10 * ends, 2 * ends, 2, walk)
    return plan + forward + backward


def _times(work: Work) -> list[str]:
    return [f"{1e6 * device.seconds(work):,.0f}" for device in DEVICES]


def _counts(work: Work) -> list[str]:
    return [f"{work.bytes / 1e6:.3g}", f"{work.float32 / 1e9:.3g}", f"{work.mufu / 1e9:.3g}"]


def all_pairs_table() -> str:
    names = [device.name for device in DEVICES]
    lines = []
    for groups, dims in ((64, 2048), (200, 2048), (500, 768), (1000, 768), (1000, 2048)):
        eager = eager_forward_bytes(groups * groups * dims)
        of_eager = [f"{eager / 1e9:.3g}", *_times(Work(eager, launches=11))]
        for direction, count, last in (
            ("forward", all_pairs_forward, of_eager),
            ("backward", all_pairs_backward, [""] * 4),
        ):
            work = count(groups, dims)
            label = f"K={groups}, D={dims}, {direction}"
            lines.append([label, *_counts(work), *_times(work), *last])
    header = ["all pairs", "MB", "G float32 slots", "G MUFU", *names]
    return table([*header, "eager forward: GB", *names], lines)


def loss_table() -> str:
    lines = []
    for workload in REALISTIC:
        if workload.kind == "loss":
            work = loss_step(workload)
            lines.append([workload.name, *_counts(work), str(work.launches), *_times(work)])
    header = ["step of the loss", "MB", "G float32 slots", "G MUFU", "launches"]
    return table([*header, *(device.name for device in DEVICES)], lines)


def serial_table() -> str:
    """What one program goes through alone, on any of the devices."""
    parts = [
        (f"`top_pairs`, K={groups:,}, M={top_m:,}", selection_seconds(groups, top_m))
        for groups, top_m in ((64, 64), (256, 256), (256, 1024), (512, 4096), (1024, 4096))
    ]
    parts += [
        (f"backward, one class in {pairs} listed pairs", hub_seconds(pairs))
        for pairs in (16, 255, 1023)
    ]
    parts += [
        (f"`group_by_class` of the CUDA backend, B={batch:,}", sort_seconds(batch))
        for batch in (8192, 16_384)
    ]
    return table(["serial part", "us"], [[name, f"{1e6 * s:,.0f}"] for name, s in parts])


def main() -> None:
    print("\n".join((all_pairs_table(), loss_table(), serial_table())), end="")


if __name__ == "__main__":
    main()
