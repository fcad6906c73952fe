"""What the machine must notice of a kernel that misuses the GPU, and what it must let pass."""

from __future__ import annotations

import machine
import pytest
import torch
from test_opcodes import run, stored_by_lanes

pytestmark = pytest.mark.skipif(machine.shutil.which("g++") is None, reason="needs g++")

# Each thread stores its index in shared memory and loads that of a thread `by` further.
ROUND_TRIP = (
    "mov.u32 %r1, %tid.x;\nmad.wide.u32 %d3, %r1, 4, %d1;\nshl.b32 %r2, %r1, 2;\n"
    "st.shared.b32 [%r2], %r1;\n{barrier}\nadd.s32 %r3, %r1, {by};\nand.b32 %r3, %r3, 63;\n"
    "shl.b32 %r3, %r3, 2;\nld.shared.b32 %r4, [%r3];\nst.global.b32 [%d3], %r4;"
)


def round_trip(barrier: str, by: int, seed: int = 0, scattered: bool = False) -> list[int]:
    out = torch.zeros(64, dtype=torch.int32)
    conditions = machine.Conditions(seed=seed, scattered=scattered)
    body = ROUND_TRIP.format(barrier=barrier, by=by)
    run(body, out, threads=64, shared=256, conditions=conditions)
    return out.tolist()


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_barrier_orders_the_threads_of_a_block(seed: int, scattered: bool) -> None:
    expected = [(thread + 40) % 64 for thread in range(64)]
    assert round_trip("bar.sync 0;", 40, seed, scattered) == expected


@pytest.mark.parametrize("barrier", ["", "bar.warp.sync -1;"])
@pytest.mark.parametrize("seed", range(3))
def test_without_a_barrier_threads_of_two_warps_race(barrier: str, seed: int) -> None:
    with pytest.raises(machine.KernelError, match="race"):
        round_trip(barrier, 32, seed)


def test_the_barrier_of_a_warp_orders_its_lanes_and_no_others() -> None:
    body = ROUND_TRIP.replace("and.b32 %r3, %r3, 63", "xor.b32 %r3, %r1, 1")
    out = torch.zeros(64, dtype=torch.int32)
    run(body.format(barrier="bar.warp.sync -1;", by=0), out, threads=64, shared=256)
    assert out.tolist() == [thread ^ 1 for thread in range(64)]
    with pytest.raises(machine.KernelError, match="race"):
        run(body.format(barrier="", by=0), out, threads=64, shared=256)


def test_threads_that_store_the_same_value_do_not_race() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    run("mov.u32 %r1, 7;\nst.global.b32 [%d1], %r1;", out, threads=96, grid=(2,))
    assert out.item() == 7
    with pytest.raises(machine.KernelError, match="race: two threads write different values"):
        run("mov.u32 %r1, %tid.x;\nst.global.b32 [%d1], %r1;", out, threads=96)


# The last block to arrive at a counter reads what all of them have stored.
LAST = (
    "mov.u32 %r1, %ctaid.x;\nmov.u32 %r2, %tid.x;\nmad.wide.u32 %d4, %r1, 4, %d1;\n"
    "setp.eq.u32 %p1, %r2, 33;\n@%p1 st.global.b32 [%d4], %r1;\n{barrier}\n"
    "setp.eq.u32 %p2, %r2, 0;\n@!%p2 bra $END;\n"
    "atom.global.gpu.{order}.add.u32 %r3, [%d2], 1;\nsetp.ne.u32 %p3, %r3, 2;\n@%p3 bra $END;\n"
    "ld.global.b32 %r4, [%d1];\nld.global.b32 %r5, [%d1+4];\nadd.s32 %r4, %r4, %r5;\n"
    "ld.global.b32 %r5, [%d1+8];\nadd.s32 %r4, %r4, %r5;\nst.global.b32 [%d3], %r4;\n$END:"
)


def last_to_arrive(barrier: str, order: str, seed: int) -> int:
    stored, counter, total = (torch.zeros(n, dtype=torch.int32) for n in (3, 1, 1))
    body = LAST.format(barrier=barrier, order=order)
    conditions = machine.Conditions(seed=seed)
    run(body, stored, counter, total, threads=64, grid=(3,), conditions=conditions)
    return int(total.item())


@pytest.mark.parametrize("seed", range(3))
def test_an_atomic_that_releases_and_acquires_orders_blocks(seed: int) -> None:
    assert last_to_arrive("bar.sync 0;", "acq_rel", seed) == 3
    for barrier, order in (("", "acq_rel"), ("bar.sync 0;", "relaxed")):
        with pytest.raises(machine.KernelError, match="race"):
            last_to_arrive(barrier, order, seed)


def test_a_table_of_branches_takes_each_lane_where_its_index_says() -> None:
    """An index beyond the table is a fault."""
    table = (
        "JTI0_0:\n.branchtargets\n$L0,\n$L1;\nand.b32 %r4, %r1, {mask};\nbrx.idx %r4, JTI0_0;\n"
        "$L0:\nmov.u32 %r3, 5;\nbra.uni $L2;\n$L1:\nmov.u32 %r3, 7;\n$L2:"
    )
    assert stored_by_lanes(table.format(mask=1))[:4] == [5, 7, 5, 7]
    with pytest.raises(machine.KernelError, match="assertion"):
        stored_by_lanes(table.format(mask=2))


