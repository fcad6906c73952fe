"""The choice of backend explains itself."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from cwbr_fused.operations import backends, extension


def test_auto_on_the_cpu_takes_the_compiled_kernels_else_the_reference() -> None:
    built = backends.rejection("cpu", "cpu") is None
    assert backends.resolve("auto", "cpu") == ("cpu" if built else "reference")


def test_auto_prefers_the_reference_to_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        backends, "rejection", lambda name, device: "no" if name in ("cpu", "cuda") else None
    )
    assert backends.resolve("auto", "cpu") == "reference"
    assert backends.resolve("auto", "cuda") == "triton"


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ("7.5", False),
        ("8.0", True),
        ("8.9", True),
        ("9.0", True),
        ("10.3", False),
        ("12.1", True),
        ("13.0", True),
    ],
)
def test_machine_code_runs_on_its_generation_and_ptx_on_later_ones(
    capability: str, runs: bool
) -> None:
    major, minor = map(int, capability.split("."))
    assert extension.runs_on("8.0;9.0a;12.0+PTX", (major, minor)) == runs


def test_a_gpu_that_the_cuda_kernels_were_not_built_for_is_left_to_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(extension, "_missing", {})
    monkeypatch.setattr(extension, "_architectures", "8.0;9.0")
    monkeypatch.setattr(backends, "_triton_rejection", lambda device: None)
    monkeypatch.setattr(extension, "_capabilities", [(9, 0)])
    assert backends.resolve("auto", "cuda") == "cuda"
    monkeypatch.setattr(extension, "_capabilities", [(9, 0), (12, 0)])
    assert backends.resolve("auto", "cuda") == "triton"
    assert re.search(r"cuda +rejected: .*built for .*8.0;9.0.* has 12.0", backends.explain("cuda"))
    with pytest.raises(ValueError, match=r"backend: expected .*'cuda': .* has 12\.0"):
        backends.resolve("cuda", "cuda")


def test_an_unknown_device_gets_the_reference() -> None:
    assert backends.resolve("auto", "meta") == "reference"


def test_environment_overrides_auto_but_no_explicit_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CWBR_BACKEND", "reference")
    assert backends.resolve("auto", "cpu") == "reference"
    monkeypatch.setenv("CWBR_BACKEND", "nonsense")
    assert backends.resolve("reference", "cpu") == "reference"
    with pytest.raises(ValueError, match=r"CWBR_BACKEND: expected 'auto' or one of .*'nonsense'"):
        backends.resolve("auto", "cpu")


def test_explain_has_a_verdict_for_every_backend() -> None:
    for device in ("cpu", "cuda"):
        lines = backends.explain(device).splitlines()
        assert [line.split()[0] for line in lines] == list(backends.NAMES)
        assert sum("chosen" in line for line in lines) == 1
        for line, name in zip(lines, backends.NAMES, strict=True):
            reason = backends.rejection(name, device)
            assert (reason or "") in line


@pytest.mark.triton
def test_importing_the_package_needs_no_triton() -> None:
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, cwbr_fused\n"
        "z, y = torch.randn(8, 3), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])\n"
        "assert cwbr_fused.loss(z, torch.randn(8, 4), y).isfinite()\n"
        "assert 'not installed' in cwbr_fused.backends.explain('cuda')\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.triton
def test_triton_kernels_that_cannot_be_imported_say_why_at_every_call() -> None:
    script = (
        "import importlib.util, sys\n"
        "from cwbr_fused.operations import extension\n"
        "importlib.util.find_spec = lambda name: None  # as in a checkout that is not installed\n"
        "def failure():\n"
        "    try: extension.triton_kernels()\n"
        "    except ImportError as error: return repr(error)\n"
        "sys.modules['triton'] = None\n"
        "first = failure()\n"
        "assert 'triton' in first, first\n"
        "assert failure() == first, failure()\n"
        "del sys.modules['triton']\n"
        "assert extension.triton_kernels().plan\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
