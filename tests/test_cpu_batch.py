"""The C++ batch kernels against float64 truth, at the sizes and layouts where kernels go wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cwbr_fused import extension, reference, reference_backward

EPS = 1e-6
CPP = torch.ops.cwbr_fused
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What rounding the result to its dtype, and the sums before it, may cost relative to its scale.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 1e-13,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}

pytestmark = pytest.mark.skipif(
    extension.missing("cpu") is not None, reason=str(extension.missing("cpu"))
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def classes(size: int, count: int, seed: int = 0) -> Tensor:
    return torch.randint(count, (size,), generator=torch.Generator().manual_seed(seed))


def assert_near(actual: Tensor, truth: Tensor, scale: float = 1) -> None:
    """Relative to the largest element of the truth, `scale` times the tolerance of the dtype."""
    assert actual.shape == truth.shape
    largest = float(truth.abs().max()) if truth.numel() else 0
    underflow = torch.finfo(actual.dtype).smallest_normal
    bound = TOLERANCE[actual.dtype] * max(scale * largest, underflow)
    torch.testing.assert_close(actual.double(), truth.double(), rtol=0, atol=bound, equal_nan=True)


TARGETS = {
    "random": classes(57, 9),
    "more classes than samples": classes(40, 500),
    "one class": torch.full((7,), 3),
    "all singletons": torch.arange(9).flip(0),
    "one sample": torch.tensor([4]),
    "no samples": torch.zeros(0, dtype=torch.int64),
    "negative and huge": torch.tensor([2**62, -5, 2**62, -(2**62), -5, 7, -(2**62)]),
    "high bytes only": torch.tensor([3 << 40, 1 << 40, 2 << 40, 1 << 40, 3 << 40]),
}


@pytest.mark.parametrize("min_count", [1, 2, 3])
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_groups_equal_the_reference_exactly(targets: Tensor, min_count: int) -> None:
    actual = CPP.group_by_class(targets, min_count)
    for result, expected in zip(actual, reference.group_by_class(targets, min_count), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.bool]
)
def test_targets_of_any_integer_dtype_and_stride(dtype: torch.dtype) -> None:
    targets = classes(30, 2 if dtype == torch.bool else 5)
    expected = reference.group_by_class(targets, 2)
    strided = torch.stack([targets, targets + 1], dim=1).to(dtype)[:, 0]
    for given in (targets.to(dtype), strided):
        for result, wanted in zip(CPP.group_by_class(given, 2), expected, strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0)


# (B, D, number of classes)
SHAPES = [(23, 1, 4), (24, 17, 3), (40, 700, 6), (9, 1030, 1), (33, 64, 30), (5, 0, 2), (0, 3, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_and_their_gradient_equal_float64_truth(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    batch, dims, count = shape
    z = randn(batch, dims, dtype=dtype)
    order, offsets, _ = reference.group_by_class(classes(batch, count), 2)
    clamp = 0.5  # active for about half of the variances
    truth = reference.class_moments(z.double(), order, offsets, clamp)
    moments = CPP.class_moments(z, order, offsets, clamp)
    for result, expected in zip(moments, truth, strict=True):
        assert result.dtype == reference.accumulation_dtype(dtype)
        assert_near(result, expected)

    grads = [randn(*truth[0].shape, seed=s, dtype=moments[0].dtype) for s in (1, 2)]
    actual = CPP.class_moments_backward(*grads, z, *moments, order, offsets, clamp)
    expected = reference_backward.class_moments_backward(
        *(g.double() for g in grads), z.double(), *truth, order, offsets, clamp
    )
    assert actual.dtype == dtype
    assert_near(actual, expected)


def test_moments_of_huge_means_are_exact_to_rounding() -> None:
    targets = classes(64, 8)
    order, offsets, _ = reference.group_by_class(targets, 2)
    for level in (0.0, 1e3, -1e5):
        z = (randn(64, 300) + level).float()
        mean, var = CPP.class_moments(z, order, offsets, EPS)
        true_mean, true_var = reference.class_moments(z.double(), order, offsets, EPS)
        torch.testing.assert_close(mean.double(), true_mean, rtol=1.2e-7, atol=1e-6)
        torch.testing.assert_close(var.double(), true_var, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 64, 1003])
def test_confusion_weights_equal_float64_truth(columns: int, dtype: torch.dtype) -> None:
    logits = (randn(48, columns) * 6).to(dtype)
    targets = classes(48, min(columns, 20))
    groups = reference.group_by_class(targets, 2)
    truth = reference.confusion_weights(logits.double(), *groups)
    actual = CPP.confusion_weights(logits, *groups)
    assert_near(actual, truth)
    # Also the small ones: relative error of each, not of the largest.
    torch.testing.assert_close(
        actual.double(), truth, rtol=1e-12 if dtype == torch.float64 else 5e-6, atol=1e-37
    )


def test_confusion_weights_keep_their_precision_far_below_the_maximum() -> None:
    """Probabilities down to 1e-37: the exponential is right to a few units in the last place."""
    logits = torch.linspace(-85, 0, 400).repeat(2, 1)
    targets = torch.tensor([399, 399])
    order, offsets, _ = reference.group_by_class(targets, 1)
    for column in range(0, 399, 7):
        pair = torch.tensor([column, 399])
        both = torch.tensor([0, 1, 2]), pair
        actual = CPP.confusion_weights(logits, order, *both)
        truth = reference.confusion_weights(logits.double(), order, *both)
        torch.testing.assert_close(actual.double(), truth, rtol=6e-7, atol=0)
    assert offsets.tolist() == [0, 2, 2]


@pytest.mark.parametrize("special", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_special_logits_give_what_softmax_gives(special: float) -> None:
    targets = torch.tensor([0, 0, 1, 1, 2, 2])
    groups = reference.group_by_class(targets, 2)
    for width in (3, 40):
        for column in (0, width - 1):
            logits = randn(6, width)
            logits[2, column] = special
            torch.testing.assert_close(
                CPP.confusion_weights(logits, *groups),
                reference.confusion_weights(logits, *groups),
                equal_nan=True,
            )
        logits[4] = special
        torch.testing.assert_close(
            CPP.confusion_weights(logits, *groups),
            reference.confusion_weights(logits, *groups),
            equal_nan=True,
        )


def symmetric(kind: str, groups: int) -> Tensor:
    alpha = torch.rand(groups, groups, generator=torch.Generator().manual_seed(groups))
    if kind == "ties":
        alpha = (alpha * 5).round() / 5
    elif kind == "padded":
        alpha[groups // 2 :] = alpha[:, groups // 2 :] = 0
    elif kind == "negative and zero":
        alpha = torch.where(alpha < 0.3, -0.0, alpha - 0.6).round(decimals=1)
    elif kind == "NaN":
        alpha = torch.where(alpha < 0.1, float("nan"), alpha)
    elif kind == "falling":
        alpha = torch.arange(groups * groups).flip(0).reshape(groups, groups).float()
    elif kind == "rising":
        alpha = torch.arange(groups * groups).reshape(groups, groups).float()
    return alpha


@pytest.mark.parametrize(
    "kind", ["random", "ties", "padded", "negative and zero", "NaN", "falling", "rising"]
)
@pytest.mark.parametrize("groups", [0, 1, 2, 5, 41, 200])
def test_top_pairs_equal_the_reference_exactly(groups: int, kind: str) -> None:
    alpha = symmetric(kind, groups)
    for given in (alpha, alpha.double(), alpha.T, alpha[:, :1].expand(-1, groups)):
        for top_m in (0, 1, 7, 300, 2**62):
            for result, expected in zip(
                CPP.top_pairs(given, top_m), reference.top_pairs(given, top_m), strict=True
            ):
                torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("targets", TARGETS.values(), ids=TARGETS)
def test_plan_is_its_three_parts_in_one(targets: Tensor, dtype: torch.dtype) -> None:
    """Zero-weight pairs of padding included, in the order of the reference."""
    targets = targets.unique(return_inverse=True)[1].to(torch.int32)
    logits = randn(len(targets), 600, dtype=dtype)
    for min_count, top_m in ((1, 5), (2, 64), (2, 1000), (3, 0)):
        groups = CPP.group_by_class(targets, min_count)
        parts = *groups, *CPP.top_pairs(CPP.confusion_weights(logits, *groups), top_m)
        for result, part in zip(CPP.plan(logits, targets, top_m, min_count), parts, strict=True):
            torch.testing.assert_close(result, part, rtol=0, atol=0)


def regularizer_case(
    batch: int, dims: tuple[int, ...], count: int, top_m: int, dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Features at a scale where overlaps neither vanish nor reach 1, and a plan."""
    features = [randn(batch, d, seed=s, dtype=dtype) for s, d in enumerate(dims)]
    logits = randn(batch, 200, seed=99, dtype=reference.accumulation_dtype(dtype)) * 3
    order, offsets, _, pairs, weights = reference.plan(logits, classes(batch, count), top_m, 2)
    return features, (order, offsets, pairs, weights)


