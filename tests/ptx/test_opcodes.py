"""Single instructions of the machine against values computed by hand from the PTX manual."""

from __future__ import annotations

import math
import re
import struct

import machine
import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(machine.shutil.which("g++") is None, reason="needs g++")

INF, NAN = math.inf, math.nan
REGISTERS = ".reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<9>; .reg .b64 %d<9>;"
EXACT = machine.Conditions(approximation_error=0)


def kernel(body: str, parameters: int) -> machine.program.Program:
    """A kernel with pointers to global memory as parameters, loaded to %d1, %d2, ..."""
    names = [f"k_param_{i}" for i in range(parameters)]
    declared = ",\n".join(f".param .u64 {name}" for name in names)
    loads = "\n".join(f"ld.param.b64 %d{i + 1}, [{name}];" for i, name in enumerate(names))
    declarations = "\n".join(REGISTERS.replace("; ", ";\n").splitlines())
    text = f".visible .entry k(\n{declared}\n)\n{{\n{declarations}\n{loads}\n{body}\nret;\n}}"
    return machine.translate(text, "k")


def run(
    body: str,
    *tensors: Tensor,
    threads: int = 32,
    grid: tuple[int, ...] = (1,),
    shared: int = 0,
    conditions: machine.Conditions = EXACT,
) -> None:
    pointers = [tensor.data_ptr() for tensor in tensors]
    compiled = kernel(body, len(tensors))
    machine.run(compiled, grid, threads, shared, pointers, tensors, conditions)


# What loads and stores operands and results of a type: width in bits, register and struct's code.
KINDS = {
    "u16": (16, "h", "H"),
    "s16": (16, "h", "h"),
    "b16": (16, "h", "H"),
    "u32": (32, "r", "I"),
    "s32": (32, "r", "i"),
    "b32": (32, "r", "I"),
    "f32": (32, "r", "f"),
    "u64": (64, "d", "Q"),
    "s64": (64, "d", "q"),
    "b64": (64, "d", "Q"),
    "f64": (64, "d", "d"),
    "f16": (16, "h", "e"),
    "bf16": (16, "h", "H"),
    "f16x2": (32, "r", "I"),
    "bf16x2": (32, "r", "I"),
}


