"""PTX of one kernel as a program of the machine: instructions on registers, nothing left to parse.

A register has a place in a warp's frame, 32 lanes of its width. Constants have registers, too, and
so have `%tid.x` and its like, which the machine fills in.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

LANES = 32
# Widths in bytes of registers by the type that declares them, and of operands by the opcode's.
REGISTER_BYTES = {"pred": 1, "b8": 1, "b16": 2, "b32": 4, "b64": 8}
SPECIAL = (
    *(f"%tid.{axis}" for axis in "xyz"),
    "%ntid.x",
    *(f"%ctaid.{axis}" for axis in "xyz"),
    *(f"%nctaid.{axis}" for axis in "xyz"),
)
# Modifiers that say how to compile or to cache, or name what the machine always does.
IGNORED = re.compile(
    r"\.(sync|aligned|uni|relaxed|sys|gpu|cta|weak|rn|ca|cg|cs|cv|nc|wb|wt"
    r"|L1::\w+|L2::\w+|level::\w+)(?=\.|$)"
)
ORDERING = re.compile(r"\.(acq_rel|acquire|release)(?=\.|$)")


class TranslationError(ValueError):
    """PTX that the machine does not know."""


@dataclass(frozen=True)
class Instruction:
    """One line of PTX."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None  # such as "%p1" or "!%p1"
    source: str  # file and line in Triton's language
    text: str


@dataclass
class Program:
    """What `machine.cpp` runs, and what to say of an instruction that goes wrong."""

    code: bytes
    frame: bytes
    special: list[int]
    parameters: list[int]  # the width of each, in bytes
    instructions: list[Instruction]
    labels: dict[str, int]  # the number of the instruction that each stands before
    executed: bytearray = field(init=False)  # 1 for each instruction that some lane executed

    def __post_init__(self) -> None:
        self.executed = bytearray(len(self.instructions))


def _statements(body: str) -> Iterator[tuple[str, str]]:
    """(statement, source) without comments, declarations and directives."""
    source = "?"
    for line in body.splitlines():
        if match := re.match(r"\s*\.loc\s.*//\s*(\S+?)(?::\d+)?\s*$", line):
            source = match[1]
        line = line.split("//")[0].strip()
        if line.startswith((".loc", ".param", ".pragma", ".reg")):
            continue
        line = re.sub(r"^[{}]\s*", "", line)
        while match := re.match(r"\$?([\w$]+):\s*", line):
            yield f"{match[1]}:", source
            line = line[match.end() :]
        for statement in line.split(";"):
            text = statement.strip().lstrip("{").strip()
            if text not in ("", "}") and not text.startswith((".reg", ".param")):
                yield re.sub(r"\s+", " ", text), source


def _split(operands: str) -> tuple[str, ...]:
    """Separated by the commas outside of braces and brackets."""
    return tuple(
        part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^]]*\]|[^,{[])+", operands) if part
    )


def _without_tables(body: str) -> str:
    """`brx.idx` written out: compares its index with the number of each label in turn."""
    table = re.compile(r"([\w$]+):\s*\.branchtargets([^;]*);")
    targets = {name: re.findall(r"[\w$]+", labels) for name, labels in table.findall(body)}

    def written_out(match: re.Match[str]) -> str:
        guard, index, name = match.groups()
        if guard:
            raise TranslationError(match[0])
        tests = (
            f"setp.eq.s32 %chosen, {index}, {number};\n@%chosen bra {label};"
            for number, label in enumerate(targets[name])
        )
        return "\n".join([*tests, "trap;"])

    body = re.sub(r"(@\S+\s+)?brx\.idx\s+(%\w+),\s*([\w$]+);", written_out, table.sub("", body))
    return f".reg .pred %chosen;\n{body}"


def parse(ptx: str, kernel: str) -> tuple[list[Instruction], dict[str, int], str, str]:
    """Instructions, the place of each label among them, and the kernel's header and body."""
    start = ptx.index(f".entry {kernel}(")
    end = ptx.find("// -- End function", start)
    header, _, body = ptx[start : end if end > 0 else None].partition("\n{\n")
    body = _without_tables(body)
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for statement, source in _statements(body):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
            continue
        match = re.match(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*)", statement)
        if match is None:
            raise TranslationError(f"{source}: {statement}")
        guard, opcode, operands = match.groups()
        if not opcode.startswith("st.param"):
            instructions.append(Instruction(opcode, _split(operands), guard, source, statement))
    # A label may stand behind the last instruction.
    instructions.append(Instruction("ret", (), None, "end", "ret"))
    return instructions, labels, header, body


