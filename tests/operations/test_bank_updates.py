"""What the kernels that write into the class bank must do on every backend: float64 truth, and
nothing of what is left out. The CUDA kernels run on the emulated GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_backends import assert_equal, kernels_of
from kernel_inputs import ACCUMULATION_DTYPES, rand, randn, written
from one_layer import REFERENCE, OneLayer
from test_bank_kernels import layouts
from torch import Tensor

INF, NAN = float("inf"), float("nan")
OPERATIONS = ("observe_classes", "follow_classes")
MOMENTUM, FLOOR = 0.9, 1e-3

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]

Observation = list[Any]
# Positions of the arguments of observe_classes.
MEAN, COUNT, VAR, UPDATES, CLASSES, SIZE, BATCH_MEAN, BATCH_VAR = range(8)


@pytest.fixture(params=["cpu", "triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> OneLayer:
    return OneLayer(kernels_of(request.param))


def observation(
    groups: int, classes: int, dims: int, dtype: torch.dtype = torch.float32, updates: float = 3
) -> Observation:
    """Arguments of observe_classes: of the K classes of a batch the bank knows about two thirds.

    Every sixth is negative, every fifth of size 0.
    """
    order = rand(classes, seed=1).argsort()[:groups]
    rows = torch.cat([order, torch.full((groups - len(order),), -1)])
    rows[5::6] = -1
    size = (4 * rand(groups, seed=2, dtype=dtype)) + 0.1
    size[4::5] = 0
    return [
        randn(classes, dims, seed=3, dtype=dtype),
        (3 * rand(classes, seed=4, dtype=dtype)).floor(),
        rand(dims, seed=5, dtype=dtype) + 0.1,
        torch.tensor(updates, dtype=dtype),
        rows,
        size,
        randn(groups, dims, seed=6, dtype=dtype),
        rand(groups, dims, seed=7, dtype=dtype),
        MOMENTUM,
        FLOOR,
    ]


def following(observed: Observation) -> list[Any]:
    """Arguments of follow_classes after such an observation."""
    weight = REFERENCE.outcome("observe_classes", *observed)[0]
    mean, count = observed[MEAN], observed[COUNT]
    return [mean, count, observed[CLASSES], weight, observed[BATCH_MEAN], MOMENTUM]


def arguments_of(name: str, observed: Observation) -> list[Any]:
    return observed if name == "observe_classes" else following(observed)


def in_float64(arguments: list[Any]) -> list[Any]:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def assert_true(kernels: OneLayer, name: str, arguments: list[Any]) -> list[Tensor]:
    """Float64's numbers to rounding: of themselves, for means to that of what they move between."""
    truth = REFERENCE.outcome(name, *in_float64(arguments))
    found = kernels.outcome(name, *arguments)
    dtype = arguments[MEAN].dtype
    relative = 1e-14 if dtype == torch.float64 else 3e-6
    scale = 5 if name == "follow_classes" else 0
    for actual, expected in zip(found, truth, strict=True):
        assert (actual.shape, actual.dtype) == (expected.shape, dtype)
        assert ((actual.double() - expected).abs() <= relative * (expected.abs() + scale)).all()
    return found


# (K, C, D): nothing at all, one, one dimension, odd sizes, more groups than classes, many blocks.
SHAPES = [
    (0, 3, 5),
    (1, 1, 1),
    (9, 12, 1),
    (4, 9, 17),
    (20, 7, 64),
    (33, 40, 530),
    (70, 90, 40),
    (3, 5, 1030),
]


