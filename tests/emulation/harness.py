"""Compiles the CUDA kernels for the emulated GPU and calls them with tensors.

`Emulator` has a method for every operation, with the signature of `cwbr_fused.reference`. Each
tensor is copied into memory that faults one byte past its end, and results start as NaN.
"""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cwbr_fused.operations.reference import accumulation_dtype

HERE = Path(__file__).parent
KERNELS = HERE.parent.parent / "csrc" / "cuda"
DTYPES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


def compile_emulated(
    output: Path, *flags: str, kernels: Path = KERNELS, source: Path = HERE / "operations.cpp"
) -> Path:
    """The emulated kernels as a shared library (or a program, with such flags) at `output`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation of the CUDA kernels needs g++")
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    command += ["-march=native", "-ffp-contract=fast", "-Wno-unknown-pragmas", "-x", "c++"]
    command += [str(source), f"-I{HERE}", f"-I{kernels}", "-o", str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cwbr_emulation_")


@functools.cache
def emulated_library() -> Path:
    """The kernels as they are, compiled once in a session."""
    return compile_emulated(Path(_folder().name) / "kernels.so", "-shared")


class EmulationError(RuntimeError):
    """A kernel misused the GPU: a barrier that not all reach, an index outside its tensor, ..."""


class Emulator:
    """The operations of `cwbr_fused.operations.schema.SCHEMAS` on an emulated GPU.

    Attributes:
        seed: picks the order of threads and blocks.
        processors: how many multiprocessors the GPU claims to have.
        mutant: the number of the planted defect that is awake, or -1.
        launches: how many kernels the last operation launched.
    """

    def __init__(self, library: Path, processors: int = 4) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.failure.restype = ctypes.c_char_p
        self.library.guarded.restype = ctypes.c_void_p
        self.seed, self.processors, self.mutant, self.launches = 0, processors, -1, 0

    @contextmanager
    def _memory(self) -> Iterator[_Memory]:
        memory = _Memory(self.library)
        try:
            yield memory
        finally:
            memory.release()

    def _run(self, name: str, *args: Any) -> None:
        """Calls run_`name`; tensors marked by `_Result` are filled in."""
        self.library.configure(ctypes.c_uint64(self.seed), self.mutant, self.processors)
        with self._memory() as memory:
            converted = [memory.argument(arg) for arg in args]
            self.launches = getattr(self.library, f"run_{name}")(*converted)
            failure = self.library.failure()
            if failure is not None:
                raise EmulationError(failure.decode())
            memory.fetch()

    def group_by_class(
        self, targets: Tensor, min_count: int, num_classes: int = 2**39
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch = targets.shape[0]
        results = _new(targets, (batch,), (batch // min_count + 1,), (batch // min_count,))
        self._run("group_by_class", targets, batch, min_count, num_classes, *results)
        return _tensors(results)

    def class_moments(
        self, z: Tensor, order: Tensor, offsets: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        groups, (batch, dims) = offsets.shape[0] - 1, z.shape
        dtype = accumulation_dtype(z.dtype)
        results = _new(z, (groups, dims), (groups, dims), dtype=dtype)
        self._run(
            "class_moments", DTYPES[z.dtype], z, dims, order, offsets, groups, batch, eps, *results
        )
        return _tensors(results)

    def class_moments_backward(
        self,
        grad_mean: Tensor,
        grad_var: Tensor,
        z: Tensor,
        mean: Tensor,
        var: Tensor,
        order: Tensor,
        offsets: Tensor,
        eps: float,
    ) -> Tensor:
        groups, (batch, dims) = offsets.shape[0] - 1, z.shape
        results = _new(z, (batch, dims))
        inputs = (grad_mean, grad_var, z, dims, mean, var, order, offsets, groups, batch, eps)
        self._run("class_moments_backward", DTYPES[z.dtype], *inputs, *results)
        return results[0].tensor

    def confusion_weights(
        self, logits: Tensor, order: Tensor, offsets: Tensor, classes: Tensor
    ) -> Tensor:
        groups = classes.shape[0]
        results = _new(logits, (groups, groups), dtype=accumulation_dtype(logits.dtype))
        inputs = (logits, logits.shape[1], order, offsets, classes, groups)
        self._run("confusion_weights", DTYPES[logits.dtype], *inputs, *results)
        return results[0].tensor

    def top_pairs(self, alpha: Tensor, top_m: int) -> tuple[Tensor, Tensor]:
        groups = alpha.shape[0]
        chosen = min(top_m, groups * (groups - 1) // 2)
        pairs, weights = _Result(torch.empty(chosen, 2).long()), *_new(alpha, (chosen,))
        self._run("top_pairs", DTYPES[alpha.dtype], alpha, groups, chosen, pairs, weights)
        return pairs.tensor, weights.tensor

    def plan(
        self, logits: Tensor, targets: Tensor, top_m: int, min_count: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        batch, groups = targets.shape[0], targets.shape[0] // min_count
        chosen = min(top_m, groups * (groups - 1) // 2)
        results = _new(targets, (batch,), (groups + 1,), (groups,), (chosen, 2))
        results += _new(logits, (chosen,), dtype=accumulation_dtype(logits.dtype))
        inputs = (logits, logits.shape[1], targets, batch, min_count, chosen)
        self._run("plan", DTYPES[logits.dtype], *inputs, *results)
        return _tensors(results)

    def pair_distance(self, mean: Tensor, var: Tensor, pairs: Tensor, eps: float) -> Tensor:
        results = _new(mean, (pairs.shape[0],))
        inputs = (mean, var, *mean.shape, pairs, pairs.shape[0], eps)
        self._run("pair_distance", DTYPES[mean.dtype], *inputs, *results)
        return results[0].tensor

    def pair_distance_backward(
        self, grad: Tensor, mean: Tensor, var: Tensor, pairs: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        results = _new(mean, mean.shape, mean.shape)
        inputs = (grad, mean, var, *mean.shape, pairs, pairs.shape[0], eps)
        self._run("pair_distance_backward", DTYPES[mean.dtype], *inputs, *results)
        return _tensors(results)

    def all_pair_distance(self, mean: Tensor, var: Tensor, eps: float) -> Tensor:
        results = _new(mean, (mean.shape[0], mean.shape[0]))
        self._run("all_pair_distance", DTYPES[mean.dtype], mean, var, *mean.shape, eps, *results)
        return results[0].tensor

    def all_pair_distance_backward(
        self, grad: Tensor, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        results = _new(mean, mean.shape, mean.shape)
        inputs = (grad, mean, var, *mean.shape, eps)
        self._run("all_pair_distance_backward", DTYPES[mean.dtype], *inputs, *results)
        return _tensors(results)

    def weighted_overlap(
        self, mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool
    ) -> Tensor:
        results = _new(mean, ())
        inputs = (mean, var, alpha, *mean.shape, eps, int(log))
        self._run("weighted_overlap", DTYPES[mean.dtype], *inputs, *results)
        return results[0].tensor

    def weighted_overlap_backward(
        self,
        grad: Tensor,
        value: Tensor,
        mean: Tensor,
        var: Tensor,
        alpha: Tensor,
        eps: float,
        log: bool,
    ) -> tuple[Tensor, Tensor]:
        results = _new(mean, mean.shape, mean.shape)
        inputs = (grad, value, mean, var, alpha, *mean.shape, eps, int(log))
        self._run("weighted_overlap_backward", DTYPES[mean.dtype], *inputs, *results)
        return _tensors(results)

    def weighted_overlap_with_gradient(
        self, grad: Tensor, mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        results = _new(mean, (), mean.shape, mean.shape)
        inputs = (grad, mean, var, alpha, *mean.shape, eps, int(log))
        self._run("weighted_overlap_with_gradient", DTYPES[mean.dtype], *inputs, *results)
        return _tensors(results)

    def regularizer(
        self,
        features: Sequence[Tensor],
        order: Tensor,
        offsets: Tensor,
        pairs: Tensor,
        weights: Tensor,
        eps: float,
        log: bool,
    ) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
        groups, layers = offsets.shape[0] - 1, len(features)
        dims = torch.tensor([z.shape[1] for z in features])
        mean = [_new(weights, (groups, z.shape[1]))[0] for z in features]
        var = [_new(weights, (groups, z.shape[1]))[0] for z in features]
        value, distance = _new(weights, (), (layers, pairs.shape[0]))
        inputs = (list(features), dims, layers, order, offsets, groups, order.shape[0])
        inputs += (pairs, pairs.shape[0], weights, eps, int(log))
        dtype = DTYPES[features[0].dtype]
        self._run("regularizer", dtype, *inputs, value, mean, var, distance)
        return value.tensor, list(_tensors(mean)), list(_tensors(var)), distance.tensor

    def regularizer_backward(
        self,
        grad: Tensor,
        features: Sequence[Tensor],
        mean: Sequence[Tensor],
        var: Sequence[Tensor],
        distance: Tensor,
        order: Tensor,
        offsets: Tensor,
        pairs: Tensor,
        weights: Tensor,
        eps: float,
        log: bool,
    ) -> list[Tensor]:
        groups, layers = offsets.shape[0] - 1, len(features)
        dims = torch.tensor([z.shape[1] for z in features])
        grad_z = [_new(z, z.shape)[0] for z in features]
        inputs = (grad, list(features), dims, layers, list(mean), list(var), distance)
        inputs += (order, offsets, groups, order.shape[0], pairs, pairs.shape[0], weights)
        dtype = DTYPES[features[0].dtype]
        self._run("regularizer_backward", dtype, *inputs, eps, int(log), grad_z)
        return list(_tensors(grad_z))

    def top_confusions(
        self, logits: Tensor, targets: Tensor, seen: Tensor, top: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        batch, num_classes = logits.shape
        top = max(0, min(top, num_classes - 1))
        dtype = accumulation_dtype(logits.dtype)
        (index,) = _new(targets, (batch, top))
        weight, own = _new(logits, (batch, top), (batch,), dtype=dtype)
        inputs = (logits, batch, num_classes, targets, seen, top)
        self._run("top_confusions", DTYPES[logits.dtype], *inputs, index, weight, own)
        return index.tensor, weight.tensor, own.tensor

    def class_attraction(
        self, z: Tensor, mean: Tensor, var: Tensor, index: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch, count = index.shape
        results = _new(mean, (batch,), z.shape)
        inputs = (z, batch, mean, var, *mean.shape, index, coefficient, count)
        self._run("class_attraction", DTYPES[z.dtype], *inputs, *results)
        return _tensors(results)

    def observe_classes(
        self,
        mean: Tensor,
        count: Tensor,
        var: Tensor,
        updates: Tensor,
        classes: Tensor,
        size: Tensor,
        batch_mean: Tensor,
        batch_var: Tensor,
        momentum: float,
        floor: float,
    ) -> tuple[Tensor, Tensor]:
        groups = classes.shape[0]
        results = _new(mean, (groups,), (mean.shape[1],))
        inputs = (mean, count, *mean.shape, _Written(var), _Written(updates), classes, size)
        inputs += (batch_mean, batch_var, groups, float(momentum), float(floor))
        self._run("observe_classes", DTYPES[mean.dtype], *inputs, *results)
        return _tensors(results)

    def follow_classes(
        self,
        mean: Tensor,
        count: Tensor,
        classes: Tensor,
        weight: Tensor,
        batch_mean: Tensor,
        momentum: float,
    ) -> None:
        inputs = (_Written(mean), _Written(count), *mean.shape, classes, weight, batch_mean)
        inputs += (classes.shape[0], float(momentum))
        self._run("follow_classes", DTYPES[mean.dtype], *inputs)


class _Result:
    """A tensor that the call fills in."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class _Written(_Result):
    """A contiguous tensor that the call reads and writes."""