REGULARIZERS = {
    "several layers": (36, (40, 1, 700, 17), 5, 8),
    "two classes": (12, (9,), 2, 64),
    "one class": (6, (5, 3), 1, 4),
    "padding among the pairs": (30, (33,), 4, 100),
    "no samples": (0, (4,), 1, 4),
    "no pairs": (20, (4,), 5, 0),
    "many groups": (400, (300,), 190, 64),
}


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", REGULARIZERS)
def test_regularizer_and_its_gradient_equal_float64_truth(
    case: str, dtype: torch.dtype, log: bool
) -> None:
    features, planned = regularizer_case(*REGULARIZERS[case], dtype)
    truth_plan = *planned[:3], planned[3].double()
    doubles = [z.double() for z in features]
    truth = reference.regularizer(doubles, *truth_plan, EPS, log)
    value, means, variances, distance = CPP.regularizer(features, *planned, EPS, log)
    positive = planned[3] > 0
    distances = truth[3][:, positive]
    # exp(-D) amplifies the relative error of D by D.
    scale = 4 * max([1.0, *distances.flatten().tolist()])
    assert_near(value, truth[0], scale)
    assert_near(distance[:, positive], distances, 4)
    for result in (*means, *variances, distance):
        assert result.isfinite().all()
    for k in planned[2][positive].unique():
        for mean, var, true_mean, true_var in zip(means, variances, *truth[1:3], strict=True):
            assert_near(mean[k], true_mean[k])
            assert_near(var[k], true_var[k])

    grad = torch.tensor(-1.5, dtype=value.dtype)
    saved = (means, variances, distance, *planned)
    actual = CPP.regularizer_backward(grad, features, *saved, EPS, log)
    expected = reference_backward.regularizer_backward(
        grad.double(), doubles, *truth[1:], *truth_plan, EPS, log
    )
    for result, wanted in zip(actual, expected, strict=True):
        assert result.dtype == dtype
        assert_near(result, wanted, scale)


