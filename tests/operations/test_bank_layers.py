"""The operations of the class bank on all layers at once, on every backend."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from emulation.checks import doubles
from emulation.harness import Emulator, emulated_library
from kernel_backends import Kernels, kernels_of
from kernel_inputs import classes, map_tensors, outcome, rand, randn
from torch import Tensor

from cwbr_fused.operations import reference_bank, schema
from cwbr_fused.operations.autograd import OPERATIONS

NAMES = ("class_attraction", "observe_classes", "follow_classes")
# Widths of layers: vectors that fit and that do not, one dimension, several blocks.
WIDTHS = [16, 1, 530, 7]
BATCH, CLASSES = 7, 9

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=["cpu", "triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "reference":
        return Kernels(OPERATIONS["reference"], "cpu")
    return kernels_of(request.param)


def acting(batch: int, dtype: torch.dtype, others: int = 11) -> tuple[Any, ...]:
    """Own classes, rivals and what is known; some are none, twice there, or unknown."""
    rivals = classes(batch * others, CLASSES + 1).reshape(batch, others) - 1
    labels = torch.stack([classes(batch, CLASSES, seed=2), classes(batch, CLASSES, seed=3)], 1)
    labels[1, 1], labels[2, 0] = -1, -1
    shares = rand(batch, 2, seed=4, dtype=dtype)
    shares[3:5, 1] = 0
    weight, seen = rand(batch, others, seed=5, dtype=dtype) / 2, torch.arange(CLASSES) != 4
    return labels, shares, rand(batch, seed=6, dtype=dtype), rivals, weight, seen, 0.7


def arguments_of(name: str, widths: list[int], dtype: torch.dtype = torch.float32) -> list[Any]:
    width = sum(widths)
    mean = [randn(CLASSES, d, seed=i, dtype=dtype) for i, d in enumerate(widths)]
    count = [(torch.arange(CLASSES) % (2 + i)).to(dtype) for i in range(len(widths))]
    rows, size = torch.tensor([3, -1, 0, 8, 5]), rand(5, seed=7, dtype=dtype) + 0.5
    moments = randn(5, width, seed=8, dtype=dtype), rand(5, width, seed=9, dtype=dtype)
    if name == "class_attraction":
        z, var = randn(BATCH, width, seed=10, dtype=dtype), rand(width, dtype=dtype) + 0.1
        unit = torch.arange(1, len(widths) + 1).to(dtype)
        return [z, mean, var, unit, *acting(BATCH, dtype)]
    if name == "follow_classes":
        return [mean, count, rows, rand(len(widths), 5, dtype=dtype), moments[0], 0.7]
    var = [rand(d, seed=i, dtype=dtype) for i, d in enumerate(widths)]
    updates = [torch.tensor(float(i), dtype=dtype) for i in range(len(widths))]
    return [mean, count, var, updates, rows, size, *moments, 0.9, 1e-3]


def layer_of(argument: Any, layer: int, widths: list[int]) -> Any:
    """What an argument or result has of one layer, as of all there are."""
    if isinstance(argument, list):
        return argument[layer : layer + 1]
    if not isinstance(argument, Tensor):
        return argument
    if argument.dim() > 0 and argument.shape[-1] == sum(widths):
        return argument.split(widths, -1)[layer]
    if argument.dim() == 3:
        return argument[:, layer : layer + 1]
    by_layer = argument.dim() > 0 and argument.shape[0] == len(widths)
    return argument[layer : layer + 1] if by_layer else argument


@pytest.mark.parametrize("name", NAMES)
def test_all_layers_at_once_are_as_each_alone(kernels: Kernels, name: str) -> None:
    arguments = arguments_of(name, WIDTHS)
    together = kernels.outcome(name, *arguments)
    writes = len(schema.written(name))
    found = [*together[: len(together) - writes * len(WIDTHS)]]
    written = [together[len(found) + i * len(WIDTHS) :][: len(WIDTHS)] for i in range(writes)]
    for layer in range(len(WIDTHS)):
        alone = kernels.outcome(name, *(layer_of(a, layer, WIDTHS) for a in arguments))
        mine = [layer_of(t, layer, WIDTHS) for t in found] + [w[layer] for w in written]
        torch.testing.assert_close(mine, alone, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_all_layers_are_as_in_float64(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    arguments = arguments_of(name, WIDTHS, dtype)
    truth = outcome(schema.pure_pytorch(name), name, doubles(arguments))
    tolerance = 1e-13 if dtype == torch.float64 else 3e-6
    for actual, true in zip(kernels.outcome(name, *arguments), truth, strict=True):
        assert actual.dtype == dtype
        # Numbers of different kinds have different sizes.
        scale = true.abs().amax(-1, keepdim=True) if true.dim() == 3 else true.abs().max()
        assert ((actual.double() - true).abs() <= tolerance * scale).all()


def test_more_layers_than_one_launch_takes() -> None:
    gpu = Kernels(Emulator(emulated_library()), "cpu")
    widths = [3 + i % 3 for i in range(35)]
    for name in NAMES:
        arguments = arguments_of(name, widths)
        truth = outcome(schema.pure_pytorch(name), name, doubles(arguments))
        for actual, true in zip(gpu.outcome(name, *arguments), truth, strict=True):
            torch.testing.assert_close(actual.double(), true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "launches"), list(zip(NAMES, (1, 3, 1), strict=True)))
def test_launches_do_not_grow_with_the_layers(name: str, launches: int) -> None:
    gpu = Emulator(emulated_library())
    for widths in ([5], WIDTHS, [4] * 20):
        getattr(gpu, name)(*map_tensors(Tensor.clone, arguments_of(name, widths)))
        assert gpu.launches == launches


def numbers(kernels: Kernels, **changes: Any) -> Tensor:
    """Of one layer, by hand: class means at 0, 1, ..., 4 on a line, variance 1."""
    given = {
        "z": [[1.2], [1.2], [3.0]],
        "labels": [[1], [2], [3]],
        "shares": [[], [], []],
        "own": [0.5, 0.3, 0.2],
        "rivals": [[0, 2], [1, 3], [-1, -1]],
        "weight": [[0.3, 0.1], [0.3, 0.1], [0.0, 0.0]],
        "seen": [True] * 5,
    } | changes
    t = {name: torch.tensor(value) for name, value in given.items()}
    t["shares"] = t["shares"].reshape(3, -1).float()
    mean = [torch.arange(5.0)[:, None]]
    rest = (t[name] for name in ("labels", "shares", "own", "rivals", "weight", "seen"))
    _, found = kernels("class_attraction", t["z"], mean, torch.ones(1), torch.ones(1), *rest, 1.0)
    return found[:, 0]


@pytest.mark.parametrize("kernels", ["cpu", "triton", "cuda", "reference"], indirect=True)
def test_numbers_of_samples_by_hand(kernels: Kernels) -> None:
    energy, nearest, right, squares = numbers(kernels)
    # The first is nearest to its own mean; the second is nearest to its rival 1; the third has no
    # rival, and lies in its mean.
    assert nearest.tolist() == [1, 0, 0]
    assert right.tolist() == [1, 0, 1]
    expected = [0.2**2 - 0.3 * 1.2**2 - 0.1 * 0.8**2, 0.8**2 - 0.3 * 0.2**2 - 0.1 * 1.8**2, 0]
    torch.testing.assert_close(energy, torch.tensor(expected) / 2)
    pull = torch.tensor([0.2 - 0.3 * 1.2 + 0.1 * 0.8, -0.8 - 0.3 * 0.2 + 0.1 * 1.8, 0])
    torch.testing.assert_close(squares, pull**2)


@pytest.mark.parametrize("kernels", ["cpu", "triton", "cuda", "reference"], indirect=True)
def test_a_sample_of_unknown_or_no_class_is_left_alone(kernels: Kernels) -> None:
    unknown = numbers(kernels, seen=[True, False, True, True, True])
    assert unknown[:2, 0].tolist() == [0, 0]
    assert unknown[3, 0] == torch.finfo(torch.float32).tiny  # no pull, yet it has an inverse
    assert unknown[2, 0] == 1  # what the model says of it is another matter
    assert unknown[0, 1] != 0
    for changes in (
        {"labels": [[-1], [2], [3]]},
        {"shares": [[0.0], [1.0], [1.0]]},
        {"shares": [[float("nan")], [1.0], [1.0]]},
    ):
        assert numbers(kernels, **changes)[:3, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("kernels", ["cpu", "triton", "cuda", "reference"], indirect=True)
def test_a_rival_that_is_an_own_class_is_none(kernels: Kernels) -> None:
    both = {"labels": [[1, 0], [2, -1], [3, -1]], "shares": [[0.7, 0.3], [1, 0], [1, 0]]}
    energy, nearest, right, _ = numbers(kernels, own=[0.25, 0.3, 0.2], **both)
    torch.testing.assert_close(
        energy[0], torch.tensor(0.7 * 0.2**2 + 0.3 * 1.2**2 - 0.1 * 0.8**2) / 2
    )
    assert (nearest[0], right[0]) == (1, 1)


@pytest.mark.parametrize("kernels", ["cpu", "triton", "cuda", "reference"], indirect=True)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_that_is_not_finite_is_near_to_nothing(kernels: Kernels, bad: float) -> None:
    assert numbers(kernels, z=[[bad], [1.2], [3.0]])[1, 0] == 0
    assert numbers(kernels, own=[float("nan"), 0.3, 0.2])[2, 0] == 0


def test_the_unit_is_the_root_of_the_mean_variance() -> None:
    arguments = arguments_of("observe_classes", WIDTHS)
    arguments[2][1].zero_()
    arguments[1] = [torch.zeros_like(c) for c in arguments[1]]
    unit = reference_bank.observe_classes(*arguments)[2]
    expected = [v.mean().sqrt() if v.any() else torch.ones(()) for v in arguments[2]]
    torch.testing.assert_close(unit, torch.stack(expected))
