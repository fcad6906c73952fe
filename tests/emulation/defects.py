"""Plants a switchable defect at every place of the CUDA kernels where leaving something out hurts.

- Every barrier, and every wait for asynchronous copies: not executed.
- Every condition marked `// mask:`, each of its clauses in turn: taken to hold, or, where it guards
  a `return` or `continue`, not to hold. A `// clamp:` is left out.
- Every value marked `// neutral:`: all bits flipped.

All of them go into one copy of the sources; `emulation::mutant` says which one is awake.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from emulation.harness import KERNELS

# Marks that must be there; a kernel whose marks were lost would otherwise go unchecked.
KINDS = ("barrier", "wait", "mask", "clamp", "neutral")


@dataclass(frozen=True)
class Defect:
    """The text from `start` to `end` of a line, and what stands there with the defect planted."""

    number: int
    kind: str
    file: str
    line: int
    start: int
    end: int
    planted: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}-{self.kind}{self.number}"


# AWAKE stands for whether it is this defect's turn, \\1 for what the pattern's group has matched.
STATEMENTS = [
    ("barrier", r"(__syncthreads\(\);)", r"if (!AWAKE) \1"),
    ("barrier", r"(__syncthreads_or\((\w+)\))", r"(AWAKE ? \2 : \1)"),
    ("wait", r"(copy_async_wait\(\);)", r"if (!AWAKE) \1"),
    ("neutral", r"(?<= = )(.*)(?=;.*// neutral:)", r"(AWAKE ? emulation::spoiled(\1) : \1)"),
]


def _clauses(line: str) -> Iterator[re.Match[str]]:
    """The clauses, joined by && or ||, of the condition of the line's `if`."""
    start = line.index("if (") + 4
    depth, end = 1, start
    while depth:
        depth += {"(": 1, ")": -1}.get(line[end], 0)
        end += 1
    return re.compile(r"[^&|\s][^&|]*?(?= && | \|\| |$)").finditer(line, start, end - 1)


def _spans(line: str) -> Iterator[tuple[str, int, int, str]]:
    """(kind, start, end, text with a defect) of every defect in a line."""
    for kind, pattern, template in STATEMENTS:
        if match := re.search(pattern, line):
            yield kind, match.start(), match.end(), match.expand(template)
    marked = re.search(r"// (mask|clamp):", line)
    if marked:
        leaves = marked[1] == "clamp" or re.search(r"\b(return|continue);", line)
        for match in _clauses(line):
            planted = f"(!AWAKE && ({match[0]}))" if leaves else f"(AWAKE || ({match[0]}))"
            yield marked[1], match.start(), match.end(), planted


def find_defects() -> list[Defect]:
    found: list[Defect] = []
    for path in sorted(KERNELS.glob("*.cuh")):
        if path.name == "intrinsics.cuh":
            continue
        for number, line in enumerate(path.read_text().splitlines()):
            for kind, start, end, planted in _spans(line):
                found.append(Defect(len(found), kind, path.name, number + 1, start, end, planted))
    return found


def plant(defects: list[Defect], folder: Path) -> Path:
    """A copy of the kernels with all defects in it, asleep."""
    for path in KERNELS.glob("*.cuh"):
        lines = path.read_text().splitlines()
        for defect in sorted(defects, key=lambda d: -d.start):  # from the right: spans stay valid
            if defect.file == path.name:
                line = lines[defect.line - 1]
                planted = defect.planted.replace("AWAKE", f"(emulation::mutant == {defect.number})")
                lines[defect.line - 1] = line[: defect.start] + planted + line[defect.end :]
        (folder / path.name).write_text("\n".join(lines) + "\n")
    return folder
