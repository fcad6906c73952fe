"""Every error says where, what was expected and what came: "NAME: expected X, got Y"."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
GRAMMAR = re.compile(r"[^:]+: expected .+, got .", re.DOTALL)


def text(node: ast.expr) -> str:
    """A message as it is written, with {} for what is filled in."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(text(v) if isinstance(v, ast.Constant) else "{}" for v in node.values)
    return ast.unparse(node)


def errors(path: Path) -> Iterator[tuple[str, ast.expr]]:
    """Where each error with a message is raised, and the message."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            yield f"{path.relative_to(ROOT)}:{node.lineno}", node.exc.args[0]


def passes_on(node: ast.expr) -> bool:
    """Whether the message is one of the package itself, after the name of the argument."""
    last = node.values[-1] if isinstance(node, ast.JoinedStr) else node
    return isinstance(last, ast.FormattedValue) and ast.unparse(last.value) == "error"


def test_every_error_says_what_was_expected_and_what_came() -> None:
    files = [*ROOT.glob("cwbr_fused/**/*.py"), *ROOT.glob("triton_kernels/*.py")]
    found = [error for path in files for error in errors(path)]
    assert len(found) > 100
    wrong = [
        f"{where} {text(message)}"
        for where, message in found
        if not GRAMMAR.match(text(message)) and not passes_on(message)
    ]
    assert not wrong, "\n".join(wrong)
