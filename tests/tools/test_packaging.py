"""What a user installs: each way to build, with and without a compiler, in an empty environment."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import setuptools
import torch

import cwbr_fused

CHECKOUT = Path(__file__).parents[2]
PARTS = ("setup.py", "build_backend.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")
PACKAGES = ("csrc", "cwbr_fused", "triton_kernels")
# What a build environment has: setuptools, and none of the interpreter's packages.
ISOLATED = """
import sys, sysconfig
sys.path = [path for path in sys.path if "site-packages" not in path] + [{setuptools!r}]
assert not any((__import__("pathlib").Path(path) / "torch").exists() for path in sys.path)
import build_backend
"""
# Prints the file of the package and the backend in use, and checks a value against the reference.
TRY_IT = """
import sys, torch, cwbr_fused
from cwbr_fused import backends, reference
from cwbr_fused.operations import extension
z, y = torch.randn(8, 5), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
logits = torch.randn(8, 4)
value = cwbr_fused.loss(z.requires_grad_(), logits, y)
value.backward()
torch.testing.assert_close(value, reference.loss(z, logits, y))
if importable := sys.argv[1:]:
    assert extension.triton_kernels().__name__ == importable[0]
print(cwbr_fused.__file__)
print(backends.explain("cpu"))
"""


def run(
    command: list[str | Path], cwd: Path, fails: bool = False, **environment: str | None
) -> str:
    """Both output streams of a command that must succeed, or fail."""
    merged = {**os.environ, "PYTHONPATH": None, **environment}
    result = subprocess.run(
        command,
        cwd=cwd,
        env={k: v for k, v in merged.items() if v is not None},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert (result.returncode != 0) == fails, result.stdout
    return result.stdout


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The files of the project without anything that was built in the checkout."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in PARTS:
        shutil.copy(CHECKOUT / name, copy)
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__", "_C*", "_cuda*")
        shutil.copytree(CHECKOUT / name, copy / name, ignore=ignored)
    return copy


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The Python of an empty environment that sees the packages of this one, but not cwbr_fused:
    an editable install beside them is not found through a path file."""
    home = tmp_path / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", home], tmp_path)
    interpreter = home / "bin" / "python"
    site = run([interpreter, "-c", "import site; print(site.getsitepackages()[0])"], tmp_path)
    borrowed = (path for path in sys.path if path.endswith("site-packages"))
    Path(site.strip(), "borrowed.pth").write_text("\n".join(borrowed))
    assert "ModuleNotFoundError" in run(
        [interpreter, "-c", "import torch; import cwbr_fused"], tmp_path, fails=True
    )
    return interpreter


def install(python: Path, what: list[str | Path], cwd: Path, **environment: str | None) -> str:
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-index"]
    return run([*pip, "--no-build-isolation", "--no-deps", "-v", *what], cwd, **environment)


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def build_wheel(source: Path, **environment: str | None) -> tuple[Path, str]:
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-v"]
    log = run([*pip, "-w", source.parent, source], source.parent, **environment)
    (wheel,) = source.parent.glob("*.whl")
    return wheel, log


def no_compiler(tmp_path: Path) -> dict[str, str | None]:
    """An environment in which no C++ compiler and no nvcc are found."""
    missing = str(tmp_path / "no-such-compiler")
    return {"PATH": str(Path(sys.executable).parent), "CXX": missing, "CC": missing}


def test_wheel_holds_every_module_and_no_source_of_kernels(source: Path) -> None:
    wheel, _ = build_wheel(source, CWBR_BUILD="none")
    assert wheel.name.endswith("-py3-none-any.whl")
    expected = {str(path.relative_to(CHECKOUT)) for path in (CHECKOUT / "cwbr_fused").rglob("*.py")}
    kernels = (CHECKOUT / "triton_kernels").glob("*.py")
    expected |= {f"cwbr_fused/triton_kernels/{path.name}" for path in kernels}
    expected |= {"cwbr_fused/py.typed", "cwbr_fused/diagnostics/page.html"}
    assert {n for n in names_in(wheel) if not n.split("/")[0].endswith(".dist-info")} == expected


