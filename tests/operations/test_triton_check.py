"""`make gpu-check` as far as it goes without a GPU: a dry run on one tiny problem."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from triton_inputs import DEVICE

from benchmarks import gpu_check

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.skipif(DEVICE != "cpu", reason="with a GPU, run `make gpu-check` itself"),
]


def run(monkeypatch: pytest.MonkeyPatch, passed: bool, *options: str) -> int:
    """The exit status of `python -m benchmarks.gpu_check` with its slow parts left out."""
    monkeypatch.setattr(gpu_check, "run_tests", lambda select: (f"tests ran {select}", passed))
    monkeypatch.setattr(gpu_check, "PROVIDERS", ("plain", "cwbr triton", "cwbr cuda"))
    monkeypatch.setattr(sys, "argv", ["gpu_check", *options])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    return stopped.value.code if isinstance(stopped.value.code, int) else 2


def test_a_dry_run_checks_triton_and_says_it_is_no_result(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = ("--dry-run", "--out", str(tmp_path), "--only", "plain 8x4", "--pytest", "-x")
    assert run(monkeypatch, True, *options) == 0
    report = json.loads((tmp_path / "gpu_check.json").read_text())
    assert report["dry_run"]
    assert report["tests"] == "tests ran ['-x']"
    plain, triton, cuda = report["measured"]
    for row in (plain, triton):
        assert row["error"] < 1e-5
        assert len(row["forward"]) == len(row["step"]) == 3
        assert row["graph"] is None
    assert cuda["error"] is None
    assert "cuda" in cuda["note"]
    assert "the times say nothing" in (tmp_path / "gpu_check.md").read_text()


def test_failed_tests_fail_the_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = ("--dry-run", "--out", str(tmp_path), "--only", "nothing of that name")
    assert run(monkeypatch, False, *options) == 1


def test_a_wrong_or_broken_kernel_fails_the_check() -> None:
    wrong = gpu_check.Measured("w", "cwbr triton", error=float("nan"))
    broken = gpu_check.Measured("w", "cwbr cuda", error=1e-7, note="failed: RuntimeError: graph")
    right = gpu_check.Measured("w", "cwbr triton", error=1e-7)
    missing = gpu_check.Measured("w", "cwbr cuda", note="not built")
    peer = gpu_check.Measured("w", "plain compiled", note="failed: out of memory")
    assert [m.failed for m in (wrong, broken, right, missing, peer)] == [True, True, *[False] * 3]


def test_without_a_gpu_only_a_dry_run_with_a_folder_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run(monkeypatch, True) == 2
    assert run(monkeypatch, True, "--dry-run") == 2