def _new(
    like: Tensor, *shapes: Sequence[int], dtype: torch.dtype | None = None
) -> tuple[_Result, ...]:
    return tuple(_Result(like.new_empty(tuple(s), dtype=dtype or like.dtype)) for s in shapes)


def _tensors(results: Sequence[_Result]) -> tuple[Any, ...]:
    return tuple(result.tensor for result in results)


class _Memory:
    """Guarded copies of the tensors of one call."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library = library
        self.owners: list[ctypes.c_void_p] = []
        self.results: list[tuple[Tensor, int]] = []

    def argument(self, value: Any) -> Any:
        if isinstance(value, float):
            return ctypes.c_double(value)
        if isinstance(value, int):
            return ctypes.c_int64(value)
        if isinstance(value, list):
            return (ctypes.c_void_p * len(value))(*(self.address(item) for item in value))
        return ctypes.c_void_p(self.address(value))

    def address(self, value: Tensor | _Result) -> int:
        tensor = value.tensor if isinstance(value, _Result) else value.contiguous()
        owner = ctypes.c_void_p()
        address = self.library.guarded(ctypes.c_size_t(tensor.nbytes), ctypes.byref(owner))
        self.owners.append(owner)
        if isinstance(value, _Result):
            assert tensor.is_contiguous()
            self.results.append((tensor, address))
        if isinstance(value, (Tensor, _Written)):
            ctypes.memmove(address, tensor.data_ptr(), tensor.nbytes)
        return int(address)

    def fetch(self) -> None:
        for tensor, address in self.results:
            ctypes.memmove(tensor.data_ptr(), address, tensor.nbytes)

    def release(self) -> None:
        for owner in self.owners:
            self.library.release(owner)
