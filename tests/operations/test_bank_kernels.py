"""What the kernels of the class bank must do on every backend: float64 truth, and the
reference's choices. The CUDA kernels run on the emulated GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from kernel_backends import assert_equal, kernels_of
from kernel_inputs import DTYPES, assert_near, classes, rand, randn
from one_layer import REFERENCE, OneLayer
from torch import Tensor

from cwbr_fused.operations import reference_bank
from cwbr_fused.operations.reference import accumulation_dtype

INF, NAN = float("inf"), float("nan")

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(params=["cpu", "triton", "cuda"])
def kernels(request: pytest.FixtureRequest) -> OneLayer:
    return OneLayer(kernels_of(request.param))


def assert_confusions(
    kernels: OneLayer, logits: Tensor, targets: Tensor, seen: Tensor, top: int
) -> None:
    """The reference's classes exactly, and float64's probabilities to rounding, each of them."""
    index, weight, own = kernels("top_confusions", logits, targets, seen, top)
    assert torch.equal(index, reference_bank.top_confusions(logits, targets, seen, top)[0])
    _, true_weight, true_own = reference_bank.top_confusions(logits.double(), targets, seen, top)
    relative = 1e-12 if logits.dtype == torch.float64 else 1e-5
    for actual, truth in ((weight, true_weight), (own, true_own)):
        assert actual.dtype == accumulation_dtype(logits.dtype)
        torch.testing.assert_close(
            actual.double(), truth, rtol=relative, atol=1e-37, equal_nan=True
        )


def seen_classes(count: int) -> Tensor:
    """About two thirds of them."""
    return rand(count, seed=count) < 0.67


# What standard normal logits become.
LOGITS: dict[str, Callable[[Tensor], Tensor]] = {
    "spread": lambda x: 4 * x,
    "ties": lambda x: x.round(),
    "equal": lambda x: x * 0,
    "both zeros": lambda x: torch.where(x < 0.5, -0.0, 0.0),
    "mostly -inf": lambda x: torch.where(x < 1, -INF, x),
    "rising": lambda x: x.sort(dim=1)[0],
    "falling": lambda x: x.sort(dim=1, descending=True)[0],
}
# (B, C, J): one class, two, fewer candidates than J, odd sizes.
SHAPES = [(3, 1, 2), (3, 2, 1), (3, 2, 4), (5, 9, 9), (3, 70, 1), (2, 1003, 7)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", LOGITS)
def test_confusions_are_those_of_the_definition(
    kernels: OneLayer, kind: str, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    batch, columns, top = shape
    logits = LOGITS[kind](randn(batch, columns)).to(dtype)
    targets = classes(batch, columns)
    assert_confusions(kernels, logits, targets, seen_classes(columns), top)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("spread", torch.float32), ("rising", torch.float16)], ids=str
)
def test_long_rows_have_the_confusions_of_all_their_blocks(
    kernels: OneLayer, kind: str, dtype: torch.dtype
) -> None:
    logits = LOGITS[kind](randn(2, 9001)).to(dtype)
    assert_confusions(kernels, logits, classes(2, 9001), seen_classes(9001), 5)


@pytest.mark.parametrize("top", [0, 1, 40])
def test_nothing_seen_confuses_nothing(kernels: OneLayer, top: int) -> None:
    logits, targets = randn(5, 23), classes(5, 23)
    assert_confusions(kernels, logits, targets, torch.zeros(23, dtype=torch.bool), top)
    only_own = torch.arange(23) == 7
    assert_confusions(kernels, logits, torch.full((5,), 7), only_own, top)


def test_an_empty_batch_has_no_confusions(kernels: OneLayer) -> None:
    for columns in (1, 9):
        empty = torch.zeros(0, dtype=torch.int64)
        assert_confusions(kernels, randn(0, columns), empty, seen_classes(columns), 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_are_not_finite_spoil_their_row_alone(
    kernels: OneLayer, dtype: torch.dtype
) -> None:
    logits = randn(8, 37, dtype=dtype)
    targets = torch.full((8,), 5)
    logits[1, 30], logits[2, 5], logits[3, 30] = NAN, NAN, INF
    logits[4, 5] = INF
    logits[5, 3], logits[5, 30] = INF, NAN
    logits[6] = -INF
    assert_confusions(kernels, logits, targets, torch.ones(37, dtype=torch.bool), 4)


def test_logits_near_the_largest_number_do_not_overflow(kernels: OneLayer) -> None:
    """Beside them log(sum(exp)) rounds away its logarithm; softmax does not."""
    logits = randn(4, 50).sign() * torch.finfo(torch.float32).max
    logits[:, ::3] = randn(4, 17)
    targets, everything = classes(4, 50), torch.ones(50, dtype=torch.bool)
    index, weight, own = kernels("top_confusions", logits, targets, everything, 5)
    truth = logits.softmax(1)
    torch.testing.assert_close(weight, truth.gather(1, index))
    torch.testing.assert_close(own, truth.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("kernels", ["cpu", "triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int16], ids=str)
def test_targets_of_any_integer_dtype(kernels: OneLayer, dtype: torch.dtype) -> None:
    logits, targets, seen = randn(9, 40), classes(9, 40), seen_classes(40)
    expected = kernels("top_confusions", logits, targets, seen, 5)
    assert_equal(kernels("top_confusions", logits, targets.to(dtype), seen, 5), expected)


def layouts(t: Tensor) -> list[Tensor]:
    """The same values by other strides."""
    wide = torch.stack([t, t.roll(1)], dim=-1)[..., 0]
    return [wide, t.T.contiguous().T] if t.dim() == 2 else [wide]


def test_confusions_are_read_by_their_strides(kernels: OneLayer) -> None:
    arguments = (randn(6, 30), classes(6, 30), seen_classes(30))
    expected = kernels("top_confusions", *arguments, 5)
    for position, argument in enumerate(arguments):
        for variant in layouts(argument):
            given = (*arguments[:position], variant, *arguments[position + 1 :])
            assert_equal(kernels("top_confusions", *given, 5), expected)
    row = arguments[0][:1].expand(6, -1)
    everything = torch.ones((), dtype=torch.bool).expand(30)
    target = arguments[1][:1].expand(6)
    expected = kernels("top_confusions", row.clone(), target.clone(), everything.clone(), 5)
    assert_equal(kernels("top_confusions", row, target, everything, 5), expected)


Arguments = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def attraction(
    batch: int, count: int, dims: int, chosen: int, dtype: torch.dtype = torch.float32
) -> Arguments:
    """z, mean, var, index with some -1 and coefficients of both signs, NaN where unused."""
    accumulation = accumulation_dtype(dtype)
    index = classes(batch * chosen, count + 1).reshape(batch, chosen) - 1
    coefficient = randn(batch, chosen, seed=2, dtype=accumulation)
    return (
        randn(batch, dims, dtype=dtype),
        randn(count, dims, seed=1, dtype=accumulation),
        rand(dims, dtype=accumulation) + 0.1,
        index,
        torch.where(index < 0, NAN, coefficient),
    )


def assert_attraction(kernels: OneLayer, arguments: Arguments) -> None:
    """Float64's energies to rounding of what they are the sum of, and its gradients."""
    energy, gradient = kernels("class_attraction", *arguments)
    z, mean, var, index, coefficient = (t.double() for t in arguments)
    index = index.long()
    truth, true_gradient = REFERENCE("class_attraction", z, mean, var, index, coefficient)
    size, _ = REFERENCE("class_attraction", z, mean, var, index, coefficient.abs())
    assert energy.dtype == gradient.dtype == arguments[1].dtype
    relative = 1e-13 if energy.dtype == torch.float64 else 2e-6
    assert energy.shape == truth.shape
    assert ((energy.double() - truth).abs() <= relative * size).all()
    assert_near(gradient, true_gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    # (B, C, D, J)
    "shape",
    [(5, 4, 1, 3), (4, 7, 17, 1), (3, 1, 64, 2), (3, 9, 192, 6), (2, 5, 1030, 6), (2, 5, 530, 6)],
    ids=str,
)
def test_attraction_and_its_gradient_equal_float64_truth(
    kernels: OneLayer, shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    assert_attraction(kernels, attraction(*shape, dtype))


@pytest.mark.parametrize("shape", [(0, 4, 5, 3), (3, 4, 5, 0), (3, 4, 0, 2), (3, 0, 5, 2)], ids=str)
def test_attraction_of_nothing_is_zero(kernels: OneLayer, shape: tuple[int, int, int, int]) -> None:
    arguments = attraction(*shape)
    energy, gradient = kernels("class_attraction", *arguments)
    assert energy.shape == shape[:1]
    assert gradient.shape == (shape[0], shape[2])
    assert not energy.any()
    assert not gradient.any()


def test_samples_without_a_class_feel_nothing_whatever_they_are(kernels: OneLayer) -> None:
    z, mean, var, index, coefficient = attraction(4, 3, 21, 2)
    z[0], z[1, 3] = NAN, INF
    index[:2] = -1
    energy, gradient = kernels("class_attraction", z, mean, var, index, coefficient)
    assert not energy[:2].any()
    assert not gradient[:2].any()
    expected = kernels("class_attraction", z[2:], mean, var, index[2:], coefficient[2:])
    assert_equal((energy[2:], gradient[2:]), expected)


def test_huge_means_of_small_spread_lose_no_digits(kernels: OneLayer) -> None:
    z, mean, var, index, coefficient = attraction(6, 5, 100, 4)
    for level in (1e3, -1e5):
        assert_attraction(kernels, (z + level, mean + level, var, index, coefficient))


def test_attraction_is_read_by_its_strides(kernels: OneLayer) -> None:
    arguments = attraction(6, 5, 20, 3)
    expected = kernels("class_attraction", *arguments)
    for position, argument in enumerate(arguments):
        for variant in layouts(argument):
            given = (*arguments[:position], variant, *arguments[position + 1 :])
            assert_equal(kernels("class_attraction", *given), expected)
    z, mean, var, index, coefficient = arguments
    expanded = (z[:1].expand(6, -1), mean, var[:1].expand(20), index[:1].expand(6, -1))
    copies = (t.contiguous() for t in expanded)
    expected = kernels("class_attraction", *copies, coefficient)
    assert_equal(kernels("class_attraction", *expanded, coefficient), expected)
