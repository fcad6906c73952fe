"""Every operation of the Triton backend as compiled code, executed on the CPU.

Against float64 truth, at sizes where kernels go wrong, on tensors that lie anywhere, with threads
in any order; and what leaving out a barrier does. `test_compiled.py` starts the tests that are not
marked `whole`, `make ptx` all of them.
"""

from __future__ import annotations

from typing import Any

import barriers
import machine
import plugin
import program
import pytest
import torch
from arguments import SETTINGS, operation_arguments
from emulation.checks import doubles, pure_pytorch
from kernel_inputs import assert_near, outcome, written
from torch import Tensor

import cwbr_fused
from cwbr_fused import warming
from cwbr_fused.operations import backends, extension, schema

TRITON = extension.triton_kernels()
HALVES = (torch.float16, torch.bfloat16)
ODD = "odd"
OFTEN = [
    *((setting, torch.float32) for setting in (ODD, "multiples of 16", "all one")),
    (ODD, torch.float64),
    (ODD, torch.bfloat16),
]
SELDOM = [
    *((setting, torch.float32) for setting in SETTINGS),
    *((s, d) for s in (ODD, "multiples of 16") for d in (torch.float64, *HALVES)),
    ("all one", torch.float64),
    ("all one", torch.bfloat16),
]


def whole(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.whole)


@pytest.fixture(autouse=True)
def default_conditions() -> None:
    plugin.conditions.seed = 0
    plugin.conditions.scattered = False


def results(name: str, arguments: tuple[Any, ...]) -> list[Tensor]:
    return outcome(getattr(TRITON, name), name, arguments)


def assert_true(name: str, arguments: tuple[Any, ...], given: tuple[Any, ...]) -> None:
    """The operation on `given` equals float64's on `arguments`."""
    truth = outcome(pure_pytorch(name), name, doubles(arguments))
    for actual, expected in zip(results(name, given), truth, strict=True):
        if actual.is_floating_point():
            # Some results are the least normal number, which is another one in float64.
            least = torch.finfo(actual.dtype).tiny
            near_zero = [x.abs() <= least for x in (actual, expected)]
            assert_near(
                actual.masked_fill(near_zero[0], 0), expected.masked_fill(near_zero[1], 0), scale=10
            )
        else:
            assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("setting", "dtype"), [*OFTEN, *(whole(*case) for case in SELDOM if case not in OFTEN)], ids=str
)
@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_operation_equals_float64_truth(name: str, setting: str, dtype: torch.dtype) -> None:
    arguments = operation_arguments(dtype, "triton", SETTINGS[setting])[name]
    assert_true(name, arguments, arguments)


def offset(x: Tensor) -> Tensor:
    """A copy one element behind the beginning of its memory, before which there is another."""
    memory = torch.zeros(x.numel() + 2, dtype=x.dtype)
    return memory[1:-1].copy_(x.reshape(-1)).view(x.shape)


def strided(x: Tensor) -> Tensor:
    """A copy of which adjacent elements are two apart."""
    memory = torch.zeros(*x.shape[:-1], 2 * x.shape[-1], dtype=x.dtype)
    return memory[..., ::2].copy_(x)


@pytest.mark.parametrize("setting", [ODD, whole("multiples of 16")])
@pytest.mark.parametrize("lay", [offset, strided])
@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_tensors_may_lie_anywhere(name: str, lay: Any, setting: str) -> None:
    arguments = operation_arguments(torch.float32, "triton", SETTINGS[setting])[name]

    def moved(position: int) -> Any:
        how = offset if position in written(name) else lay
        return torch.utils._pytree.tree_map_only(
            Tensor, lambda x: how(x) if x.dim() else x, arguments[position]
        )

    assert_true(name, arguments, tuple(moved(i) for i in range(len(arguments))))


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_results_have_the_same_bits_in_any_order_of_threads_and_blocks(name: str) -> None:
    arguments = operation_arguments(torch.float32, "triton")[name]
    expected = results(name, arguments)
    for seed, scattered in ((1000, False), (2000, False), (3000, True)):
        plugin.conditions.seed, plugin.conditions.scattered = seed, scattered
        for actual, wanted in zip(results(name, arguments), expected, strict=True):
            torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def is_noticed(name: str, arguments: tuple[Any, ...], expected: list[Tensor]) -> bool:
    try:
        actual = results(name, arguments)
    except machine.KernelError:
        return True
    pairs = zip(actual, expected, strict=True)
    return not all(torch.equal(a.nan_to_num(), e.nan_to_num()) for a, e in pairs)