def test_the_sdist_has_every_file_of_the_repository(tmp_path: Path) -> None:
    """So that the tests run from it; but for what only git itself reads."""
    listed = subprocess.run(["git", "ls-files"], cwd=CHECKOUT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("this is no checkout of the repository")
    script = f"import build_backend; build_backend.build_sdist({str(tmp_path)!r})"
    files = listed.stdout.split()
    for name in files:
        (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CHECKOUT / name, tmp_path / "copy" / name)
    run([sys.executable, "-c", script], tmp_path / "copy")
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert set(files) - held == set()


@pytest.mark.parametrize("editable", [False, True])
def test_install_without_kernels_works_from_anywhere(
    source: Path, python: Path, tmp_path: Path, editable: bool
) -> None:
    install(python, ["-e", source] if editable else [source], tmp_path, CWBR_BUILD="none")
    output = run([python, "-c", TRY_IT, "cwbr_fused.triton_kernels"], tmp_path)
    place, *explanation = output.splitlines()
    assert Path(place).is_relative_to(source if editable else python.parent.parent)
    assert any("were not built" in line for line in explanation if line.startswith("cpu"))
    assert any("chosen" in line for line in explanation if line.startswith("reference"))


def test_auto_without_a_compiler_warns_once_and_installs_a_working_package(
    source: Path, python: Path, tmp_path: Path
) -> None:
    log = install(python, [source], tmp_path, CWBR_BUILD=None, **no_compiler(tmp_path))
    assert log.count("cwbr_fused is installed without compiled kernels") == 1
    assert "were not built" in run([python, "-c", TRY_IT], tmp_path)


def test_an_explicit_mode_without_a_compiler_fails(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    log = run(command, source, fails=True, CWBR_BUILD="cpu", **no_compiler(tmp_path))
    assert "installed without compiled kernels" not in log


def test_cuda_without_a_toolkit_fails_and_says_what_is_missing(source: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext"]
    path = str(Path(sys.executable).parent)
    log = run(command, source, fails=True, CWBR_BUILD="cuda", CUDA_HOME=None, PATH=path)
    assert "CWBR_BUILD=cuda: no CUDA toolkit; set CUDA_HOME or put nvcc on PATH" in log


def test_auto_leaves_out_only_the_cuda_kernels_where_torch_has_another_cuda(
    source: Path, tmp_path: Path
) -> None:
    """A toolkit of CUDA 99 beside a torch that says it was built with 98.1."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text("#!/bin/sh\necho Cuda compilation tools, release 99.0, V99.0.1\n")
    nvcc.chmod(0o755)
    script = "import torch, setup; torch.version.cuda = '98.1'; print(setup.cuda_toolkit())"
    command = [sys.executable, "-c", f"import sys; sys.argv.append('--version'); {script}"]
    log = run(command, source, CWBR_BUILD="auto", CUDA_HOME=str(tmp_path / "cuda"))
    assert "without CUDA kernels: torch was built with CUDA 98.1, unlike" in log
    assert log.splitlines()[-1] == "None"


def test_an_unknown_mode_fails_and_names_the_modes(source: Path) -> None:
    command = [sys.executable, "setup.py", "--version"]
    log = run(command, source, fails=True, CWBR_BUILD="gpu")
    assert "CWBR_BUILD: expected one of ('auto', 'cpu', 'cuda', 'none'), got 'gpu'" in log


@pytest.fixture
def isolated(tmp_path: Path) -> str:
    """The first lines of a script that runs as in an isolated build environment."""
    environment = tmp_path / "build-environment"
    environment.mkdir()
    installed = Path(setuptools.__file__).parent
    for folder in (installed, installed.with_name("_distutils_hack")):
        (environment / folder.name).symlink_to(folder)
    return ISOLATED.format(setuptools=str(environment))


def test_an_isolated_build_finds_the_installed_torch_and_asks_for_no_other(
    source: Path, python: Path, isolated: str
) -> None:
    script = "import torch; print(build_backend.get_requires_for_build_wheel(), torch.__version__)"
    output = run([python, "-c", isolated + script], source, CWBR_BUILD=None)
    assert output.splitlines()[-1] == f"[] {torch.__version__}"


def test_an_isolated_build_asks_for_a_torch_only_to_compile(
    source: Path, python: Path, isolated: str
) -> None:
    for borrowed in python.parent.parent.glob("lib/*/site-packages/borrowed.pth"):
        borrowed.unlink()
    script = f"{isolated}print(build_backend.get_requires_for_build_wheel())"
    for mode, requires in ((None, ["torch>=2.10"]), ("cpu", ["torch>=2.10"]), ("none", [])):
        assert run([python, "-c", script], source, CWBR_BUILD=mode).strip() == str(requires)
    script = f"{isolated}print(build_backend.build_sdist('dist'))"
    sdist = run([python, "-c", script], source, CWBR_BUILD="cpu").splitlines()[-1]
    assert sdist == f"cwbr_fused-{cwbr_fused.__version__}.tar.gz"


@pytest.mark.slow
def test_sdist_to_wheel_to_empty_environment(source: Path, python: Path, tmp_path: Path) -> None:
    """One abi3 wheel, compiled from nothing but the sdist, whose C++ kernels are what runs."""
    script = f"import build_backend; build_backend.build_sdist({str(tmp_path)!r})"
    run([sys.executable, "-c", script], source)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    assert {p.name for p in (unpacked / "csrc").rglob("*.*")} == {
        p.name for p in (CHECKOUT / "csrc").rglob("*.*")
    }
    wheel, log = build_wheel(unpacked, CWBR_BUILD="cpu", CFLAGS="-O0")
    assert "-cp310-abi3-" in wheel.name
    assert "without compiled kernels" not in log
    assert "cwbr_fused/_C.abi3.so" in names_in(wheel)
    install(python, [wheel], tmp_path)
    place, *explanation = run([python, "-c", TRY_IT], tmp_path).splitlines()
    assert Path(place).is_relative_to(python.parent.parent)
    assert any("chosen" in line for line in explanation if line.startswith("cpu"))
