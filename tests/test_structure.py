"""The house in order: imports point one way, one name for one operation, files that can be read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cwbr_fused import schema

CHECKOUT = Path(__file__).parent.parent
PACKAGE = CHECKOUT / "cwbr_fused"
KERNELS = CHECKOUT / "triton_kernels"
# A module imports those of later lines only; a folder is one entry, free within itself.
LAYERS = (
    {"info", "integrations"},
    {"cwbr", "diagnostics", "modules", "sampling"},
    {"balance", "bank", "health"},
    {"losses"},
    {"distributed"},
    {"functional"},
    {"backends", "ops", "validation"},
    {"schema"},
    {"reference_backward", "reference_bank"},
    {"reference"},
    {"extension", "features", "shrinkage", "soft_targets"},
)
# What the file of an operation may hold beside it.
COMPANIONS = ("_backward", "_with_gradient")
FORWARD = sorted(name for name in schema.SCHEMAS if not name.endswith(COMPANIONS))


def modules() -> dict[str, list[Path]]:
    """The files of each entry of LAYERS."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    del found["__init__"]  # the list of public names
    return found


def imported(path: Path) -> Iterator[str]:
    """Absolute dotted names of all imports in a file, those in functions and for types too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            within_kernels = node.level == 1 and path.parent == KERNELS
            assert node.level == 0 or within_kernels, f"{path}: a relative import"
            package = "triton_kernels." if within_kernels else ""
            yield from (f"{package}{node.module}.{alias.name}" for alias in node.names)


def entries(path: Path) -> set[str]:
    """The entries of LAYERS that a file imports."""
    parts = (name.split(".") for name in imported(path))
    return {name[1] for name in parts if name[0] == "cwbr_fused" and len(name) > 1}


def test_every_module_has_its_place() -> None:
    places = [name for layer in LAYERS for name in layer]
    assert sorted(places) == sorted(modules())


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_point_one_way(name: str) -> None:
    place = next(index for index, layer in enumerate(LAYERS) if name in layer)
    below = {name}.union(*LAYERS[place + 1 :])
    for path in modules()[name]:
        upwards = entries(path) - below
        assert not upwards, f"{path.relative_to(CHECKOUT)} imports {sorted(upwards)}"


def test_kernels_know_nothing_of_the_package_and_the_package_nothing_of_what_uses_it() -> None:
    for path in KERNELS.glob("*.py"):
        others = entries(path) - {"triton_kernels"}
        assert not others, f"{path.name} imports {sorted(others)}"
    for path in (*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py")):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"benchmarks", "examples", "fgvc", "tests"}, path


@pytest.mark.parametrize("name", FORWARD)
def test_an_operation_has_one_file_of_its_name_in_each_room(name: str) -> None:
    assert (KERNELS / f"{name}.py").exists()
    assert (CHECKOUT / "csrc" / "cpu" / f"{name}.cpp").exists()
    for suffix in ("cu", "cuh"):
        assert (CHECKOUT / "csrc" / "cuda" / f"{name}.{suffix}").exists()
    companions = {name + companion for companion in COMPANIONS}
    for operation in ({name} | companions) & schema.SCHEMAS.keys():
        assert callable(schema.pure_pytorch(operation))


def test_no_source_file_is_longer_than_four_hundred_lines() -> None:
    folders = ("benchmarks", "csrc", "cwbr_fused", "docs", "examples", "tests", "triton_kernels")
    sources = [
        path
        for folder in folders
        for path in (CHECKOUT / folder).rglob("*")
        if re.search(r"\.(py|cpp|h|cuh?)$", path.name)
    ]
    lengths = {str(p.relative_to(CHECKOUT)): len(p.read_text().splitlines()) for p in sources}
    assert not {path: length for path, length in lengths.items() if length > 400}