def test_a_barrier_that_some_threads_never_reach_is_a_fault() -> None:
    some = "setp.lt.u32 %p1, %r1, 40;\nmov.u32 %r3, 0;\n@%p1 bra $L1;\nbar.sync 0;\n$L1:"
    with pytest.raises(machine.KernelError, match="wait for ever"):
        stored_by_lanes(some, threads=64)


def test_a_shuffle_without_a_lane_that_it_names_is_a_fault() -> None:
    half = "setp.lt.u32 %p1, %r1, 16;\nmov.u32 %r3, 0;\n@%p1 shfl.sync.bfly.b32 %r3, %r1, 1, 31, "
    assert stored_by_lanes(half + "0xffff;")[:2] == [1, 0]
    with pytest.raises(machine.KernelError, match="wait for ever"):
        stored_by_lanes(half + "-1;")
    beyond = half.replace("bfly.b32 %r3, %r1, 1,", "bfly.b32 %r3, %r1, 16,")
    with pytest.raises(machine.KernelError, match="takes no part"):
        stored_by_lanes(beyond + "0xffff;")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("ld.global.b32 %r1, [%d1+16];", "4 bytes beyond the nearest tensor"),
        ("ld.global.b32 %r1, [%d1+-4];", "in no tensor|beyond"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1+4];", "16 bytes at .* are misaligned"),
        ("mov.u32 %r1, 8;\nld.shared.v2.b32 {%r2, %r3}, [%r1+4];", "shared memory: 8 bytes at"),
        ("mov.u32 %r1, 8;\nst.shared.b32 [%r1+8], %r1;", "access of 0x10 in 16 bytes"),
        ("trap;", "an assertion of the kernel fails"),
    ],
)
def test_memory_has_bounds_and_alignment(body: str, message: str) -> None:
    tensor = torch.zeros(8, dtype=torch.int32)[:4]
    with pytest.raises(machine.KernelError, match=message):
        run(body, tensor, threads=1, shared=16)


def test_a_view_ends_with_its_last_element() -> None:
    column = torch.zeros(4, 8, dtype=torch.int32)[:, 2]
    run("ld.global.b32 %r1, [%d1+96];", column, threads=1)
    with pytest.raises(machine.KernelError, match="beyond"):
        run("ld.global.b32 %r1, [%d1+100];", column, threads=1)


def test_an_instruction_can_be_left_out() -> None:
    out = torch.zeros(1, dtype=torch.int32)
    whole = machine.translate(
        ".visible .entry k(\n.param .u64 k_param_0\n)\n{\n.reg .b32 %r<9>;\n.reg .b64 %d<9>;\n"
        "ld.param.b64 %d1, [k_param_0];\nmov.u32 %r1, 7;\nst.global.b32 [%d1], %r1;\nret;\n}",
        "k",
    )
    store = next(i for i, line in enumerate(whole.instructions) if line.opcode.startswith("st."))
    for compiled, expected in ((machine.without(whole, store), 0), (whole, 7)):
        machine.run(compiled, (1,), 32, 0, [out.data_ptr()], [out], machine.Conditions())
        assert out.item() == expected
    assert whole.executed == bytearray([1, 1, 1, 1, 0])


# All threads of each block store the same values, wait, and load those that others have stored.
SAME = (
    "mov.u32 %r1, %tid.x;\nmad.wide.u32 %d3, %r1, 4, %d1;\nst.global.b32 [%d3], {value};\n"
    "{barrier}\nxor.b32 %r2, %r1, 40;\nmad.wide.u32 %d4, %r2, 4, %d1;\n"
    "ld.global.b32 %r3, [%d4];\nmad.wide.u32 %d5, %r1, 4, %d2;\nst.global.b32 [%d5], %r3;"
)


@pytest.mark.parametrize("seed", range(3))
def test_blocks_that_store_the_same_values_need_wait_for_their_own_alone(seed: int) -> None:
    stored, loaded = (torch.full((64,), -1, dtype=torch.int32) for _ in range(2))
    conditions = machine.Conditions(seed=seed)

    def run_blocks(barrier: str, value: str) -> None:
        body = SAME.format(barrier=barrier, value=value)
        stored.fill_(-1)
        run(body, stored, loaded, threads=64, grid=(5,), conditions=conditions)

    run_blocks("bar.sync 0;", "%r1")
    assert loaded.tolist() == [thread ^ 40 for thread in range(64)]
    with pytest.raises(machine.KernelError, match="race"):
        run_blocks("", "%r1")
    with pytest.raises(machine.KernelError, match="race"):
        run_blocks("mov.u32 %r4, %ctaid.x;\nst.global.b32 [%d3], %r4;\nbar.sync 0;", "%r1")
