"""What a release promises about itself: its report, its documentation, what it runs on."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import cwbr_fused
from cwbr_fused import backends
from cwbr_fused.info import OVERRIDES
from cwbr_fused.operations import extension

CHECKOUT = Path(__file__).parents[2]
PYTHON_SOURCES = [
    path
    for folder in ("cwbr_fused", "triton_kernels")
    for path in (CHECKOUT / folder).rglob("*.py")
]
CPP_SOURCES = [path for path in (CHECKOUT / "csrc").rglob("*.*") if path.is_file()]


# ---- python -m cwbr_fused.info


def report(**environment: str) -> str:
    command = [sys.executable, "-m", "cwbr_fused.info"]
    merged = {k: v for k, v in os.environ.items() if k not in OVERRIDES} | environment
    return subprocess.run(
        command, env=merged, check=True, capture_output=True, text=True, cwd=CHECKOUT
    ).stdout


def test_report_tells_versions_backends_and_reasons() -> None:
    text = report()
    assert f"cwbr_fused    {cwbr_fused.__version__} in " in text
    assert torch.__version__ in text
    assert "overrides     none" in text
    for device_type in ("cpu", "cuda"):
        for name in backends.NAMES:
            reason = backends.rejection(name, device_type)
            if name != "triton":  # usable on the CPU only where TRITON_INTERPRET is set
                assert (reason or "") in text


def test_report_names_the_overrides_in_force_even_impossible_ones() -> None:
    text = report(CWBR_BACKEND="cuda")
    assert "overrides     CWBR_BACKEND=cuda" in text
    assert "got 'cuda': it serves tensors on 'cuda', not on 'cpu'" in text


@pytest.mark.skipif(extension.missing("cpu") is not None, reason=str(extension.missing("cpu")))
def test_report_names_the_instruction_set_in_use() -> None:
    assert "cpu kernels   built, running on portable" in report(CWBR_CPU_ISA="portable")
    assert "cpu kernels   built, but CWBR_CPU_ISA: expected" in report(CWBR_CPU_ISA="nonsense")
    assert re.search(r"running on (avx512|avx2|portable)$", report(), re.MULTILINE)


def test_every_variable_that_the_package_reads_is_reported() -> None:
    read = set()
    for path in PYTHON_SOURCES + CPP_SOURCES:
        pattern = r"(?:getenv\(|environ(?:\.get\(|\[))\"([A-Z_]+)\""
        read |= set(re.findall(pattern, path.read_text()))
    assert read == set(OVERRIDES)


# ---- documentation


def public_modules() -> list[str]:
    """Importable without an optional library; the Triton kernels document themselves by schema."""
    package = Path(cwbr_fused.__file__).parent
    names = [
        ".".join(path.relative_to(package.parent).with_suffix("").parts)
        for path in sorted(package.rglob("*.py"))
        if path.stem not in ("lightning", "huggingface")
    ]
    return [name.removesuffix(".__init__") for name in names if "triton_kernels" not in name]


@pytest.mark.parametrize("name", public_modules())
def test_every_public_name_has_a_docstring(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__
    for member_name, member in vars(module).items():
        own = getattr(member, "__module__", None) == name
        if (
            member_name.startswith("_")
            or not own
            or not (inspect.isclass(member) or inspect.isfunction(member))
        ):
            continue
        assert inspect.getdoc(member), f"{name}.{member_name}"
        for attribute_name, attribute in vars(member).items():
            if inspect.isfunction(attribute) and not attribute_name.startswith("_"):
                # autograd Functions are documented by their class
                if issubclass(member, torch.autograd.Function):
                    continue
                assert inspect.getdoc(attribute), f"{name}.{member_name}.{attribute_name}"


def test_the_api_page_has_every_public_name() -> None:
    page = (CHECKOUT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))
    for name in cwbr_fused.__all__:
        value = getattr(cwbr_fused, name)
        assert {f"cwbr_fused.{name}", value.__name__, *_homes(value)} & listed, name


def _homes(module: object) -> set[str]:
    """The modules whose names a front module shows."""
    names = getattr(module, "__all__", dir(module))
    return {str(getattr(getattr(module, name), "__module__", "")) for name in names}


# ---- older Pythons and torches


def other_python(version: str) -> str | None:
    """A working interpreter of that version, from PATH or from pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [shutil.which(f"python{version}"), *pyenv.glob(f"{version}.*/bin/python")]
    for python in filter(None, found):
        if subprocess.run([python, "-c", ""], capture_output=True).returncode == 0:
            return str(python)
    return None


@pytest.mark.parametrize("version", ["3.10", "3.12", "3.13", "3.14"])
def test_the_sources_compile_on_other_pythons(version: str) -> None:
    python = other_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    script = "import sys\nfor p in sys.argv[1:]: compile(open(p).read(), p, 'exec')"
    subprocess.run([python, "-c", script, *map(str, PYTHON_SOURCES)], check=True)


def test_the_sources_parse_as_the_oldest_python_that_is_promised() -> None:
    pyproject = (CHECKOUT / "pyproject.toml").read_text()
    declared = re.search(r'requires-python = ">=3\.(\d+)"', pyproject)
    assert declared is not None
    for path in PYTHON_SOURCES:
        ast.parse(path.read_text(), feature_version=(3, int(declared[1])))


OLD_TORCH = """
import sys, torch

# An extension built for a newer torch does not load on an older one.
def refuse(path):
    raise OSError(f"{path}: undefined symbol: torch_library_impl")
torch.ops.load_library = refuse
# A torch without torch.distributed, as some builds are.
import torch._dynamo  # needs the real one
import torch.distributed as dist
dist.is_available = lambda: False
for name in ("ProcessGroup", "group", "is_initialized", "all_reduce", "get_rank"):
    delattr(dist, name)
# Names that came after the oldest torch that is promised, or that its builds may lack.
for name in ("accelerator", "export"):
    if hasattr(torch, name):
        delattr(torch, name)
sys.modules["triton"] = None

import cwbr_fused
from cwbr_fused import backends, functional
assert "do not load" in backends.explain("cpu"), backends.explain("cpu")
z = torch.randn(12, 5, requires_grad=True)
y, logits = torch.arange(12) % 4, torch.randn(12, 4)
for options in ({}, {"top_m": None}, {"objective": "log_overlap", "top_m": 2}):
    value = cwbr_fused.loss([z, z], logits, y, **options)
    value.backward()
    torch.testing.assert_close(value, cwbr_fused.reference.loss([z, z], logits, y, **options))
classes, mu, var, counts, inv = functional.class_stats_diag(z, y)
functional.bhattacharyya_diag(mu, var)
list(cwbr_fused.PKSampler(y, 2, 2))
model = torch.nn.Sequential(torch.nn.Linear(5, 4))
with cwbr_fused.FeatureCatcher(model, ["0"]) as catcher:
    model(z)
assert catcher.feats["0"].shape == (12, 4)
"""


def test_everything_works_in_pure_python_on_a_poorer_torch() -> None:
    subprocess.run([sys.executable, "-c", OLD_TORCH], check=True, cwd=CHECKOUT)
