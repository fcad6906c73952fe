"""Compiles the CUDA kernels for the emulated GPU and calls them with tensors.

`Emulator` has every operation of `cwbr_fused.operations.schema.SCHEMAS`, under its name and with
its arguments. Each tensor is copied into memory that faults one byte past its end; results start as
NaN and must be what `schema.FAKES` says of them.

With CWBR_HARDWARE=1 the same calls go to the GPU of this machine: nvcc compiles the kernels as they
are, between guards of memory and without torch (`hardware.cu`).
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cwbr_fused.operations import schema

HERE = Path(__file__).parent
CSRC = HERE.parent.parent / "csrc"
KERNELS = CSRC / "cuda"
HARDWARE = os.environ.get("CWBR_HARDWARE") == "1"
# As in emulated_tensors.h.
DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.bool,
)


def compile_emulated(
    output: Path, *flags: str, kernels: Path = KERNELS, source: Path = HERE / "operations.cpp"
) -> Path:
    """The emulated kernels as a shared library (or a program, with such flags) at `output`."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the emulation of the CUDA kernels needs g++")
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]
    command += ["-march=native", "-ffp-contract=fast", "-Wno-unknown-pragmas", "-x", "c++"]
    command += [str(source), f"-I{HERE}", f"-I{kernels}", f"-I{CSRC}", "-o", str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


def compile_for_hardware(output: Path, architecture: str = "native") -> Path:
    """The kernels and their tests' C interface as nvcc compiles them, at `output`."""
    command = ["nvcc", "-std=c++20", "-O3", f"-arch={architecture}", "-shared"]
    command += ["-Xcompiler", "-fPIC", f"-I{HERE}", f"-I{KERNELS}", f"-I{CSRC}"]
    command += [str(HERE / "hardware.cu"), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="cwbr_emulation_")


@functools.cache
def emulated_library() -> Path:
    """The kernels as they are, compiled once in a session: emulated, or for this machine's GPU."""
    output = Path(_folder().name) / "kernels.so"
    return compile_for_hardware(output) if HARDWARE else compile_emulated(output, "-shared")


class EmulationError(RuntimeError):
    """A kernel misused the GPU: a barrier that not all reach, an index outside its tensor, ..."""


class _HostTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("sizes", ctypes.POINTER(ctypes.c_int64)),
        ("dim", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("written", ctypes.c_int32),
    )


class _Argument(ctypes.Structure):
    _fields_ = (
        ("tensors", ctypes.POINTER(_HostTensor)),
        ("count", ctypes.c_int64),
        ("whole", ctypes.c_int64),
        ("number", ctypes.c_double),
    )


def _host_tensor(tensor: Tensor, written: bool = False) -> _HostTensor:
    assert tensor.is_contiguous()
    sizes = (ctypes.c_int64 * tensor.dim())(*tensor.shape)
    dtype = DTYPES.index(tensor.dtype)
    return _HostTensor(tensor.data_ptr(), sizes, tensor.dim(), dtype, written)


def _host_tensors(tensors: Sequence[Tensor], written: bool = False) -> Any:
    return (_HostTensor * len(tensors))(*(_host_tensor(t, written) for t in tensors))


def _argument(value: Any, written: bool) -> _Argument:
    if isinstance(value, (Tensor, list, tuple)):
        tensors = [value] if isinstance(value, Tensor) else value
        return _Argument(_host_tensors(tensors, written), len(tensors), 0, 0.0)
    return _Argument(None, 0, int(value), float(value))


def _contiguous(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_contiguous(item) for item in value]
    return value.contiguous() if isinstance(value, Tensor) else value


def _flat(result: Any) -> list[Tensor]:
    if result is None or isinstance(result, Tensor):
        return [] if result is None else [result]
    return [tensor for part in result for tensor in _flat(part)]


def write_arguments(path: Path, args: Sequence[Any]) -> None:
    """The file of arguments that `races.cpp` reads."""
    parts = [struct.pack("q", len(args))]
    for value in _contiguous(args):
        tensors = _flat(value) if isinstance(value, (Tensor, list)) else []
        number = value if isinstance(value, (int, float)) else 0
        parts.append(struct.pack("qqd", len(tensors), int(number), float(number)))
        for t in tensors:
            sizes = (DTYPES.index(t.dtype), t.dim(), *t.shape)
            parts += [struct.pack(f"{len(sizes)}q", *sizes), t.numpy().tobytes()]
    path.write_bytes(b"".join(parts))


class Emulator:
    """The operations of `cwbr_fused.operations.schema.SCHEMAS` on an emulated GPU.

    Attributes:
        seed: picks the order of threads and blocks.
        processors: how many multiprocessors the GPU claims to have.
        mutant: the number of the planted defect that is awake, or -1.
        launches: how many kernels the last operation launched.
        scratch_bytes: what it borrowed beside its results.
    """

    def __init__(self, library: Path, processors: int = 4) -> None:
        self.library = ctypes.CDLL(str(library))
        self.library.run.restype = ctypes.c_char_p
        self.library.scratch_bytes.restype = ctypes.c_int64
        self.seed, self.processors, self.mutant = 0, processors, -1
        self.launches = self.scratch_bytes = 0

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name not in schema.SCHEMAS:
            raise AttributeError(name)
        return functools.partial(self._run, name)

    def _run(self, name: str, *args: Any) -> Any:
        """Operation `name`, which fills in what `schema.FAKES` has made room for."""
        result = schema.FAKES[name](*args)
        room = _flat(result)
        given = _contiguous(args)
        writes = schema.written(name)
        arguments = (_Argument * len(given))(
            *(_argument(value, i in writes) for i, value in enumerate(given))
        )
        self.library.configure(ctypes.c_uint64(self.seed), self.mutant, self.processors)
        failure = self.library.run(
            name.encode(),
            arguments,
            ctypes.c_int64(len(given)),
            _host_tensors(room),
            ctypes.c_int64(len(room)),
        )
        self.launches = self.library.launches()
        self.scratch_bytes = self.library.scratch_bytes()
        if failure is not None:
            raise EmulationError(failure.decode())
        return result
