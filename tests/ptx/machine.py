"""The machine that runs PTX on the CPU: compiles it once, and runs kernels for the tests.

It sees what a kernel does wrong as compiled: an access outside of its tensors or misaligned, a
race, a barrier that not all reach; and it runs threads, warps and blocks in any order. It does not
see what only hardware does: time, caches, and what the assembler makes of the PTX.

Threads that store the same value at the same place do not race, though nothing orders their stores.
PTX promises a load the value of some store, but of none that another, known to come before the
load, has overwritten; it takes this back only where racing stores differ in size. A thread that
loads after a store of its own block, past a barrier, hence gets that store's value or the same one
of a later store. A store of another value is a race unless it comes after all of them.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import program
from torch import Tensor

SOURCES = Path(__file__).parent / "machine"
BUILD = Path(__file__).parents[2] / "build" / "ptx"
FLAGS = ("-std=c++20", "-O1", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing")


class KernelError(RuntimeError):
    """A kernel misused the GPU."""


class _Program(ctypes.Structure):
    _fields_ = [
        ("code", ctypes.c_char_p),
        ("count", ctypes.c_int64),
        ("frame", ctypes.c_char_p),
        ("frame_bytes", ctypes.c_int64),
        ("special", ctypes.c_int32 * 10),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint32 * 3),
        ("threads", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int64),
        ("parameters", ctypes.c_char_p),
        ("spans", ctypes.POINTER(ctypes.c_uint64)),
        ("n_spans", ctypes.c_int64),
        ("seed", ctypes.c_uint64),
        ("scattered", ctypes.c_int32),
        ("watch_races", ctypes.c_int32),
        ("approximation_error", ctypes.c_double),
        ("executed", ctypes.POINTER(ctypes.c_uint8)),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The machine, compiled unless build/ptx has it from the same sources and compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("the machine that runs PTX needs g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    sources = sorted(SOURCES.glob("*.*"))
    content = b"".join(path.read_bytes() for path in sources)
    key = hashlib.sha256(content + repr((FLAGS, version, os.uname().nodename)).encode())
    output = BUILD / f"machine-{key.hexdigest()[:16]}.so"
    if not output.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            made = Path(folder) / "machine.so"
            command = [compiler, *FLAGS, "-shared", "-fPIC", str(SOURCES / "machine.cpp")]
            subprocess.run([*command, "-o", str(made)], check=True)
            made.replace(output)
    loaded = ctypes.CDLL(str(output))
    loaded.run.restype = ctypes.c_char_p
    return loaded


def find_opcode(name: str) -> int:
    number: int = library().find_opcode(name.encode())
    return number


def translate(ptx: str, kernel: str) -> program.Program:
    return program.translate(ptx, kernel, find_opcode)


def without(original: program.Program, index: int) -> program.Program:
    """The program with one of its instructions left out."""
    size = len(original.code) // len(original.instructions)
    code = bytearray(original.code)
    code[index * size : index * size + 4] = find_opcode("nop").to_bytes(4, "little")
    # Nor does it wait for the lanes of its warp any more.
    code[index * size + 12 : index * size + 16] = (-1).to_bytes(4, "little", signed=True)
    return replace(original, code=bytes(code))


@dataclass
class Conditions:
    """Under which kernels run."""

    seed: int = 0
    scattered: bool = False  # whether lanes of a warp run one by one
    watch_races: bool = True
    approximation_error: float = 1.0  # in units of the largest that the PTX manual allows


def _span(tensor: Tensor) -> tuple[int, int, int]:
    """Begin and end of the memory that a view reaches, and the size of an element."""
    size = tensor.element_size()
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (reach + 1) * size if tensor.numel() else begin, size


def _merged(tensors: Iterable[Tensor]) -> list[tuple[int, int, int]]:
    """The spans of tensors; those that overlap are one."""
    spans: list[tuple[int, int, int]] = []
    for begin, end, size in sorted(_span(t) for t in tensors if t.numel()):
        if spans and begin < spans[-1][1]:
            first, last, granule = spans[-1]
            spans[-1] = (first, max(last, end), min(granule, size))
        else:
            spans.append((begin, end, size))
    return spans


def run(
    compiled: program.Program,
    grid: Sequence[int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[int],
    tensors: Iterable[Tensor],
    conditions: Conditions,
) -> None:
    """Runs a kernel on tensors of the CPU; arguments are its parameters, addresses among them.

    Raises:
        KernelError: with the instruction, and the line of Triton that it comes from.
    """
    values = [*arguments, *[0] * (len(compiled.parameters) - len(arguments))]  # scratch: none
    parameters = b"".join((value % 2**64).to_bytes(8, "little") for value in values)
    spans = _merged(tensors)
    flat = (ctypes.c_uint64 * (3 * len(spans)))(*(number for span in spans for number in span))
    code = _Program(
        compiled.code,
        len(compiled.instructions),
        compiled.frame,
        len(compiled.frame),
        (ctypes.c_int32 * 10)(*compiled.special),
    )
    launch = _Launch(
        (ctypes.c_uint32 * 3)(*grid, *[1] * (3 - len(grid))),
        threads,
        shared_bytes,
        parameters,
        flat,
        len(spans),
        conditions.seed,
        conditions.scattered,
        conditions.watch_races,
        conditions.approximation_error,
        (ctypes.c_uint8 * len(compiled.instructions)).from_buffer(compiled.executed),
    )
    pc, place = ctypes.c_uint32(), (ctypes.c_uint32 * 4)()
    failure: Any = library().run(ctypes.byref(code), ctypes.byref(launch), ctypes.byref(pc), place)
    if failure is not None:
        at = compiled.instructions[pc.value]
        where = f"block {tuple(place[:3])}, warp from thread {place[3]}"
        raise KernelError(f"{failure.decode()}; {at.source}: `{at.text}`, {where}")