class _Frame:
    """Gives registers their places."""

    def __init__(self, body: str) -> None:
        self.image = bytearray()
        self.places: dict[str, int] = {}
        self.widths: dict[str, int] = {}
        for kind, name, count in re.findall(r"\.reg \.(\w+)\s+(%?\w+)(?:<(\d+)>)?;", body):
            for register in [f"{name}{i}" for i in range(int(count))] if count else [name]:
                self.widths[register] = REGISTER_BYTES[re.sub(r"^[fsu](?=\d)", "b", kind)]
        for name in SPECIAL:
            self.widths[name] = 4

    def place(self, register: str) -> int:
        """Of a register, unwritten as yet: what it holds at first is no number to rely on."""
        if register not in self.places:
            self.places[register] = len(self.image)
            self.image += b"\xcb" * (self.widths[register] * LANES)
        return self.places[register]

    def constant(self, value: bytes) -> int:
        name = value.hex()
        if name not in self.places:
            self.places[name] = len(self.image)
            self.image += value * LANES
        return self.places[name]

    def sink(self, width: int) -> int:
        """A register for a result that nobody wants."""
        self.widths[f"_{width}"] = width
        return self.place(f"_{width}")

    def operand(self, text: str, width: int, floating: bool = False) -> int:
        """The place of a register, an immediate or the address of a symbol."""
        if text == "_":
            return self.sink(width)
        if text in self.widths:
            return self.place(text)
        return self.constant(immediate(text, width, floating))


def immediate(text: str, width: int, floating: bool = False) -> bytes:
    """The bits of a constant as an operand of `width` bytes."""
    if match := re.fullmatch(r"0[fd]([0-9a-fA-F]+)", text):
        value = int(match[1], 16)
    elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        value = int(text.rstrip("U"), 0)
        if floating:
            return struct.pack("<f" if width == 4 else "<d", value)
    elif re.fullmatch(r"[A-Za-z_$][\w$.]*", text):
        value = 0  # shared memory begins at 0; messages of assertions are not read
    else:
        raise TranslationError(f"operand {text}")
    return (value & (1 << 8 * width) - 1).to_bytes(width, "little")


def width_of(kind: str) -> int:
    """In bytes, of an operand of a type such as f32 or pred."""
    if kind == "pred":
        return 1
    match = re.fullmatch(r"b?[fbsu]f?(\d+)(x2)?", kind)
    if match is None:
        raise TranslationError(f"type {kind}")
    return int(match[1]) // 8 * (2 if match[2] else 1)