def test_layers_of_mixed_precision_share_one_call() -> None:
    features, planned = regularizer_case(24, (30, 30, 30), 4, 6, torch.float32)
    mixed = [features[0], features[1].half(), features[2].bfloat16()]
    rounded = [z.float() for z in mixed]
    value, *saved = CPP.regularizer(mixed, *planned, EPS, False)
    expected, *expected_saved = CPP.regularizer(rounded, *planned, EPS, False)
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    one = torch.ones(())
    grads = CPP.regularizer_backward(one, mixed, *saved, *planned, EPS, False)
    wanted = CPP.regularizer_backward(one, rounded, *expected_saved, *planned, EPS, False)
    for z, grad, full in zip(mixed, grads, wanted, strict=True):
        torch.testing.assert_close(grad, full.to(z.dtype), rtol=0, atol=0)


def test_rounding_to_half_precision_is_torchs() -> None:
    """Subnormals, overflow, NaN and ties, through the one place that rounds."""
    bits = torch.arange(-(2**31), 2**31, 65_521, dtype=torch.int64).to(torch.int32)
    values = torch.cat([bits.view(torch.float32), torch.tensor([65519.0, 65520.0, 2.0**-25])])
    order, offsets = torch.arange(1), torch.tensor([0, 1])
    for dtype in (torch.float16, torch.bfloat16):
        z = torch.zeros(1, len(values), dtype=dtype)
        zero, one = torch.zeros(1, len(values)), torch.ones(1, len(values))
        grad = CPP.class_moments_backward(values[None], zero, z, zero, one, order, offsets, EPS)
        torch.testing.assert_close(grad[0], values.to(dtype), rtol=0, atol=0, equal_nan=True)
        halves = torch.arange(2**16).to(torch.uint16).view(dtype)[None]
        mean, _ = CPP.class_moments(halves, order, offsets, EPS)
        torch.testing.assert_close(mean, halves.float(), rtol=0, atol=0, equal_nan=True)


def strided(t: Tensor) -> Iterator[Tensor]:
    """The same values in layouts that reach a kernel in practice."""
    if t.dim() == 0:
        yield torch.stack([t + 1, t])[1]
        return
    yield torch.stack([t, t + 1], dim=-1)[..., 0]
    yield torch.cat([t + 1, t], dim=-1)[..., t.shape[-1] :]
    if t.dim() == 2:
        yield t.T.contiguous().T
        yield torch.cat([t, t])[: t.shape[0]].flip(0).flip(0)