def computed(opcode: str, result: str, operands: list[tuple[str, float]]) -> float:
    """The result of an instruction of operands (type, value), through memory."""
    memory = torch.zeros(64, dtype=torch.uint8)
    lines, names = [], []
    for i, (kind, value) in enumerate(operands, start=1):
        if kind == "pred":
            lines.append(f"setp.ne.b32 %p{i}, {int(value)}, 0;")
            names.append(f"%p{i}")
            continue
        bits, register, code = KINDS[kind]
        packed = struct.pack("<" + code, value)
        memory[8 * i : 8 * i + len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        name = f"%{register}{i + 4}"
        lines.append(f"ld.global.b{bits} {name}, [%d1+{8 * i}];")
        names.append(name)
    if result == "pred":
        lines += [f"{opcode} %p8, {', '.join(names)};", "selp.b32 %r8, 1, 0, %p8;"]
        result = "u32"
    else:
        lines.append(f"{opcode} %{KINDS[result][1]}8, {', '.join(names)};")
    bits, register, code = KINDS[result]
    lines.append(f"st.global.b{bits} [%d1], %{register}8;")
    run("\n".join(lines), memory, threads=1)
    value: float = struct.unpack("<" + code, bytes(memory[: bits // 8].tolist()))[0]
    return value


def same(kind: str) -> tuple[str, str]:
    return kind, kind


# opcode: (type of the result, types of the operands, [(operands, result), ...])
TABLE: dict[str, tuple[str, tuple[str, ...], list[tuple[tuple[float, ...], float]]]] = {
    "add.s32": ("s32", same("s32"), [((2, 3), 5), ((2**31 - 1, 1), -(2**31))]),
    "add.s16": ("s16", same("s16"), [((32767, 1), -32768)]),
    "sub.s64": ("s64", same("s64"), [((2, 5), -3), ((-(2**63), 1), 2**63 - 1)]),
    "mul.lo.s32": ("s32", same("s32"), [((-3, 7), -21), ((65536, 65536), 0)]),
    "mul.hi.u32": ("u32", same("u32"), [((2**31, 6), 3)]),
    "mul.hi.s32": ("s32", same("s32"), [((-(2**31), 2), -1)]),
    "mul.hi.u64": ("u64", same("u64"), [((2**63, 6), 3)]),
    "mul.wide.s32": ("s64", same("s32"), [((-(2**31), 2), -(2**32))]),
    "mul.wide.u32": ("u64", same("u32"), [((2**32 - 1, 2), 2**33 - 2)]),
    "mad.lo.s32": ("s32", ("s32",) * 3, [((3, 4, 5), 17)]),
    "mad.lo.s64": ("s64", ("s64",) * 3, [((3, -4, 5), -7)]),
    "mad.wide.s32": ("s64", ("s32", "s32", "s64"), [((-2, 2**30, 1), 1 - 2**31)]),
    "mad.wide.u32": ("u64", ("u32", "u32", "u64"), [((2**32 - 1, 2, 5), 2**33 + 3)]),
    "div.s32": ("s32", same("s32"), [((-7, 2), -3)]),
    "rem.s32": ("s32", same("s32"), [((-7, 2), -1)]),
    "div.u32": ("u32", same("u32"), [((2**32 - 1, 2), 2**31 - 1)]),
    "neg.s32": ("s32", ("s32",), [((5,), -5), ((-(2**31),), -(2**31))]),
    "abs.s32": ("s32", ("s32",), [((-5,), 5)]),
    "min.s32": ("s32", same("s32"), [((-1, 1), -1)]),
    "max.u32": ("u32", same("u32"), [((2**32 - 1, 1), 2**32 - 1)]),
    "min.s64": ("s64", same("s64"), [((-1, 1), -1)]),
    "and.b32": ("b32", same("b32"), [((12, 10), 8)]),
    "or.b64": ("b64", same("b64"), [((12, 10), 14)]),
    "xor.b16": ("b16", same("b16"), [((12, 10), 6)]),
    "not.b32": ("b32", ("b32",), [((1,), 2**32 - 2)]),
    "shl.b32": ("b32", ("b32", "u32"), [((3, 4), 48), ((3, 32), 0), ((3, 99), 0)]),
    "shl.b64": ("b64", ("b64", "u32"), [((1, 40), 2**40), ((1, 64), 0)]),
    "shr.u32": ("u32", ("u32", "u32"), [((2**31, 31), 1), ((2**31, 32), 0)]),
    "shr.s32": ("s32", ("s32", "u32"), [((-8, 1), -4), ((-8, 40), -1)]),
    "shr.s64": ("s64", ("s64", "u32"), [((-8, 70), -1)]),
    "bfe.u32": ("u32", ("u32",) * 3, [((0b110100, 2, 3), 0b101), ((2**31, 31, 9), 1)]),
    "bfe.s32": ("s32", ("s32", "u32", "u32"), [((0b110100, 2, 3), -3), ((64, 6, 1), -1)]),
    "prmt.b32": ("b32", ("b32",) * 3, [((0x33221100, 0x77665544, 0x7531), 0x77553311)]),
    "popc.b32": ("u32", ("b32",), [((0xF0F0,), 8)]),
    "clz.b32": ("u32", ("b32",), [((1,), 31), ((0,), 32)]),
    "setp.lt.s32": ("pred", same("s32"), [((-1, 1), 1), ((1, 1), 0)]),
    "setp.lt.u32": ("pred", same("u32"), [((2**32 - 1, 1), 0)]),
    "setp.ge.s64": ("pred", same("s64"), [((-1, -1), 1)]),
    "setp.eq.b64": ("pred", same("b64"), [((7, 7), 1)]),
    "setp.ne.b16": ("pred", same("b16"), [((7, 7), 0)]),
    "setp.ne.f32": ("pred", same("f32"), [((NAN, 1), 0), ((2, 1), 1)]),
    "setp.neu.f32": ("pred", same("f32"), [((NAN, 1), 1), ((1, 1), 0)]),
    "setp.lt.f32": ("pred", same("f32"), [((NAN, 1), 0), ((0, 1), 1)]),
    "setp.ltu.f64": ("pred", same("f64"), [((NAN, 1), 1), ((2, 1), 0)]),
    "setp.geu.f32": ("pred", same("f32"), [((0, 1), 0), ((1, NAN), 1)]),
    "setp.leu.f64": ("pred", same("f64"), [((2, 1), 0), ((1, 1), 1)]),
    "setp.gtu.f32": ("pred", same("f32"), [((1, 1), 0), ((NAN, NAN), 1)]),
    "setp.equ.f32": ("pred", same("f32"), [((1, 2), 0), ((NAN, 2), 1)]),
    "setp.nan.f32": ("pred", same("f32"), [((1, NAN), 1), ((1, 1), 0)]),
    "setp.num.f32": ("pred", same("f32"), [((1, NAN), 0), ((1, 1), 1)]),
    "setp.ne.f16": ("pred", same("f16"), [((1, 2), 1), ((1, NAN), 0)]),
    "setp.eq.f16": ("pred", same("f16"), [((0.0, -0.0), 1)]),
    "selp.f32": ("f32", ("f32", "f32", "pred"), [((1, 2, 1), 1), ((1, 2, 0), 2)]),
    "add.f32": ("f32", same("f32"), [((1, 2**-24), 1), ((1, 2**-23), 1 + 2**-23)]),
    "sub.f64": ("f64", same("f64"), [((1, 0.75), 0.25)]),
    "add.rn.f64": ("f64", same("f64"), [((1, 0.75), 1.75)]),
    "mul.f32": ("f32", same("f32"), [((2**-100, 2**-40), 2**-140)]),
    "mul.ftz.f32": ("f32", same("f32"), [((2**-100, 2**-40), 0), ((2**-130, 2**100), 0)]),
    "fma.rn.f32": ("f32", ("f32",) * 3, [((1 + 2**-12, 1 + 2**-12, -1 - 2**-11), 2**-24)]),
    "fma.rn.f64": ("f64", ("f64",) * 3, [((2, 3, 4), 10)]),
    "fma.rn.ftz.f32": ("f32", ("f32",) * 3, [((2**-130, 2**30, 1), 1), ((2, 3, 4), 10)]),
    "div.rn.f64": ("f64", same("f64"), [((1, 4), 0.25), ((1, 0), INF)]),
    "div.full.f32": ("f32", same("f32"), [((1, 4), 0.25), ((2**127, 2**127), 1)]),
    "div.approx.f32": ("f32", same("f32"), [((1, 4), 0.25), ((2**127, 2**127), 0)]),
    "neg.f32": ("f32", ("f32",), [((0.5,), -0.5)]),
    "abs.f64": ("f64", ("f64",), [((-0.5,), 0.5)]),
    "abs.ftz.f32": ("f32", ("f32",), [((-(2**-130),), 0), ((-1,), 1)]),
    "min.f32": ("f32", same("f32"), [((NAN, 1), 1), ((2, 1), 1), ((-INF, 1), -INF)]),
    "max.f32": ("f32", same("f32"), [((NAN, 1), 1), ((2, 1), 2)]),
    "max.NaN.f32": ("f32", same("f32"), [((NAN, 1), NAN), ((2, 1), 2)]),
    "max.f64": ("f64", same("f64"), [((2, NAN), 2)]),
    "rcp.approx.ftz.f32": ("f32", ("f32",), [((4,), 0.25), ((2**-130,), INF), ((2**127,), 0)]),
    "rcp.approx.f32": ("f32", ("f32",), [((2**127,), 2**-127)]),
    "rcp.approx.ftz.f64": ("f64", ("f64",), [((4,), 0.25), ((1 + 2**-40,), 1)]),
    "sqrt.approx.ftz.f32": ("f32", ("f32",), [((9,), 3), ((2**-130,), 0), ((-1,), NAN)]),
    "rsqrt.approx.f32": ("f32", ("f32",), [((16,), 0.25)]),
    "ex2.approx.f32": ("f32", ("f32",), [((-3,), 0.125), ((-INF,), 0), ((-140,), 2**-140)]),
    "ex2.approx.ftz.f32": ("f32", ("f32",), [((-140,), 0)]),
    "lg2.approx.ftz.f32": ("f32", ("f32",), [((8,), 3), ((0,), -INF), ((2**-130,), -INF)]),
    "lg2.approx.f32": ("f32", ("f32",), [((2**-130,), -130), ((-1,), NAN)]),
    "cvt.s64.s32": ("s64", ("s32",), [((-5,), -5)]),
    "cvt.u64.u32": ("u64", ("u32",), [((2**32 - 5,), 2**32 - 5)]),
    "cvt.u32.u64": ("u32", ("u64",), [((2**32 + 7,), 7)]),
    "cvt.u16.u32": ("u16", ("u32",), [((65536 + 7,), 7)]),
    "cvt.rn.f32.s32": ("f32", ("s32",), [((2**24 + 1,), 2**24), ((-3,), -3)]),
    "cvt.rn.f32.u32": ("f32", ("u32",), [((2**32 - 1,), 2**32)]),
    "cvt.rn.f32.s64": ("f32", ("s64",), [((-(2**40),), -(2**40))]),
    "cvt.rn.f64.u64": ("f64", ("u64",), [((2**63,), 2**63)]),
    "cvt.rzi.s32.f32": ("s32", ("f32",), [((-1.7,), -1), ((1e20,), 2**31 - 1), ((NAN,), 0)]),
    "cvt.rmi.s32.f32": ("s32", ("f32",), [((-1.2,), -2)]),
    "cvt.rni.s32.f32": ("s32", ("f32",), [((2.5,), 2)]),
    "cvt.f64.f32": ("f64", ("f32",), [((0.5,), 0.5)]),
    "cvt.rn.f32.f64": ("f32", ("f64",), [((1 + 2**-30,), 1)]),
    "cvt.f32.f16": ("f32", ("f16",), [((1.5,), 1.5), ((2**-24,), 2**-24)]),
    "cvt.f32.bf16": ("f32", ("bf16",), [((0x3FC0,), 1.5), ((0x7F80,), INF)]),
    "cvt.rn.f16.f32": ("f16", ("f32",), [((1 + 2**-11,), 1), ((1e9,), INF)]),
    "cvt.rn.bf16.f32": ("bf16", ("f32",), [((1.5,), 0x3FC0), ((1 + 2**-8,), 0x3F80)]),
    "cvt.rn.f16x2.f32": ("f16x2", same("f32"), [((1, 1.5), 0x3C003E00)]),
    "cvt.rn.bf16x2.f32": ("bf16x2", same("f32"), [((1, 1.5), 0x3F803FC0)]),
}


@pytest.mark.parametrize("opcode", TABLE)
def test_an_instruction_computes_what_the_manual_says(opcode: str) -> None:
    result, kinds, cases = TABLE[opcode]
    for operands, expected in cases:
        value = computed(opcode, result, list(zip(kinds, operands, strict=True)))
        assert value == expected or (math.isnan(value) and math.isnan(expected)), operands


# opcode: bound of the error, relative or, of a logarithm near 0, absolute; arguments
APPROXIMATE = {
    "rcp.approx.ftz.f32": (2**-23, lambda x: 1 / x, 3.0),
    "sqrt.approx.f32": (2**-23, math.sqrt, 3.0),
    "ex2.approx.f32": (2**-22, lambda x: 2.0**x, 0.3),
    "lg2.approx.f32": (2**-22, math.log2, 1.9),
}


@pytest.mark.parametrize("opcode", APPROXIMATE)
def test_approximate_instructions_err_within_their_bound_and_not_for_show(opcode: str) -> None:
    bound, exact, start = APPROXIMATE[opcode]
    x = torch.linspace(start, start * 1.05, 64)
    y = torch.zeros(64)
    body = (
        "mov.u32 %r1, %tid.x;\nmad.wide.u32 %d3, %r1, 4, %d1;\nmad.wide.u32 %d4, %r1, 4, %d2;\n"
        f"ld.global.b32 %r2, [%d3];\n{opcode} %r3, %r2;\nst.global.b32 [%d4], %r3;"
    )
    run(body, x, y, threads=64, conditions=machine.Conditions())
    truth = torch.tensor([exact(v) for v in x.double().tolist()], dtype=torch.float64)
    error = ((y.double() - truth) / truth).abs()
    assert bound / 2 < float(error.max()) <= bound + 2**-24


def stored_by_lanes(body: str, threads: int = 32, scattered: bool = False) -> list[int]:
    """%r3 of each thread after `body`, in which %r1 is its index."""
    out = torch.zeros(threads, dtype=torch.int32)
    run(
        f"mov.u32 %r1, %tid.x;\nmad.wide.u32 %d3, %r1, 4, %d1;\n{body}\nst.global.b32 [%d3], %r3;",
        out,
        threads=threads,
        conditions=machine.Conditions(scattered=scattered, approximation_error=0),
    )
    return out.tolist()


LANES = list(range(32))
EXCHANGES = {
    "shfl.sync.bfly.b32 %r3, %r1, 3, 31, -1;": [lane ^ 3 for lane in LANES],
    "shfl.sync.up.b32 %r3, %r1, 2, 0, -1;": [
        max(lane - 2, lane % 2 if lane < 2 else 0) for lane in LANES
    ],
    "shfl.sync.down.b32 %r3, %r1, 2, 31, -1;": [lane + 2 if lane < 30 else lane for lane in LANES],
    "shfl.sync.idx.b32 %r3, %r1, 5, 31, -1;": [5] * 32,
    "shfl.sync.bfly.b32 %r3, %r1, 16, 0x100f, -1;": LANES[:16] * 2,
    "shfl.sync.up.b32 %r2|%p1, %r1, 2, 0, -1;\nselp.b32 %r3, 1, 0, %p1;": [0, 0] + [1] * 30,
    "redux.sync.add.s32 %r3, %r1, -1;": [496] * 32,
    "redux.sync.max.s32 %r3, %r1, -1;": [31] * 32,
    "redux.sync.min.s32 %r3, %r1, -1;": [0] * 32,
    "setp.lt.u32 %p1, %r1, 3;\nvote.sync.ballot.b32 %r3, %p1, -1;": [7] * 32,
    # The lower half alone, while the upper one skips it.
    "mov.u32 %r3, 9;\nsetp.lt.u32 %p1, %r1, 16;\n@%p1 redux.sync.add.s32 %r3, %r1, 0xffff;": (
        [120] * 16 + [9] * 16
    ),
    # Both ways of a branch, and the loop of each lane as often as its index says.
    "setp.lt.u32 %p1, %r1, 5;\nmov.u32 %r3, 1;\n@%p1 bra $L1;\nmov.u32 %r3, 2;\n$L1:": (
        [1] * 5 + [2] * 27
    ),
    "mov.u32 %r3, 0;\n$L1:\nadd.s32 %r3, %r3, 2;\nsetp.le.u32 %p1, %r3, %r1;\n@%p1 bra $L1;": (
        [lane // 2 * 2 + 2 for lane in LANES]
    ),
    "mov.b64 %d4, {%r1, 7};\nmov.b64 {%r3, %r4}, %d4;\nadd.s32 %r3, %r3, %r4;": (
        [lane + 7 for lane in LANES]
    ),
    "mov.b32 {%h1, %h2}, %r1;\nmov.b32 %r3, {%h2, %h1};": [lane << 16 for lane in LANES],
    "mov.u32 %r3, %ntid.x;": [32] * 32,
}


@pytest.mark.parametrize("scattered", [False, True], ids=["together", "scattered"])
@pytest.mark.parametrize("body", EXCHANGES)
def test_lanes_exchange_and_branch(body: str, scattered: bool) -> None:
    assert stored_by_lanes(body, scattered=scattered) == EXCHANGES[body]


def test_a_warp_loads_and_stores_matrices_of_shared_memory() -> None:
    """Row r of the matrix is in lanes 4 r to 4 r + 3, which store their numbers."""
    out = torch.zeros(64, dtype=torch.int32)
    run(
        "mov.u32 %r1, %tid.x;\nshl.b32 %r2, %r1, 4;\nand.b32 %r2, %r2, 127;\n"
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r2], {%r1};\nbar.warp.sync -1;\n"
        "shl.b32 %r3, %r1, 2;\nld.shared.b32 %r4, [%r3];\n"
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r5}, [%r2];\n"
        "mad.wide.u32 %d3, %r1, 8, %d1;\nst.global.v2.b32 [%d3], {%r4, %r5};",
        out,
        shared=128,
    )
    assert out.tolist() == [lane for lane in LANES for _ in range(2)]


def test_blocks_know_their_place_and_atomics_count_them_all() -> None:
    seen, total = torch.zeros(24, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    run(
        "mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %ctaid.y;\nmov.u32 %r3, %ctaid.z;\n"
        "mad.lo.s32 %r4, %r3, 3, %r2;\nmad.lo.s32 %r4, %r4, 4, %r1;\n"
        "mad.wide.u32 %d3, %r4, 4, %d1;\n"
        "st.global.b32 [%d3], %r4;\natom.global.gpu.acq_rel.add.u32 %r5, [%d2], 1;",
        seen,
        total,
        threads=1,
        grid=(4, 3, 2),
    )
    assert seen.tolist() == list(range(24))
    assert total.item() == 24


def test_narrow_loads_extend_by_the_sign_of_their_type() -> None:
    memory = torch.tensor([-2, 0, 0, 0, 0, 0, 0, 0], dtype=torch.int8)
    out = torch.zeros(3, dtype=torch.int32)
    run(
        "ld.global.s8 %h1, [%d1];\ncvt.s32.s16 %r1, %h1;\nld.global.u8 %h2, [%d1];\n"
        "cvt.s32.s16 %r2, %h2;\nld.global.s8 %r3, [%d1];\nst.global.b32 [%d2], %r1;\n"
        "st.global.b32 [%d2+4], %r2;\nst.global.b32 [%d2+8], %r3;",
        memory,
        out,
        threads=1,
    )
    assert out.tolist() == [-2, 254, -2]


def test_unknown_ptx_is_named_with_its_line() -> None:
    with pytest.raises(machine.program.TranslationError, match=re.escape("frob.b32 %r1, %r2: no")):
        kernel("frob.b32 %r1, %r2;", 1)
    with pytest.raises(machine.program.TranslationError, match="another width than 4 bytes"):
        kernel("add.s32 %r1, %d1, 1;", 1)
