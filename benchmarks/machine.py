"""What this machine can do at most: fused multiply-adds and memory traffic, by a compiled loop."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

from benchmarks.measure import seconds

# Twelve independent chains hide the latency of two FMA units (4 cycles each) in vectors of the
# machine's widest kind. The compiler contracts x * a + b to one FMA.
SOURCE = r"""
#include <cstddef>
#include <cstdint>
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));

extern "C" int lanes() { return kLanes; }

extern "C" float multiply_add(int64_t steps, float a, float b) {
  constexpr int kChains = 12;
  Vector x[kChains];
  for (int c = 0; c < kChains; ++c) x[c] = Vector{} + float(c);
  for (int64_t step = 0; step < steps; ++step) {
#pragma GCC unroll 12
    for (int c = 0; c < kChains; ++c) x[c] = x[c] * a + b;
  }
  Vector sum{};
  for (int c = 0; c < kChains; ++c) sum += x[c];
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  return total;
}

extern "C" void triad(float* x, const float* y, const float* z, int64_t n, float a) {
  for (int64_t i = 0; i < n; ++i) x[i] = y[i] + a * z[i];
}
"""
CHAINS = 12


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "machine.cpp", Path(folder) / "machine.so"
        source.write_text(SOURCE)
        flags = ["-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True)
        loaded = ctypes.CDLL(str(library))
    loaded.multiply_add.restype = ctypes.c_float
    loaded.multiply_add.argtypes = [ctypes.c_int64, ctypes.c_float, ctypes.c_float]
    pointers = [ctypes.c_void_p] * 3
    loaded.triad.argtypes = [*pointers, ctypes.c_int64, ctypes.c_float]
    return loaded


def lanes() -> int:
    """Floats in a vector."""
    count: int = _library().lanes()
    return count


def _best(threads: int, call: object) -> float:
    """Seconds of the best of several runs in which every thread does `call(thread)`."""
    assert callable(call)
    with ThreadPoolExecutor(threads) as pool:
        return min(seconds(lambda: list(pool.map(call, range(threads)))) for _ in range(7))


@cache
def vector_fmas_per_second(threads: int = 1) -> float:
    """Peak rate of vector FMAs, all threads together."""
    steps = 1_000_000
    best = _best(threads, lambda _: _library().multiply_add(steps, 0.999, 0.5))
    return threads * steps * CHAINS / best


def bytes_per_second(working_set: int, threads: int = 1) -> float:
    """Triad bandwidth, x = y + a z, on arrays of `working_set` bytes in all: a cache that holds
    them helps here as it helps a kernel of that size. Counted as 12 bytes per element."""
    count = max(1024, working_set // 12 // threads)
    arrays = [[torch.ones(count) for _ in range(3)] for _ in range(threads)]
    repeats = max(1, 2**24 // count)

    def run(thread: int) -> None:
        x, y, z = (array.data_ptr() for array in arrays[thread])
        for _ in range(repeats):
            _library().triad(x, y, z, count, 0.5)

    return threads * repeats * count * 12 / _best(threads, run)