def operations(dtype: torch.dtype = torch.float32) -> dict[str, tuple[Any, ...]]:
    """Valid arguments of every operation."""
    features, planned = regularizer_case(40, (21, 530), 7, 9, dtype)
    order, offsets, pairs, weights = planned
    z = features[1]
    logits, targets = randn(40, 70, seed=5, dtype=dtype), classes(40, 7)
    groups = reference.group_by_class(targets, 2)
    mean, var = reference.class_moments(z, order, offsets, EPS)
    alpha = reference.confusion_weights(logits, *groups)
    saved = reference.regularizer(features, *planned, EPS, True)[1:]
    scalar = torch.tensor(0.7, dtype=mean.dtype)
    return {
        "group_by_class": (targets, 2),
        "class_moments": (z, order, offsets, EPS),
        "class_moments_backward": (var, mean, z, mean, var, order, offsets, EPS),
        "confusion_weights": (logits, *groups),
        "top_pairs": (alpha, 11),
        "plan": (logits, targets, 11, 2),
        "pair_distance": (mean, var, pairs, EPS),
        "pair_distance_backward": (weights, mean, var, pairs, EPS),
        "all_pair_distance": (mean, var, EPS),
        "all_pair_distance_backward": (alpha, mean, var, EPS),
        "weighted_overlap": (mean, var, alpha, EPS, True),
        "weighted_overlap_backward": (scalar, scalar, mean, var, alpha, EPS, False),
        "regularizer": (features, *planned, EPS, False),
        "regularizer_backward": (scalar, features, *saved, *planned, EPS, True),
    }


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", operations())
def test_every_argument_is_read_by_its_strides(name: str, dtype: torch.dtype) -> None:
    arguments = operations(dtype)[name]
    operation = getattr(CPP, name)
    expected = flat(operation(*arguments))
    for position, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            variants = list(strided(argument))
        elif isinstance(argument, list):
            variants = [list(v) for v in zip(*map(strided, argument), strict=True)]
        else:
            continue
        for variant in variants:
            given = (*arguments[:position], variant, *arguments[position + 1 :])
            for result, wanted in zip(flat(operation(*given)), expected, strict=True):
                torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def test_expanded_features_and_gradients_are_read_by_their_strides() -> None:
    arguments = operations()
    z, order, offsets, _ = arguments["class_moments"]
    row = z[:1].expand(len(z), -1)
    copies = row.contiguous()
    mean, var = CPP.class_moments(copies, order, offsets, EPS)
    torch.testing.assert_close(CPP.class_moments(row, order, offsets, EPS), (mean, var))
    ones = torch.ones(()).expand(mean.shape)
    for g in (ones, mean[:1].expand(mean.shape)):
        expected = CPP.class_moments_backward(
            g.contiguous(), g.contiguous(), copies, mean, var, order, offsets, EPS
        )
        actual = CPP.class_moments_backward(g, g, row, mean, var, order, offsets, EPS)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


LARGE = (260, (1100, 40, 2000), 60, 300)  # several slices, above every grain


def large_operations() -> dict[str, tuple[Any, ...]]:
    features, planned = regularizer_case(*LARGE, torch.float32)
    order, offsets = planned[:2]
    logits, targets = randn(260, 3000, seed=5), classes(260, 60)
    mean, var = reference.class_moments(features[2], order, offsets, EPS)
    saved = CPP.regularizer(features, *planned, EPS, True)[1:]
    groups = CPP.group_by_class(targets, 2)
    return {
        "class_moments": (features[2], order, offsets, EPS),
        "class_moments_backward": (mean, var, features[2], mean, var, order, offsets, EPS),
        "confusion_weights": (logits, *groups),
        "plan": (logits, targets, 300, 2),
        "regularizer": (features, *planned, EPS, True),
        "regularizer_backward": (torch.ones(()), features, *saved, *planned, EPS, True),
    }


@pytest.mark.parametrize(
    "name",
    [
        "class_moments",
        "class_moments_backward",
        "confusion_weights",
        "plan",
        "regularizer",
        "regularizer_backward",
    ],
)
def test_result_is_bitwise_the_same_for_any_number_of_threads(name: str) -> None:
    arguments = large_operations()[name]
    operation = getattr(CPP, name)
    expected = flat(operation(*arguments))
    for threads in (2, 3, 7, 1):
        torch.set_num_threads(threads)
        for _ in range(2):
            for result, wanted in zip(flat(operation(*arguments)), expected, strict=True):
                assert torch.equal(result, wanted)


