"""The house in order: imports point one way, one name for one operation, files that can be read."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cwbr_fused.operations import schema

CHECKOUT = Path(__file__).parent.parent
PACKAGE = CHECKOUT / "cwbr_fused"
KERNELS = CHECKOUT / "triton_kernels"
# A room imports rooms of lower floors only, and is free within itself.
FLOORS = (
    {"diagnostics", "info", "integrations", "warming"},
    {"balanced", "overlap"},
    {"inputs"},
    {"operations"},
)
# Files that only show names of the rooms under the names that users know.
FRONT = {"__init__", "backends", "functional", "reference"}
# What the file of an operation may hold beside it.
COMPANIONS = ("_backward", "_with_gradient")
FORWARD = sorted(name for name in schema.SCHEMAS if not name.endswith(COMPANIONS))


def rooms() -> dict[str, list[Path]]:
    """The files of each room."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        found.setdefault(path.relative_to(PACKAGE).parts[0].removesuffix(".py"), []).append(path)
    return {name: paths for name, paths in found.items() if name not in FRONT}


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


def entered(path: Path) -> set[str]:
    """The rooms whose files a file imports."""
    parts = (name.split(".") for name in imported(path))
    return {name[1] for name in parts if name[0] == "cwbr_fused" and len(name) > 1}


def test_every_room_has_its_floor() -> None:
    assert sorted(name for floor in FLOORS for name in floor) == sorted(rooms())


@pytest.mark.parametrize("name", sorted(rooms()))
def test_imports_point_one_way(name: str) -> None:
    floor = next(index for index, floor in enumerate(FLOORS) if name in floor)
    allowed = {name}.union(*FLOORS[floor + 1 :])
    for path in rooms()[name]:
        elsewhere = entered(path) - allowed
        assert not elsewhere, f"{path.relative_to(CHECKOUT)} imports {sorted(elsewhere)}"


def test_no_import_of_the_package_hides_in_a_function() -> None:
    optional = {"figure", "page"}  # load matplotlib and Jinja2
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef))
        hidden = {
            alias.name
            for function in functions
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cwbr_fused")
            for alias in node.names
        }
        assert hidden <= optional, f"{path.relative_to(CHECKOUT)} imports {sorted(hidden)}"


def test_kernels_know_nothing_of_the_package_and_the_package_nothing_of_what_uses_it() -> None:
    for path in KERNELS.glob("*.py"):
        others = entered(path) - {"triton_kernels"}
        assert not others, f"{path.name} imports {sorted(others)}"
    for path in (*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py")):
        roots = {name.split(".")[0] for name in imported(path)}
        assert not roots & {"benchmarks", "examples", "fgvc", "tests"}, path


@pytest.mark.parametrize("name", FORWARD)
def test_an_operation_has_one_file_of_its_name_in_each_room(name: str) -> None:
    assert (KERNELS / f"{name}.py").exists()
    assert (CHECKOUT / "csrc" / "cpu" / f"{name}.cpp").exists()
    assert (CHECKOUT / "csrc" / "cuda" / f"{name}.cuh").exists()
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
