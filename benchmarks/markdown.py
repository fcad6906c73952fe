"""Tables in Markdown: every one of the benchmarks is written here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """One line of text for each row, under the header."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def insert_table(readme: str, name: str, table: str) -> str:
    """`readme` with `table` between `<!-- name:start -->` and `<!-- name:end -->`.

    Raises:
        ValueError: it lacks them.
    """
    start, end = f"<!-- {name}:start -->", f"<!-- {name}:end -->"
    pattern = re.compile(f"({re.escape(start)}\n).*?({re.escape(end)})", re.DOTALL)
    if len(pattern.findall(readme)) != 1:
        raise ValueError(f"expected {start} and {end} once in the README")
    return pattern.sub(lambda m: m[1] + table + m[2], readme)