@pytest.mark.parametrize("dtype", ACCUMULATION_DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_bank_is_written_as_in_float64(
    kernels: OneLayer, name: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    assert_true(kernels, name, arguments_of(name, observation(*shape, dtype)))


@pytest.mark.parametrize("updates", [0, 1, 7, 1e6])
def test_variances_are_a_plain_average_until_that_moves_more_slowly(
    kernels: OneLayer, updates: float
) -> None:
    arguments = observation(12, 20, 33, updates=updates)
    found = assert_true(kernels, "observe_classes", arguments)
    assert found[3] == updates + 1
    if updates == 0:  # the first one counts alone, whatever was there before
        arguments[VAR] = torch.full((33,), 1e20)
        assert_equal(tuple(kernels.outcome("observe_classes", *arguments)), tuple(found))


@pytest.mark.parametrize("groups", [0, 7])
def test_a_batch_of_unknown_classes_changes_no_variance(kernels: OneLayer, groups: int) -> None:
    arguments = observation(groups, 9, 40)
    arguments[COUNT] = torch.zeros(9)
    weight, metric, var, updates = assert_true(kernels, "observe_classes", arguments)
    assert weight.any() == (groups > 0)
    assert_equal((var, updates), (arguments[VAR], arguments[UPDATES]))
    arguments[VAR] = torch.zeros(40)
    metric = kernels.outcome("observe_classes", *arguments)[1]
    assert_equal((metric,), (torch.ones(40),))


def test_one_known_class_among_many_decides_alone(kernels: OneLayer) -> None:
    arguments = observation(60, 70, 21, updates=0)
    known = arguments[CLASSES][50]
    arguments[COUNT] = torch.where(torch.arange(70) == known, 2.0, 0.0)
    difference = arguments[BATCH_MEAN][50] - arguments[MEAN][known]
    var = kernels.outcome("observe_classes", *arguments)[2]
    torch.testing.assert_close(var, arguments[BATCH_VAR][50] + difference.square())


@pytest.mark.parametrize("value", [INF, -INF, NAN, 1e25])
def test_moments_too_large_to_square_leave_their_class_out(kernels: OneLayer, value: float) -> None:
    arguments = observation(20, 30, 530)
    arguments[CLASSES][7], arguments[CLASSES][8] = 28, 29
    arguments[COUNT][28:] = 2
    arguments[SIZE][7:9] = 0
    expected = kernels.outcome("observe_classes", *arguments)
    arguments[SIZE][7:9] = 3
    arguments[BATCH_MEAN][7, 529] = value
    arguments[BATCH_VAR][8, 3] = 3e38
    assert_equal(tuple(kernels.outcome("observe_classes", *arguments)), tuple(expected))
    assert not expected[0][7:9].any()


def spoil(name: str, arguments: list[Any], value: float) -> None:
    """Fills with `value` all that is not to be read: of classes left out, and unknown ones."""
    if name == "follow_classes":
        _, _, classes, weight, batch_mean, _ = arguments
        batch_mean[(classes < 0) | (weight == 0)] = value
        return
    left_out = (arguments[CLASSES] < 0) | (arguments[SIZE] == 0)
    arguments[BATCH_MEAN][left_out], arguments[BATCH_VAR][left_out] = value, value
    arguments[SIZE][arguments[CLASSES] < 0] = value
    arguments[MEAN][arguments[COUNT] == 0] = value


@pytest.mark.parametrize("value", [INF, NAN, 1e25])
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_left_out_may_hold_anything(kernels: OneLayer, name: str, value: float) -> None:
    arguments = arguments_of(name, observation(24, 30, 70))
    expected = kernels.outcome(name, *arguments)
    spoiled = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    spoil(name, spoiled, value)
    assert_equal(tuple(kernels.outcome(name, *spoiled)), tuple(expected))


def test_rows_of_classes_that_do_not_occur_keep_their_bits(kernels: OneLayer) -> None:
    mean, count, classes, weight, *_ = arguments = following(observation(12, 40, 33))
    absent = torch.ones(40, dtype=torch.bool)
    absent[classes[weight > 0]] = False
    mean[absent], count[absent] = NAN, INF
    new_mean, new_count = kernels.outcome("follow_classes", *arguments)
    assert_equal((new_mean[absent], new_count[absent]), (mean[absent], count[absent]))
    assert new_mean[~absent].isfinite().all()
    torch.testing.assert_close(new_count[~absent].sum(), count[~absent].sum() + weight.sum())


def test_negative_classes_are_not_followed_whatever_their_weight(kernels: OneLayer) -> None:
    mean, count, classes, weight, batch_mean, momentum = following(observation(12, 40, 33))
    expected = kernels.outcome("follow_classes", mean, count, classes, weight, batch_mean, momentum)
    assert (classes < 0).any()
    weight = torch.where(classes < 0, 2.0, weight)
    assert_true(kernels, "follow_classes", [mean, count, classes, weight, batch_mean, momentum])
    found = kernels.outcome("follow_classes", mean, count, classes, weight, batch_mean, momentum)
    assert_equal(tuple(found), tuple(expected))


def test_the_first_samples_of_a_class_are_its_mean(kernels: OneLayer) -> None:
    batch_mean = randn(3, 65)
    arguments = (torch.zeros(5, 65), torch.zeros(5), torch.tensor([4, -1, 1]))
    weight = torch.tensor([3.0, 0.0, 1.0])
    mean, count = kernels.outcome("follow_classes", *arguments, weight, batch_mean, MOMENTUM)
    assert_equal((mean[[4, 1]], count), (batch_mean[[0, 2]], torch.tensor([0.0, 1, 0, 0, 3])))
    assert not mean[[0, 2, 3]].any()


def test_a_bank_that_learns_from_batch_after_batch_stays_with_float64(kernels: OneLayer) -> None:
    state = observation(0, 15, 20, updates=0)[:4]
    state[COUNT].zero_()
    state[VAR].zero_()
    truth = [t.double() for t in state]
    for step in range(6):
        _, _, _, _, classes, size, mean, var, *_ = observation(10, 15, 20)
        batch = [classes.roll(step), size, mean + step, var]
        for given, bank, operations in (
            (batch, state, kernels),
            (in_float64(batch), truth, REFERENCE),
        ):
            weight, _ = operations("observe_classes", *bank, *given, MOMENTUM, FLOOR)
            operations("follow_classes", *bank[:2], given[0], weight, given[2], MOMENTUM)
    for found, expected in zip(state, truth, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert state[UPDATES] == 5


@pytest.mark.parametrize("name", OPERATIONS)
def test_arguments_are_read_by_their_strides(kernels: OneLayer, name: str) -> None:
    arguments = arguments_of(name, observation(8, 9, 20))
    expected = tuple(kernels.outcome(name, *arguments))
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor) and position not in written(name):
            for variant in layouts(argument):
                given = (*arguments[:position], variant, *arguments[position + 1 :])
                assert_equal(tuple(kernels.outcome(name, *given)), expected)
    expanded = [*arguments]
    for position in (SIZE, BATCH_MEAN, BATCH_VAR) if name == "observe_classes" else (3, 4):
        expanded[position] = arguments[position][:1].expand_as(arguments[position])
    copied = [a.contiguous() if isinstance(a, Tensor) else a for a in expanded]
    expected = tuple(kernels.outcome(name, *copied))
    assert_equal(tuple(kernels.outcome(name, *expanded)), expected)


@pytest.mark.parametrize("kernels", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_written_must_be_contiguous(kernels: OneLayer, name: str) -> None:
    arguments = arguments_of(name, observation(8, 9, 20))
    names = {"observe_classes": ["var"], "follow_classes": ["mean", "count"]}[name]
    for argument, position in zip(names, written(name), strict=False):
        strided = layouts(arguments[position])[0]
        given = (*arguments[:position], strided, *arguments[position + 1 :])
        with pytest.raises((RuntimeError, ValueError), match=f"{argument}: expected a contiguous"):
            kernels(name, *given)
        assert_equal((strided,), (arguments[position],))


@pytest.mark.parametrize(
    "kernels", ["cpu", "cuda"], indirect=True
)  # the interpreter asserts nothing
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_class_that_the_bank_does_not_have_is_an_error(kernels: OneLayer, name: str) -> None:
    arguments = arguments_of(name, observation(8, 9, 20))
    arguments[CLASSES if name == "observe_classes" else 2][0] = 9
    with pytest.raises(RuntimeError, match=r"classes|leaves its tensor"):
        kernels.outcome(name, *arguments)


def test_a_bank_without_classes_or_dimensions_can_be_asked(kernels: OneLayer) -> None:
    for classes, dims in ((0, 7), (4, 0), (0, 0)):
        arguments = observation(3, classes, dims)
        weight, metric, var, updates = kernels.outcome("observe_classes", *arguments)
        known = (weight > 0) & (arguments[CLASSES] >= 0)
        assert_equal((weight,), (torch.where(known, arguments[SIZE], 0),))
        assert metric.shape == (dims,)
        if classes == 0:
            assert_equal((var, updates), (arguments[VAR], arguments[UPDATES]))
        bank, batch = arguments[:2], (arguments[CLASSES], weight, arguments[BATCH_MEAN], MOMENTUM)
        mean, count = kernels.outcome("follow_classes", *bank, *batch)
        assert mean.shape == (classes, dims)
        torch.testing.assert_close(count.sum(), arguments[COUNT].sum() + weight.sum())
