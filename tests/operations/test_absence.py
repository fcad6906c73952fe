"""Compiled kernels that are absent say so once, with the reason and the remedy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import cwbr_fused
from cwbr_fused.operations import absence, backends, extension

REASON = "the cpu kernels were not built (see CWBR_BUILD in the docs)"


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without compiled kernels that has not warned yet."""
    monkeypatch.setattr(extension, "_missing", {"cpu": REASON, "cuda": "not built"})
    monkeypatch.setattr(absence, "_said", set())
    monkeypatch.delenv("CWBR_BACKEND", raising=False)


def call(backend: str = "auto") -> torch.Tensor:
    targets = torch.arange(8) % 2
    return cwbr_fused.loss(torch.randn(8, 3), torch.randn(8, 2), targets, backend=backend)


@pytest.mark.usefixtures("no_kernels")
def test_the_first_call_says_once_what_is_absent_why_and_what_to_do() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
        call()
        cwbr_fused.CWBR(2)(torch.randn(8, 3), torch.randn(8, 2), torch.arange(8) % 2)
    about = [str(w.message) for w in caught if "plain PyTorch" in str(w.message)]
    assert len(about) == 1
    assert f"its cpu kernels: {REASON}. Remedy: install a C++20 compiler" in about[0]


@pytest.mark.usefixtures("no_kernels")
def test_who_asks_for_the_reference_or_for_an_explanation_is_not_warned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", cwbr_fused.CWBRWarning)
        call("reference")
        assert REASON in backends.explain("cpu")
        assert backends.resolve("auto", "meta") == "reference"
        monkeypatch.setenv("CWBR_BACKEND", "reference")
        call()


@pytest.mark.usefixtures("no_kernels")
def test_a_gpu_that_has_triton_is_not_warned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_triton_rejection", lambda device: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", cwbr_fused.CWBRWarning)
        assert backends.resolve("auto", "cuda") == "triton"
    monkeypatch.setattr(backends, "_triton_rejection", lambda device: "not installed")
    with pytest.warns(cwbr_fused.CWBRWarning, match="slower than its cuda kernels"):
        assert backends.resolve("auto", "cuda") == "reference"


@pytest.mark.usefixtures("no_kernels")
def test_torch_compile_traces_a_call_without_kernels_whole() -> None:
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert compiled().isfinite()


@pytest.mark.parametrize(
    ("reason", "expected"),
    [
        (REASON, "20 compiler and reinstall cwbr_fused .*CWBR_BUILD=cpu"),
        ("undefined symbol: aoti_torch_abi_version", "does not fit torch 2"),
        ("/lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "built on a newer system"),
        ("_C.abi3.so: invalid ELF header", "damaged or made for another kind of processor"),
        ("libc10.so: cannot open shared object file: No such file", "repair this installation"),
        ("something never seen", "reinstall cwbr_fused from its sources"),
    ],
)
def test_every_reason_has_a_remedy(reason: str, expected: str) -> None:
    assert re.search(expected, absence.remedy("cpu", reason))


def test_the_report_says_why_a_library_did_not_load_and_what_to_do(tmp_path: Path) -> None:
    package = Path(cwbr_fused.__file__).parent
    copy = tmp_path / "cwbr_fused"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("_C*", "_cuda*", "__pycache__"))
    (copy / "_C.abi3.so").write_text("no library at all, although it is long enough for its header")
    command = [sys.executable, "-m", "cwbr_fused.info"]
    report = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    (line,) = (x for x in report.stdout.splitlines() if x.startswith("cpu kernels "))
    assert "the compiled cpu kernels do not load: " in line
    assert "_C.abi3.so" in line
    assert "the file is damaged" in line
