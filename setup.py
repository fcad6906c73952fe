"""Builds the compiled extension `cwbr_fused/_C`; everything else is in pyproject.toml.

The environment variable CWBR_BUILD says what to compile:
    auto  (default) the CPU kernels, and the CUDA kernels where nvcc and a CUDA build of torch are
          that fit each other; what cannot be built is left out with a warning, and the package
          works without it
    cpu   the CPU kernels
    cuda  the CPU and the CUDA kernels; needs the CUDA toolkit, but no GPU and any build of torch
    none  nothing
All but auto fail loudly. TORCH_CUDA_ARCH_LIST picks the GPU architectures.

The extension uses torch's stable ABI and Python's limited API: one build serves every Python, and
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
CUDA_ARCHITECTURES = "8.0;9.0;10.0"
# The oldest torch whose stable ABI has what the sources call.
TARGET_CPU, TARGET_CUDA = "0x020a000000000000", "0x020d000000000000"


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

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):
        return f"they need torch 2.13, and this is {torch.__version__}"
    nvcc = [os.path.join(cuda_home, "bin", "nvcc"), "--version"]
    release = re.search(r"release (\d+)\.", subprocess.check_output(nvcc, text=True))
    if release is None or release[1] != str(torch.version.cuda).split(".")[0]:
        return f"torch was built with CUDA {torch.version.cuda}, unlike {cuda_home}"
    return None


def extension() -> tuple[Extension, type[Command]]:
    """The extension module, and the command that builds it."""
    toolkit = cuda_toolkit()
    from torch.utils import cpp_extension

    sources = glob("csrc/*.cpp") + glob("csrc/cpu/*.cpp")
    if toolkit:
        sources.append("csrc/cuda_kernels.cu")
        cpp_extension.CUDA_HOME = toolkit  # a CPU build of torch does not look for it
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)

    class BuildOrWarn(cpp_extension.BuildExtension):
        """In mode "auto" a failed compilation becomes a warning and leaves the extension out."""

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                if MODE != "auto":
                    raise
                self.extensions.clear()
                warn_left_out(error)

    target = [f"-DTORCH_TARGET_VERSION={TARGET_CUDA if toolkit else TARGET_CPU}"]
    # -O3, whatever a distribution asks for, but for what is never shipped: -O0 compiles in a fifth
    # of the time.
    level = re.findall(r"-O[01]\b", os.environ.get("CFLAGS", ""))[-1:] or ["-O3"]
    # Vectors are passed between inlined functions alone, which no ABI concerns: -Wno-psabi.
    unix = [*level, "-g0", "-fvisibility=hidden", "-Wno-psabi"]
    optimize = ["/O2"] if os.name == "nt" else unix
    # The CUDA runtime is linked statically, so that the library also loads where there is none.
    runtime = ["cudart_static", "rt", "dl", "pthread"] if toolkit else []
    module = cpp_extension.CppExtension(
        "cwbr_fused._C",
        sorted(sources),
        depends=[f for f in glob("csrc/**/*.*", recursive=True) if not f.endswith(".cpp")],
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args={
            "cxx": [*target, *optimize],
            # One thread per architecture, up to the processors there are.
            "nvcc": [*target, "-DUSE_CUDA", "-O3", "-std=c++20", "--threads=0"],
        },
        # lib64 in an installed toolkit, lib in NVIDIA's wheels.
        library_dirs=[os.path.join(toolkit, lib) for lib in ("lib64", "lib")] if toolkit else [],
        libraries=runtime,
        py_limited_api=True,
    )
    return module, BuildOrWarn


def warn_left_out(reason: Exception) -> None:
    print(
        f"WARNING: cwbr_fused is installed without compiled kernels: {reason}\n"
        "WARNING: everything works, slower, in pure PyTorch. Install a C++20 compiler and install "
        "again for the fast kernels; CWBR_BUILD=cpu shows the full error, CWBR_BUILD=none "
        "silences this warning.",
        file=sys.stderr,
    )


def compiled() -> dict[str, Any]:
    """Arguments of `setup` that concern the extension."""
    if MODE not in MODES:
        sys.exit(f"CWBR_BUILD: expected one of {MODES}, got {MODE!r}")
    if MODE == "none":
        return {}
    try:
        module, command = extension()
    except ImportError as error:
        if MODE != "auto":
            raise
        warn_left_out(error)
        return {}
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": command},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["cwbr_fused*"]), "cwbr_fused.triton_kernels"],
    package_dir={"cwbr_fused": "cwbr_fused", "cwbr_fused.triton_kernels": "triton_kernels"},
    package_data={"cwbr_fused": ["py.typed"]},
    **compiled(),
)