def replaced(name: str, position: int, value: Any) -> tuple[Any, ...]:
    arguments = operations()[name]
    return (*arguments[:position], value, *arguments[position + 1 :])


BAD = [
    ("group_by_class", 0, torch.rand(4), "targets"),
    ("group_by_class", 0, torch.zeros(2, 2, dtype=torch.int64), "targets"),
    ("group_by_class", 1, 0, "min_count"),
    ("class_moments", 0, torch.rand(40), "z"),
    ("class_moments", 0, torch.zeros(40, 2, dtype=torch.int64), "z"),
    ("class_moments", 1, torch.arange(39), "order"),
    ("class_moments", 1, torch.arange(40) + 1, "order"),
    ("class_moments", 1, torch.arange(40) - 1, "order"),
    ("class_moments", 1, torch.arange(40).int(), "order"),
    ("class_moments", 2, torch.tensor([0, 7, 5]), "offsets"),
    ("class_moments", 2, torch.tensor([0, 41]), "offsets"),
    ("class_moments", 2, torch.tensor([-1, 4]), "offsets"),
    ("class_moments", 2, torch.zeros(0, dtype=torch.int64), "offsets"),
    ("class_moments_backward", 0, torch.rand(3, 3), "grad_mean"),
    ("class_moments_backward", 1, torch.rand(20, 530).double(), "grad_var"),
    ("class_moments_backward", 3, torch.rand(20, 529), "mean"),
    ("class_moments_backward", 4, torch.rand(19, 530), "var"),
    ("confusion_weights", 0, torch.rand(41, 70), "order"),
    ("confusion_weights", 3, torch.full((20,), 70), "classes"),
    ("confusion_weights", 3, torch.zeros(19, dtype=torch.int64), "classes"),
    ("top_pairs", 0, torch.rand(4, 5), "alpha"),
    ("top_pairs", 0, torch.rand(4, 4).half(), "alpha"),
    ("top_pairs", 1, -1, "top_m"),
    ("plan", 0, torch.rand(39, 70), "targets"),
    ("plan", 1, torch.full((40,), 70), "targets"),
    ("plan", 1, torch.full((40,), -1), "targets"),
    ("plan", 2, -1, "top_m"),
    ("plan", 3, 0, "min_count"),
    ("pair_distance", 1, torch.rand(20, 1), "var"),
    ("pair_distance", 2, torch.tensor([[0, 20]]), "pairs"),
    ("pair_distance", 2, torch.tensor([[-1, 2]]), "pairs"),
    ("pair_distance", 2, torch.tensor([[0, 1, 2]]), "pairs"),
    ("pair_distance_backward", 0, torch.rand(3), "grad"),
    ("all_pair_distance", 0, torch.rand(3), "mean"),
    ("all_pair_distance_backward", 0, torch.rand(20, 19), "grad"),
    ("weighted_overlap", 2, torch.rand(19, 19), "alpha"),
    ("weighted_overlap_backward", 0, torch.rand(1), "grad"),
    ("weighted_overlap_backward", 1, torch.rand(()).double(), "value"),
    ("regularizer", 0, [], "features"),
    ("regularizer", 0, [torch.rand(40, 3), torch.rand(39, 3)], "features"),
    ("regularizer", 0, [torch.rand(40, 3).double()], "features"),
    ("regularizer", 3, torch.full((9, 2), 20), "pairs"),
    ("regularizer", 4, torch.rand(8), "weights"),
    ("regularizer_backward", 0, torch.rand(2), "grad"),
    ("regularizer_backward", 2, [torch.rand(20, 21)], "mean"),
    ("regularizer_backward", 3, [torch.rand(20, 21), torch.rand(20, 529)], "var"),
    ("regularizer_backward", 4, torch.rand(2, 8), "distance"),
]


@pytest.mark.parametrize(("name", "position", "value", "argument"), BAD)
def test_a_bad_argument_is_an_error_that_names_it(
    name: str, position: int, value: Any, argument: str
) -> None:
    with pytest.raises(RuntimeError, match=rf"cwbr_fused: {argument}: expected"):
        getattr(CPP, name)(*replaced(name, position, value))
