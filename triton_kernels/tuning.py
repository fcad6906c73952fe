"""Tile sizes and warps of every kernel, in one place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

Options = dict[str, int]

# Three warps for each of the four schedulers hide latency behind independent arithmetic; twice
# that many leave no processor idle at the end.
WARPS_PER_PROCESSOR = 24


# Which candidate was fastest, by name, architecture and sizes; filled only by autotuning.
_fastest: dict[str, int] = {}


def architecture(device: torch.device) -> str:
    """Such as "cuda 90" or "hip gfx942"; "interpreter" where no device compiles the kernels."""
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return _architecture(device, triton.runtime.driver.active)


@cache
def _architecture(device: torch.device, driver: Any) -> str:
    """Of tensors on the CPU, of which a test may compile kernels, the driver's own."""
    with torch.cuda.device(device if device.type == "cuda" else -1):
        target = driver.get_current_target()
    return f"{target.backend} {target.arch}"


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of the device; 1 under the interpreter, where programs run in turn."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def every_register(warps: int, device: torch.device) -> Options:
    """All registers of a multiprocessor, for so many warps; an option of CUDA only.

    Left alone, ptxas keeps some kernels to fewer, for occupancy, and spills.
    """
    if not architecture(device).startswith("cuda"):
        return {}
    return {"maxnreg": min(240, 65536 // (32 * warps))}


def block_of_dims(dims: int, itemsize: int, most_warps: int) -> Options:
    """A block in which each lane reads 16 contiguous bytes of a row, and its warps.

    With all warps along the row the sum over the rows of a tile stays inside a thread.
    """
    per_warp = 32 * 16 // itemsize
    warps = min(most_warps, triton.next_power_of_2(triton.cdiv(max(dims, 1), per_warp)))
    return {"BLOCK": per_warp * warps, "num_warps": warps}


def moments(dims: int, z: Tensor) -> Options:
    """Four samples at a time: classes of a balanced batch rarely have more."""
    return {"ROWS": 4, **block_of_dims(dims, z.element_size(), most_warps=4)}


def moments_backward(dims: int, z: Tensor) -> Options:
    return block_of_dims(dims, z.element_size(), most_warps=4)


def pair_distance(dims: int, mean: Tensor) -> Options:
    return block_of_dims(dims, mean.element_size(), most_warps=8)


def pair_distance_backward(dims: int, mean: Tensor) -> Options:
    return block_of_dims(dims, mean.element_size(), most_warps=4)


def mean_probs(classes: int) -> Options:
    """Tiles of about 4096 logits, of many samples where classes are few."""
    block = min(1024, triton.next_power_of_2(max(classes, 1)))
    return {"ROWS": max(4, min(64, 4096 // block)), "BLOCK_C": block, "num_warps": 4}


def top_confusions(classes: int) -> Options:
    """A row has one program: blocks wide enough to keep a multiprocessor's loads in flight."""
    block = min(4096, max(32, triton.next_power_of_2(classes)))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}


def class_attraction(dims: int, classes: int, mean: Tensor) -> Options:
    """By the means, of which several rows are read for each sample, up to eight at once."""
    chunk = min(8, triton.next_power_of_2(max(classes, 1)))
    block = block_of_dims(dims, mean.element_size(), most_warps=4)
    return {"CHUNK": chunk, **block, **every_register(block["num_warps"], mean.device)}


def class_rows(dims: int, mean: Tensor) -> Options:
    """A program reads a row or two of a batch's class moments, once."""
    return block_of_dims(dims, mean.element_size(), most_warps=4)


def observe_classes(mean: Tensor) -> Options:
    """Sixteen classes at a time: so many rows are under way at once that few programs suffice."""
    return {"ROWS": 16, "BLOCK": 32 * 16 // mean.element_size(), "num_warps": 4}


def all_pairs(mean: Tensor) -> tuple[Options, ...]:
    """Tiles of 16 rows: a thread then holds 4 x 4 pairs. Narrow ones where classes are few.

    In float64 registers hold a quarter of that.
    """
    warps = 1 if mean.dtype == torch.float32 else 4
    narrow = {"ROWS": 16, "COLUMNS": 32, "num_warps": warps}
    middle = {"ROWS": 16, "COLUMNS": 64, "num_warps": 2 * warps}
    wide = {"ROWS": 16, "COLUMNS": 128, "num_warps": 4 * warps}
    groups = mean.shape[0]
    guess = narrow if groups <= 256 else middle if groups <= 512 else wide
    tiles = (guess, *(t for t in (narrow, middle, wide) if t is not guess))
    registers = every_register(4, mean.device) if mean.dtype == torch.float32 else {}
    return tuple(tile | registers for tile in tiles)


def top_pairs(matrix: Tensor) -> Options:
    """As many pairs at a time as registers hold, because each turn waits for memory."""
    size = matrix.element_size()
    return {"BLOCK": 16384 // size, "SHARE": 64, "OTHERS": 512 // size, "num_warps": 16}


def slices_of_dims(dims: int, warps: int, device: torch.device) -> tuple[int, int]:
    """Dimensions per slice, and in how many parts to run `warps` warps to fill the device."""
    slice_dims = 64 if dims >= 64 else max(8, triton.next_power_of_2(dims))
    parts = triton.cdiv(WARPS_PER_PROCESSOR * processors(device), warps)
    return slice_dims, max(1, min(parts, triton.cdiv(dims, slice_dims)))


def all_pairs_backward(mean: Tensor) -> tuple[Options, ...]:
    """A lane holds one dimension of 16 rows, of 8 in float64, a warp one block of rows.

    More warps share one copy of the sums; fewer waste less where blocks of rows are few.
    """
    rows = 16 if mean.dtype == torch.float32 else 8
    lanes = 64 if architecture(mean.device).startswith("hip gfx9") else 32
    groups = mean.shape[0]
    guess = 2 if groups < 256 else 4 if groups < 512 else 8
    tiles = (guess, *(t for t in (2, 4, 8) if t != guess))
    return tuple({"ROWS": rows, "TILES": t, "BLOCK": lanes, "num_warps": t} for t in tiles)


def copies(blocks: int, dim_blocks: int, warps: int, processors: int) -> int:
    """Into how many programs to divide the turns of one block of dimensions; each has a copy.

    As many as leave no processor without eight warps, which is what its registers hold, and no
    program with fewer turns than the others need. On 132 processors their memory is, in float32,
    at most 270 kB for each class and warp of a program: 36 MB for 1000 classes. It never is more
    than one copy where dimensions alone fill the device.
    """
    fitting = 8 * processors // (warps * dim_blocks)
    turns = blocks // 2 + 1
    share = -(-turns // max(1, fitting))
    return -(-turns // share)


def sum_of_copies(dims: int, mean: Tensor) -> Options:
    return block_of_dims(dims, mean.element_size(), most_warps=4)


def choose(
    name: str, mean: Tensor, candidates: tuple[Options, ...], start: Callable[..., Any]
) -> Options:
    """The first of the candidates; with CWBR_TRITON_AUTOTUNE=1 the fastest on this device.

    Args:
        name, mean: the problem; times are taken once for each name, size, dtype and architecture
            and kept in Triton's cache.
        start: launches the work with given options. Timing waits for the device, so warm up before
            capturing a CUDA graph.
    """
    if os.environ.get("CWBR_TRITON_AUTOTUNE") != "1":
        return candidates[0]
    key = f"{name} {architecture(mean.device)} {mean.dtype} {(*mean.shape,)} {candidates}"
    file = Path(triton.knobs.cache.dir) / "cwbr_fused_autotune.json"
    if not _fastest and file.exists():
        _fastest.update(json.loads(file.read_text()))
    if key not in _fastest:
        times = [triton.testing.do_bench(partial(start, options)) for options in candidates]
        _fastest[key] = times.index(min(times))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_fastest))
    return candidates[_fastest[key]]
