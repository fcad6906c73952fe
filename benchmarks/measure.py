"""Clocks and counters: interleaved times, peak memory of a fresh process, dispatcher calls."""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parent.parent
# A timed sample repeats its call until it takes this long, a slower call is sampled once.
SAMPLE_SECONDS, SLOW_SECONDS = 1e-3, 2.0
ROUNDS = (3, 60)


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(call: Callable[[], object], device: str = "cpu", repeats: int = 1) -> float:
    """Wall time of one call, the mean of `repeats` in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleave(
    calls: Mapping[str, Callable[[], object]],
    budget: float,
    device: str = "cpu",
    known: Mapping[str, float] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each, in rounds that time every call once, from a rotating start.

    So a disturbance of the machine hits all alike, and sample r of one may be divided by sample r
    of another. A slow call leaves after fewer rounds than a fast one; one slower than SLOW_SECONDS
    is sampled once, before the rounds. They are expected to be warm.

    Args:
        calls: by name.
        budget: seconds per call to spend on its rounds; there are at least ROUNDS[0].
        known: seconds of an earlier call, of those whose earlier call was like every other.
    """
    known = known or {}
    once = {
        name: known[name] if known.get(name, 0) > SLOW_SECONDS else seconds(call, device)
        for name, call in calls.items()
    }
    samples = {name: [s] if s > SLOW_SECONDS else [] for name, s in once.items()}
    fast = [name for name in calls if not samples[name]]
    repeats = {name: max(1, round(SAMPLE_SECONDS / once[name])) for name in fast}
    rounds = {name: _rounds(once[name] * repeats[name], budget) for name in fast}
    gc.collect()
    gc.disable()
    try:
        for r in range(max(rounds.values(), default=0)):
            due = [name for name in fast if r < rounds[name]]
            first = r % len(due)
            for name in due[first:] + due[:first]:
                samples[name].append(seconds(calls[name], device, repeats[name]))
    finally:
        gc.enable()
    return samples


def _rounds(cost: float, budget: float) -> int:
    return int(min(max(budget / cost, ROUNDS[0]), ROUNDS[1]))


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    p20, *_, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), p20, p80


def ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds both took part in of samples / base; of one sample, of medians."""
    if min(len(samples), len(base)) == 1:
        return statistics.median(samples) / statistics.median(base)
    return statistics.median(s / b for s, b in zip(samples, base, strict=False))


def _kernel_bytes(path: str, field: str) -> int:
    match = re.search(rf"{field}:\s+(\d+) kB", Path(path).read_text())
    assert match is not None
    return int(match[1]) * 1024


def _status_bytes(field: str) -> int:
    return _kernel_bytes("/proc/self/status", field)


def available_bytes(device: str = "cpu") -> int:
    """Memory that can still be had; where the system does not say, all of it."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info()[0])
    if sys.platform != "linux":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return _kernel_bytes("/proc/meminfo", "MemAvailable")


def _reset_peak() -> None:
    """Hand freed memory back to the system, then restart the resident set's high-water mark."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def peak_extra_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """How far one call raises the memory in use above what it was before.

    On the CPU the resident set of the process, which also sees what a kernel allocates behind
    torch's back; torch's profiler would not. Linux lets the high-water mark be reset, elsewhere it
    can only rise (getrusage), and the answer is a lower bound. On a GPU the caching allocator's
    peak. Meaningful in a fresh process only: an earlier call may have left memory to reuse.
    """
    if device != "cpu":
        torch.accelerator.empty_cache()
        synchronize(device)
        allocated: int = torch.accelerator.memory_allocated()
        torch.accelerator.reset_peak_memory_stats()
        call()
        synchronize(device)
        peak: int = torch.accelerator.max_memory_allocated()
        return peak - allocated
    if sys.platform != "linux":
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        call()
        unit = 1 if sys.platform == "darwin" else 1024
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit
    _reset_peak()
    before = _status_bytes("VmRSS")
    call()
    return _status_bytes("VmHWM") - before


# Small blocks go back to the system too, so that none is reused unseen.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def in_fresh_process(module: str, *arguments: str, timeout: float) -> Any:
    """Run `python -m module arguments...` and return the JSON value of its last line of output.

    Raises:
        RuntimeError: it failed; with the end of what it said.
    """
    process = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=os.environ | MALLOC,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if process.returncode != 0:
        raise RuntimeError(f"{module} {arguments}: {process.stderr[-500:]}")
    return json.loads(process.stdout.splitlines()[-1])


def in_child(function: Callable[..., Any], *arguments: Any, timeout: float) -> Any:
    """`function(*arguments)` in a process of its own, forked from one that has only imports behind
    it: as fresh as `in_fresh_process`, without seconds of imports each time.

    Raises:
        RuntimeError: it failed, by its exception's text or its exit code, or took too long.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([function.__module__, "torch._inductor.compile_fx"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, function, arguments))
    # Read by the process that is forked, which the first call starts. A pool of compilers would not
    # outlive its child.
    with patch.dict(os.environ, MALLOC | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}):
        process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            process.kill()
            raise RuntimeError(f"no answer in {timeout:.0f} s")
        failed, value = receiver.recv()
    except EOFError:
        process.join()  # for the exit code
        raise RuntimeError(f"ended with exit code {process.exitcode}") from None
    finally:
        process.join()
    if failed:
        raise RuntimeError(value)
    return value


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """In the child: send (False, result) or (True, what went wrong)."""
    try:
        sender.send((False, function(*arguments)))
    except Exception as failure:
        sender.send((True, f"{type(failure).__name__}: {failure}"))


def _tensors(tree: object) -> list[torch.Tensor]:
    leaves = torch.utils._pytree.tree_leaves(tree)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


class CallCounter(TorchDispatchMode):
    """Counts the operations that reach a kernel; the largest tensor that one makes, not views."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.largest_elements = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors((args, kwargs))}
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                elements = storage.nbytes() // tensor.element_size()
                self.largest_elements = max(self.largest_elements, elements)
        return out


def count_calls(call: Callable[[], object]) -> int:
    """Dispatcher calls that one call makes, views and allocations included."""
    counter = CallCounter()
    with counter:
        call()
    return counter.calls


def count_launches(call: Callable[[], object]) -> int:
    """GPU kernels that one call launches."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
        torch.accelerator.synchronize()
    return sum(event.device_type.name == "CUDA" for event in profile.events())