class _Encoder:
    """Turns instructions into rows of numbers."""

    def __init__(self, find_opcode: Callable[[str], int], frame: _Frame, header: str) -> None:
        self.find_opcode, self.frame = find_opcode, frame
        kinds = re.findall(r"\.param \.\w(\d+)[^,\n]*?(\w+_param_\d+)", header)
        self.parameters = {name: (8 * i, int(bits) // 8) for i, (bits, name) in enumerate(kinds)}

    def row(self, opcode: str, places: list[int], offset: int = 0, lanes: int = -1) -> list[int]:
        number = self.find_opcode(opcode)
        if number < 0:
            raise TranslationError(f"no instruction {opcode}")
        return [number, -1, 0, lanes, offset, *places, *([0] * (14 - len(places)))]

    def encode(self, instruction: Instruction, labels: dict[str, int]) -> list[int]:
        try:
            row = self.unguarded(instruction, labels)
        except (TranslationError, KeyError) as error:
            where = f"{instruction.source}: {instruction.text}"
            raise TranslationError(f"{where}: {error}") from error
        if instruction.guard is not None:
            row[1] = self.frame.place(instruction.guard.lstrip("!"))
            row[2] = int(instruction.guard.startswith("!"))
        return row

    def unguarded(self, instruction: Instruction, labels: dict[str, int]) -> list[int]:
        ordered = ORDERING.search(instruction.opcode) is not None
        opcode = ORDERING.sub("", IGNORED.sub("", IGNORED.sub("", instruction.opcode)))
        opcode = opcode.replace("shared::cta", "shared")
        operands = instruction.operands
        name = opcode.split(".")[0]
        if name == "bra":
            return self.row("bra", [], labels[operands[0].lstrip("$")])
        if name in ("ret", "exit"):
            return self.row("ret", [])
        if name in ("trap", "call"):
            return self.row("trap", [])
        if opcode == "bar.warp":
            return self.row("bar.warp", [], lanes=self.frame.operand(operands[0], 4))
        if name in ("bar", "barrier"):
            return self.row("bar", [])
        if name in ("ld", "st", "ldmatrix", "stmatrix"):
            return self.memory(opcode, operands)
        if name in ("atom", "red"):
            return self.atomic(opcode, operands, ordered)
        if name in ("shfl", "redux", "vote"):
            return self.warp_wide(opcode, operands)
        if name == "mov" and any(operand.startswith("{") for operand in operands):
            return self.packing(opcode, operands)
        return self.arithmetic(opcode, operands)

    def arithmetic(self, opcode: str, operands: tuple[str, ...]) -> list[int]:
        name, *modifiers = opcode.split(".")
        kind = modifiers[-1]
        if name in ("mov", "cvta", "selp"):
            opcode = f"{'mov' if name == 'cvta' else name}." + (
                kind if kind == "pred" else f"b{8 * width_of(kind)}"
            )
        widths = [width_of(kind)] * len(operands)
        if name == "selp":
            widths[3] = 1
        elif name == "setp":
            widths[0] = 1
        elif name in ("mul", "mad") and "wide" in modifiers:
            widths[0] *= 2
            widths[3:] = [widths[0]] * len(widths[3:])
        elif name in ("shl", "shr"):
            widths[2] = 4
        elif name == "bfe":
            widths[2:] = [4, 4]
        elif name in ("popc", "clz"):
            widths[0] = 4
        elif name == "cvt":
            widths[0] = width_of(modifiers[-2])
        for operand, width in zip(operands, widths, strict=True):
            if self.frame.widths.get(operand, width) != width:
                raise TranslationError(f"{opcode}: {operand} has another width than {width} bytes")
        floating = kind in ("f32", "f64")
        return self.row(
            opcode,
            [self.frame.operand(o, w, floating) for o, w in zip(operands, widths, strict=True)],
        )

    def address(self, text: str, width: int) -> tuple[int, int]:
        """The place of the base, and the offset."""
        match = re.fullmatch(r"\[\s*([%\w.$]+)\s*(?:\+\s*(-?\d+))?\s*\]", text)
        if match is None:
            raise TranslationError(f"address {text}")
        base, offset = match[1], int(match[2] or 0)
        if self.frame.widths.get(base, width) != width:
            raise TranslationError(f"address {text}: a base of another width than {width} bytes")
        return self.frame.operand(base, width), offset

    def memory(self, opcode: str, operands: tuple[str, ...]) -> list[int]:
        name, *modifiers = opcode.split(".")
        space = next(m for m in modifiers if m in ("global", "shared", "param"))
        kind = "b32" if "matrix" in name else modifiers[-1]
        where, what = operands if name.startswith("st") else reversed(operands)
        registers = [r.strip() for r in what.strip("{} ").split(",")]
        if space == "param":
            symbol = where.strip("[] ").partition("+")
            base, offset = 0, self.parameters[symbol[0].strip()][0] + int(symbol[2] or 0)
        else:
            base, offset = self.address(where, 8 if space == "global" else 4)
        width = width_of(kind)
        held = self.frame.widths.get(registers[0], width)
        places = [self.frame.operand(r, held) for r in registers]
        opcode = name if "matrix" in name else f"{name}.{space}"
        access = [base, len(registers), width, held, int(kind.startswith("s"))]
        every_lane = self.frame.constant(b"\xff" * 4) if "matrix" in name else -1
        return self.row(opcode, access + places, offset, every_lane)

    def atomic(self, opcode: str, operands: tuple[str, ...], ordered: bool) -> list[int]:
        name, space, function, kind = opcode.split(".")
        width = width_of(kind)
        result, (where, *values) = ("_", operands) if name == "red" else (operands[0], operands[1:])
        base, offset = self.address(where, 8 if space == "global" else 4)
        places = [self.frame.operand(result, width), base]
        places += [self.frame.operand(value, width) for value in values]
        return self.row(f"atom.{space}.{function}.{kind}", [*places, int(ordered)], offset)

    def warp_wide(self, opcode: str, operands: tuple[str, ...]) -> list[int]:
        """All wait for the lanes that the last operand names."""
        *operands_, members = operands
        lanes = self.frame.operand(members, 4)
        if opcode.startswith("shfl"):
            result, _, in_range = operands_[0].partition("|")
            widths = [4, 1, 4, 4, 4]
            operands_ = [result, in_range or "_", *operands_[1:]]
        elif opcode.startswith("vote"):
            widths = [4 if "ballot" in opcode else 1, 1]
        else:
            widths = [4, 4]
        places = [self.frame.operand(o, w) for o, w in zip(operands_, widths, strict=True)]
        return self.row(opcode, places, lanes=lanes)

    def packing(self, opcode: str, operands: tuple[str, ...]) -> list[int]:
        """Between a register and the two of half its width that stand in braces."""
        width = width_of(opcode.split(".")[1])
        packs = operands[1].startswith("{")
        parts = [p.strip() for p in operands[packs].strip("{} ").split(",")]
        if len(parts) != 2:
            raise TranslationError(f"{opcode} with {len(parts)} parts")
        halves = [self.frame.operand(part, width // 2) for part in parts]
        whole = self.frame.operand(operands[not packs], width)
        if packs:
            return self.row(f"pack.b{4 * width}.2", [whole, *halves])
        return self.row(f"unpack.b{8 * width}.2", [*halves, whole])


def translate(ptx: str, kernel: str, find_opcode: Callable[[str], int]) -> Program:
    """The program of kernel `kernel`; raises TranslationError with the line that is unknown."""
    instructions, labels, header, body = parse(ptx, kernel)
    frame = _Frame(body)
    encoder = _Encoder(find_opcode, frame, header)
    rows = [encoder.encode(instruction, labels) for instruction in instructions]
    code = b"".join(struct.pack("<4iq14i", *row) for row in rows)
    special = [frame.places.get(name, -1) for name in SPECIAL]
    parameters = [width for _, width in encoder.parameters.values()]
    return Program(code, bytes(frame.image), special, parameters, instructions, labels)
