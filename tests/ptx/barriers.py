"""Barriers of a program, and which of them order nothing.

A barrier orders what threads did since the barriers before it and what they do until those after
it: nothing, where no access of the one side and of the other conflict. Two accesses conflict if
they are in the same memory and one of them is a write.
"""

from __future__ import annotations

from collections.abc import Iterator

from program import Instruction, Program

Accesses = set[tuple[str, bool]]  # (global or shared memory, whether it is a write)


def is_barrier(line: Instruction) -> bool:
    return line.opcode.startswith(("bar.", "barrier."))


def executed(program: Program) -> list[int]:
    """The barriers that some lane executed."""
    lines = enumerate(zip(program.instructions, program.executed, strict=True))
    return [i for i, (line, was) in lines if was and is_barrier(line)]


def _access(line: Instruction) -> Accesses:
    name, *modifiers = line.opcode.split(".")
    if name not in ("ld", "st", "atom", "red", "ldmatrix", "stmatrix") or "param" in modifiers:
        return set()
    space = "global" if "global" in modifiers else "shared"
    return {(space, not name.startswith("ld"))}


def _next(program: Program) -> list[list[int]]:
    """The instructions that may follow each one."""
    following = []
    for i, line in enumerate(program.instructions):
        here = [i + 1] if i + 1 < len(program.instructions) else []
        if line.opcode.startswith("bra"):
            target = program.labels[line.operands[0].lstrip("$")]
            here = [target] if line.guard is None else [target, *here]
        elif line.opcode in ("ret", "exit") and line.guard is None:
            here = []
        following.append(here)
    return following


def _previous(following: list[list[int]]) -> list[list[int]]:
    before: list[list[int]] = [[] for _ in following]
    for i, targets in enumerate(following):
        for target in targets:
            before[target].append(i)
    return before


def _reached(start: int, edges: list[list[int]], program: Program) -> Iterator[Instruction]:
    """What lies between a barrier and the nearest others that order as much, in one direction."""
    within_warp = ".warp" in program.instructions[start].opcode
    seen, to_visit = set(), [*edges[start]]
    while to_visit:
        i = to_visit.pop()
        if i in seen:
            continue
        seen.add(i)
        line = program.instructions[i]
        ends = is_barrier(line) and line.guard is None
        if ends and (within_warp or ".warp" not in line.opcode):
            continue
        yield line
        to_visit += edges[i]


def orders_nothing(program: Program, barrier: int) -> bool:
    """Whether the code itself shows that the barrier is not needed, whatever the sizes are."""
    following = _next(program)
    after: Accesses = set().union(*map(_access, _reached(barrier, following, program)))
    edges = _previous(following)
    before: Accesses = set().union(*map(_access, _reached(barrier, edges, program)))
    return not any(
        space == other and (writes or also) for space, writes in before for other, also in after
    )