# The barriers that may be left out unnoticed at odd sizes, by the reason why each orders nothing:
# kernel as compiled for sm_80, which of its barriers in the order of the code, and of how many.
UNNEEDED = {
    "in a loop, it waits for the previous turn's loads, and there is one turn": {
        ("_rank_kernel", 2, 31),  # of 128 samples
        ("_layout_kernel", 1, 24),  # of 1024 samples
        ("_mean_probs_kernel", 1, 8),  # of 64 columns, and of a tile of a group's samples
        ("_list_kernel", 1, 12),  # of 1024 ends of pairs
        ("_prepare_backward_kernel", 1, 20),  # of 1024 ends of pairs
        ("_top_pairs_kernel", 1, 211),  # of 4096 groups
        ("_top_pairs_kernel", 42, 118),  # of 4096 pairs
        ("_top_pairs_kernel", 53, 118),  # of 4096 candidates
        ("_top_pairs_kernel", 110, 211),  # of 4096 candidates
        ("_top_pairs_kernel", 113, 118),  # of a share of the chosen pairs
        ("_top_pairs_kernel", 206, 211),  # of a share of the chosen pairs
    },
    "threads store where, of all warps, only their own has loaded": {
        ("_mean_probs_kernel", 7, 8),
        ("_symmetrise_kernel", 2, 3),
    },
    "there is one block of rows, so that no warp reads what another stores": {
        ("_pairs_backward_kernel", 1, 3),
        ("_pairs_backward_kernel", 2, 3),
        ("_pairs_backward_kernel", 3, 3),
    },
    "it passes on what other programs have stored, and there is one program, of one warp": {
        ("_overlap_kernel", 3, 3)
    },
    "it follows an assertion, before which nothing is stored": {("_rank_kernel", 1, 31)},
}


def name_of(kernel: str, compiled: program.Program, index: int) -> tuple[str, int, int]:
    all_barriers = [i for i, x in enumerate(compiled.instructions) if barriers.is_barrier(x)]
    return kernel, all_barriers.index(index) + 1, len(all_barriers)


def test_every_barrier_left_out_is_noticed_or_named() -> None:
    """Each barrier of the compiled code in turn that its own code does not show to be idle."""
    noticed: dict[tuple[tuple[str, str], int], bool] = {}
    names: dict[tuple[tuple[str, str], int], tuple[str, int, int]] = {}
    for operation, arguments in operation_arguments(torch.float32, "triton").items():
        plugin.programs.clear()
        expected = results(operation, arguments)
        for key, compiled in dict(plugin.programs).items():
            for index in barriers.executed(compiled):
                if noticed.get((key, index)) or barriers.orders_nothing(compiled, index):
                    continue
                plugin.substitutes[key] = machine.without(compiled, index)
                noticed[key, index] = is_noticed(operation, arguments, expected)
                names[key, index] = name_of(key[0], compiled, index)
                del plugin.substitutes[key]
    assert any(noticed.values())
    unnoticed = {names[barrier] for barrier, was in noticed.items() if not was}
    assert unnoticed == set().union(*UNNEEDED.values())


@pytest.mark.parametrize("published", [False, True])
def test_a_step_of_another_batch_compiles_nothing_after_warm_up(
    published: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "_triton_rejection", lambda device_type: None)
    plugin.programs.clear()
    sizes = {"num_classes": 9, "widths": [7, 4]}
    how = {"device": "cpu", "backend": "triton", "published": published}
    cwbr_fused.warm_up(**sizes, **how)
    compiled = set(plugin.programs)
    assert compiled
    for batch in (1, 23, 32):
        monkeypatch.setattr(warming, "BATCH", batch)
        cwbr_fused.warm_up(**sizes, **how)
    assert set(plugin.programs) == compiled


@pytest.mark.parametrize("widths", [[7], [64, 7, 32, 4]], ids=["one layer", "four layers"])
def test_the_first_step_of_cwbr_compiles_nine_kernels_once(
    widths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward and backward, whatever the number of layers."""
    monkeypatch.setattr(backends, "_triton_rejection", lambda device_type: None)
    plugin.programs.clear()
    cwbr_fused.warm_up(9, widths, device="cpu", backend="triton")
    assert sorted(kernel for kernel, _ in plugin.programs) == [
        "_class_attraction_kernel",
        "_class_weights_kernel",
        "_follow_classes_kernel",
        "_layout_kernel",
        "_moments_kernel",
        "_rank_kernel",
        "_scatter_kernel",
        "_top_confusions_kernel",
        "_variances_kernel",
    ]
