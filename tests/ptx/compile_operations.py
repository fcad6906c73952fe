"""Compiles every Triton operation for devices that are not there, at sizes where that may fail.

python tests/ptx/compile_operations.py --arch sm_90 --settings "one pair" prints a line of JSON for
each kernel compiled. Another Triton compiles where it is first on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
# Last, so that an installed package goes before the checkout's.
sys.path += [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "operations")]
os.environ["TRITON_INTERPRET"] = "0"

import torch  # noqa: E402
from arguments import SETTINGS, Sizes, operation_arguments  # noqa: E402
from triton.backends.nvidia.compiler import CUDABackend  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from benchmarks.gpu_report import compile_only  # noqa: E402
from benchmarks.gpu_report_cuda import resource_usage  # noqa: E402
from cwbr_fused.operations import extension  # noqa: E402

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# The size at which kernels have the tiles of real problems.
LARGE = Sizes(512, 2048, 1000, 64)


def stop_at_ptx() -> None:
    """Leaves out the assembler, half of the time. Takes a cache of its own: no machine code."""
    os.environ["TRITON_CACHE_DIR"] = str(ROOT / "build" / "ptx" / "triton")

    def make_cubin(self: Any, source: str, metadata: dict[str, Any], *_: Any) -> bytes:
        metadata["name"] = re.search(r"\.entry (\w+)", source)[1]  # type: ignore[index]
        return b""

    CUDABackend.make_cubin = make_cubin


def root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {error}"


def used(binary: Any) -> dict[str, int]:
    """Registers, and bytes of stack, of a compiled kernel; nothing where it stops at PTX."""
    if binary.hash not in _used:
        _used[binary.hash] = _read(binary.asm)
    return _used[binary.hash]


_used: dict[str, dict[str, int]] = {}


def _read(code: Any) -> dict[str, int]:
    if "amdgcn" in code:
        fields = {"registers": r"\.vgpr_count", "stack": r"\.private_segment_fixed_size"}
        return {k: int(re.findall(rf"{v}:\s*(\d+)", code["amdgcn"])[-1]) for k, v in fields.items()}
    if not code["cubin"]:
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code["cubin"])
        file.flush()
        ((_, usage),) = resource_usage(Path(file.name)).items()
    return {"registers": usage["REG"], "stack": usage["STACK"] + usage["LOCAL"]}


def compiled(arch: str, dtype: torch.dtype, sizes: Sizes) -> Iterator[dict[str, Any]]:
    """A row for each kernel that an operation launches, with `error` where it does not compile."""
    rows: list[dict[str, Any]] = []
    kernels = extension.triton_kernels()
    arguments = operation_arguments(dtype, "triton", sizes)
    with compile_only(arch):
        inner = JITFunction.run

        def run(kernel: Any, *args: Any, **options: Any) -> None:
            row = {"kernel": kernel.fn.__name__}
            try:
                binary = inner(kernel, *args, **options)
                row |= {"hash": binary.hash, **used(binary)}
            except Exception as error:
                row["error"] = root_cause(error)
            rows.append(row)

        JITFunction.run = run
        for name, given in arguments.items():
            getattr(kernels, name)(*given)
            yield from ({"operation": name, **row} for row in rows)
            rows.clear()


def main() -> None:
    settings = {**SETTINGS, "large": LARGE}
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_90"])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"])
    parser.add_argument("--settings", nargs="+", choices=settings, default=list(settings))
    parser.add_argument("--batch", nargs="+", type=int, help="odd settings with these batches")
    parser.add_argument("--ptx", action="store_true", help="leave out NVIDIA's assembler")
    options = parser.parse_args()
    if options.ptx:
        stop_at_ptx()
    chosen = {name: settings[name] for name in options.settings}
    if options.batch:
        chosen = {str(batch): Sizes(batch) for batch in options.batch}
    for arch in options.arch:
        for dtype in options.dtype:
            for setting, sizes in chosen.items():
                labels = {"arch": arch, "dtype": dtype, "setting": setting}
                for row in compiled(arch, DTYPES[dtype], sizes):
                    print(json.dumps(labels | row), flush=True)


if __name__ == "__main__":
    main()
