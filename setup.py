"""Builds the compiled extensions; everything else is in pyproject.toml.

`cwbr_fused/_C` has the CPU kernels, `cwbr_fused/_cuda` the CUDA kernels: whatever becomes of the
second, the first is the same. The environment variable CWBR_BUILD says what to compile:
    auto  (default) the CPU kernels, and the CUDA kernels where nvcc and a CUDA build of torch are
          that fit each other; what cannot be built is left out with a warning, and the package
          works without it
    cpu   the CPU kernels
    cuda  the CPU and the CUDA kernels; needs the CUDA toolkit, but no GPU and any build of torch
    none  nothing
All but auto fail loudly. TORCH_CUDA_ARCH_LIST picks the GPU architectures.

The extensions use torch's stable ABI and Python's limited API: one build serves every Python, and
every torch from the version named in TORCH_TARGET_VERSION on.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from typing import Any

from setuptools import Command, Extension, find_packages, setup

MODES = ("auto", "cpu", "cuda", "none")
MODE = os.environ.get("CWBR_BUILD", "auto")
# Those of which the toolkit knows; newer ones run the last one's PTX.
CUDA_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
# cp.async came with 8.0.
OLDEST_ARCHITECTURE = 8.0
# The oldest torch whose stable ABI has what the sources call: 2.10.
TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"


def find_cuda_home() -> str | None:
    """The root of the CUDA toolkit: CUDA_HOME, or where nvcc says it is (it may be a script)."""
    if "CUDA_HOME" in os.environ or shutil.which("nvcc") is None:
        return os.environ.get("CUDA_HOME")
    plan = subprocess.run(["nvcc", "-dryrun", "-E", "x.cu"], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.+)$", plan.stderr, re.MULTILINE)
    return os.path.realpath(top.group(1)) if top else None


def cuda_toolkit() -> str | None:
    """The toolkit to compile csrc/cuda with; None: do not. In mode "cuda" None is an error."""
    cuda_home = find_cuda_home()
    if MODE == "cuda":
        if cuda_home is None:
            sys.exit("CWBR_BUILD=cuda: no CUDA toolkit; set CUDA_HOME or put nvcc on PATH")
        return cuda_home
    if MODE != "auto" or cuda_home is None:
        return None
    import torch

    if torch.version.cuda is None:
        return None
    refusal = cuda_refusal(cuda_home)
    if refusal is not None:
        print(f"WARNING: cwbr_fused is installed without CUDA kernels: {refusal}", file=sys.stderr)
        return None
    return cuda_home


def cuda_refusal(cuda_home: str) -> str | None:
    """Why a CUDA build of torch cannot have kernels of this toolkit; None where it can."""
    import torch

    release = re.search(r"release (\d+)\.", ask_nvcc(cuda_home, "--version"))
    if release is None or release[1] != str(torch.version.cuda).split(".")[0]:
        return f"torch was built with CUDA {torch.version.cuda}, unlike {cuda_home}"
    return None


def ask_nvcc(cuda_home: str, *question: str) -> str:
    return subprocess.check_output([os.path.join(cuda_home, "bin", "nvcc"), *question], text=True)


def cuda_architectures(cuda_home: str) -> str:
    """TORCH_CUDA_ARCH_LIST, or what this toolkit knows of CUDA_ARCHITECTURES, as such a list."""
    if "TORCH_CUDA_ARCH_LIST" in os.environ:
        listed = os.environ["TORCH_CUDA_ARCH_LIST"]
        for number in re.findall(r"\d+\.\d+", listed):
            if float(number) < OLDEST_ARCHITECTURE:
                sys.exit(
                    f"TORCH_CUDA_ARCH_LIST: expected architectures from {OLDEST_ARCHITECTURE} on, "
                    f"got {number}, which has no asynchronous copies to shared memory"
                )
        return listed
    known = ask_nvcc(cuda_home, "--list-gpu-arch").split()
    chosen = [a for a in CUDA_ARCHITECTURES if f"compute_{a.replace('.', '')}" in known]
    return ";".join(chosen) + "+PTX"


def extensions() -> tuple[list[Extension], type[Command]]:
    """The extension modules, and the command that builds them."""
    toolkit = cuda_toolkit()
    from torch.utils import cpp_extension

    class BuildOrWarn(cpp_extension.BuildExtension):
        """In mode "auto" a failed compilation becomes a warning and leaves its extension out."""

        def build_extensions(self) -> None:
            for _ in range(len(self.extensions)):
                try:
                    super().build_extensions()
                    break
                except Exception as error:
                    if MODE != "auto":
                        raise
                    warn_left_out(self.extensions.pop().name, error)  # CUDA's come last

    modules = [cpu_extension(cpp_extension)]
    if toolkit:
        modules.append(cuda_extension(cpp_extension, toolkit))
    return modules, BuildOrWarn


def headers() -> list[str]:
    return [f for f in glob("csrc/**/*.*", recursive=True) if not f.endswith(".cpp")]


def cpu_extension(cpp_extension: Any) -> Extension:
    # -O3, whatever a distribution asks for, but for what is never shipped: -O0 compiles in a fifth
    # of the time.
    level = re.findall(r"-O[01]\b", os.environ.get("CFLAGS", ""))[-1:] or ["-O3"]
    # Vectors are passed between inlined functions alone, which no ABI concerns: -Wno-psabi.
    unix = [*level, "-g0", "-fvisibility=hidden", "-Wno-psabi"]
    return cpp_extension.CppExtension(
        "cwbr_fused._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")),
        depends=headers(),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args=[TARGET, *(["/O2"] if os.name == "nt" else unix)],
        py_limited_api=True,
    )


def cuda_extension(cpp_extension: Any, toolkit: str) -> Extension:
    """Not torch's CUDAExtension: that links to libraries which a CPU build of torch does not have.

    The CUDA runtime is linked statically, so that this one loads there, too.
    """
    architectures = cuda_architectures(toolkit)
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    cpp_extension.CUDA_HOME = toolkit  # a CPU build of torch does not look for it
    return cpp_extension.CppExtension(
        "cwbr_fused._cuda",
        ["csrc/cuda_operations.cu"],
        depends=headers(),
        include_dirs=[os.path.abspath("csrc"), os.path.abspath("csrc/cuda")],
        extra_compile_args={
            "cxx": [TARGET],
            # One thread per architecture, up to the processors there are.
            "nvcc": [
                TARGET,
                f'-DCWBR_CUDA_ARCHITECTURES="{architectures}"',
                *("-O3", "-std=c++20", "--threads=0", "-Xcompiler=-fvisibility=hidden"),
            ],
        },
        # lib64 in an installed toolkit, lib in NVIDIA's wheels.
        library_dirs=[os.path.join(toolkit, lib) for lib in ("lib64", "lib")],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        py_limited_api=True,
    )


def warn_left_out(name: str, reason: Exception) -> None:
    if name.endswith("_cuda"):
        print(f"WARNING: cwbr_fused is installed without CUDA kernels: {reason}", file=sys.stderr)
        return
    print(
        f"WARNING: cwbr_fused is installed without compiled kernels: {reason}\n"
        "WARNING: everything works, slower, in pure PyTorch. Install a C++20 compiler and install "
        "again for the fast kernels; CWBR_BUILD=cpu shows the full error, CWBR_BUILD=none "
        "silences this warning.",
        file=sys.stderr,
    )


def compiled() -> dict[str, Any]:
    """Arguments of `setup` that concern the extensions."""
    if MODE not in MODES:
        sys.exit(f"CWBR_BUILD: expected one of {MODES}, got {MODE!r}")
    if MODE == "none":
        return {}
    try:
        modules, command = extensions()
    except ImportError as error:
        if MODE != "auto":
            raise
        warn_left_out("cwbr_fused._C", error)
        return {}
    return {
        "ext_modules": modules,
        "cmdclass": {"build_ext": command},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["cwbr_fused*"]), "cwbr_fused.triton_kernels"],
    package_dir={"cwbr_fused": "cwbr_fused", "cwbr_fused.triton_kernels": "triton_kernels"},
    package_data={"cwbr_fused": ["py.typed", "diagnostics/*.html"]},
    **compiled(),
)
