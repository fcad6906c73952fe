"""Predicts what a GPU needs for the Triton kernels: counted work over public peak rates.

    python -m benchmarks.roofline

prints the table in NOTES_triton.md. Nothing is measured: a prediction is the largest of the times
that memory, instruction issue, float32 and the special functions need, plus the launches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.workloads import BY_NAME, REALISTIC, Workload
from cwbr_fused.operations import extension

# Assumptions: between two small kernels of a stream, and one turn of a loop that has a barrier and
# waits for its loads, where a single program goes through all pairs.
LAUNCH_SECONDS = 2.5e-6
TURN_SECONDS = 0.7e-6


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
        waiting = work.launches * LAUNCH_SECONDS + work.turns * TURN_SECONDS
        return max(arithmetic, work.bytes / self.memory) + waiting


DEVICES = (
    Device("A100", 108, 1.41e9, 64, 2.0e12),
    Device("H100", 132, 1.98e9, 128, 3.35e12),
    Device("B200", 148, 1.965e9, 128, 8.0e12),
)


@dataclass(frozen=True)
class Work:
    """Instructions are counted per lane. Bytes are of main memory: nothing that a cache holds.

    `turns` are those of loops that a single program goes through while the others wait.
    """

    bytes: float = 0
    issued: float = 0
    float32: float = 0
    mufu: float = 0
    launches: int = 0
    turns: int = 0

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


def plain_forward_bytes(elements: int) -> int:
    """Eager PyTorch on K x K x D: 12 tensors read and 11 written, by ten operations and a sum."""
    return 23 * 4 * elements


def selection_turns(groups: int, top_m: int, block: int = 4096) -> int:
    """Of a program of `top_pairs`: sample, candidates, four histograms and the choice, ranking."""
    pairs = groups * (groups - 1) // 2
    expected = top_m * block / pairs
    rank = expected + 4 * expected**0.5 + 4
    sampled = pairs > block and 2 * rank < block
    candidates = rank * pairs / block if sampled else pairs
    turns = 5 * sampled + -(-pairs // block) + 5 * math.ceil(candidates / block)
    return turns + -(-top_m // 128)


def loss_step(workload: Workload, itemsize: int = 2) -> Work:
    """Plan, forward and backward of all layers; features and logits in half precision.

    Every row of a pair is counted from memory at its first use only: what the kernels read again
    (16 bytes per pair and dimension forward, 16 per end of a pair backward) is held by the caches.
    """
    assert workload.top_m is not None
    batch, dims, groups = workload.batch, sum(workload.dims), workload.groups
    pairs = min(workload.top_m, groups * (groups - 1) // 2)
    logits = batch * workload.classes
    # The selection of the pairs and the layout of the groups.
    turns = selection_turns(groups, pairs) + 2 * -(-batch // 1024)
    plan = Work(itemsize * logits, 0, 0, logits, 4, turns)
    features, moments = itemsize * batch * dims, 2 * 4 * groups * dims
    ends = pairs * dims
    forward = Work(features + 2 * moments, 62 * ends, 34 * ends, 4 * ends, 2)
    backward = Work(2 * features + moments, 2 * 20 * ends, 2 * 10 * ends, 2 * ends, 2)
    return plan + forward + backward


def _times(work: Work) -> list[str]:
    return [f"{1e6 * device.seconds(work):,.0f}" for device in DEVICES]


def main() -> None:
    names = " | ".join(device.name for device in DEVICES)
    print(f"| all pairs | MB | G float32 slots | G MUFU | {names} | plain forward: GB | {names} |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for groups, dims in ((64, 2048), (200, 2048), (500, 768), (1000, 768), (1000, 2048)):
        plain = plain_forward_bytes(groups * groups * dims)
        for direction, count in (("forward", all_pairs_forward), ("backward", all_pairs_backward)):
            work = count(groups, dims)
            cells = [
                f"K={groups}, D={dims}, {direction}",
                f"{work.bytes / 1e6:.3g}",
                f"{work.float32 / 1e9:.3g}",
                f"{work.mufu / 1e9:.3g}",
                *_times(work),
            ]
            if direction == "forward":
                cells += [f"{plain / 1e9:.3g}", *_times(Work(plain, launches=11))]
            else:
                cells += [""] * 4
            print("| " + " | ".join(cells) + " |")
    print(f"\n| step of the loss | MB | G float32 slots | G MUFU | launches | {names} |")
    print("|---|---|---|---|---|---|---|---|")
    for workload in REALISTIC:
        if workload.kind != "loss":
            continue
        work = loss_step(BY_NAME[workload.name])
        cells = [
            workload.name,
            f"{work.bytes / 1e6:.3g}",
            f"{work.float32 / 1e9:.3g}",
            f"{work.mufu / 1e9:.3g}",
            str(work.launches),
            *_times(work),
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
