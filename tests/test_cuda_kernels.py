"""The CUDA kernels, executed on an emulated GPU, against float64 truth.

The kernels' source is the one that nvcc compiles. The emulation shuffles the order of threads and
blocks, fills shared memory and results with NaN, faults on accesses outside of a tensor, and gives
the fast reciprocal and logarithm the largest errors that NVIDIA documents for them.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from emulation.harness import EmulationError, Emulator, emulated_library
from torch import Tensor

from cwbr_fused import reference, reference_backward
from cwbr_fused.reference import accumulation_dtype

EPS = 1e-6
INPUT_DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [torch.float64, torch.float32]
# Relative to the largest magnitude of the result; for half precisions one rounding of it.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}


@pytest.fixture(params=[0, 1], ids=["order0", "order1"])
def gpu(request: pytest.FixtureRequest) -> Emulator:
    emulator = Emulator(emulated_library())
    emulator.seed = request.param
    return emulator


def random(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_targets(batch: int, classes: int) -> Tensor:
    return torch.randint(0, classes, (batch,), generator=torch.Generator().manual_seed(batch))


def moments(rows: int, dims: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Means of spread 1; variances over four orders of magnitude, some of them at the clamp."""
    var = (2 * random(rows, dims, seed=1)).exp() / 10
    var = torch.where(random(rows, dims, seed=2) > 1.5, EPS, var)
    return random(rows, dims, dtype=dtype), var.to(dtype)


def some_pairs(rows: int) -> Tensor:
    """Pairs with repetitions, in both orders, and one of a row with itself."""
    listed = [[i % rows, (i * i + 1) % rows] for i in range(9)]
    return torch.tensor([*listed, [0, rows - 1], [rows - 1, 0], [0, 0]])


def doubles(args: Any) -> Any:
    if isinstance(args, Tensor):
        return args.double() if args.is_floating_point() else args
    return [doubles(arg) for arg in args] if isinstance(args, (list, tuple)) else args


def assert_close(ours: Any, truth: Any, factor: float = 1) -> None:
    if not isinstance(ours, Tensor):
        for one, true in zip(ours, truth, strict=True):
            assert_close(one, true, factor)
    elif ours.is_floating_point():
        size = float(truth.abs().max()) if truth.numel() else 0.0
        kind = torch.finfo(ours.dtype)
        bound = factor * TOLERANCE[ours.dtype] * size + kind.smallest_normal * kind.eps
        torch.testing.assert_close(ours.double(), truth.double(), rtol=0, atol=bound)
    else:
        assert torch.equal(ours, truth)


def check(gpu: Emulator, name: str, *args: Any, factor: float = 1) -> Any:
    """The emulated operation agrees with the pure-PyTorch one in float64; returns its result."""
    module = reference_backward if name.endswith("_backward") else reference
    ours = getattr(gpu, name)(*args)
    assert_close(ours, getattr(module, name)(*doubles(args)), factor)
    return ours


@pytest.mark.parametrize(("batch", "classes"), [(1, 1), (2, 1), (37, 13), (300, 100), (4100, 900)])
@pytest.mark.parametrize("min_count", [1, 2, 3])
def test_groups_are_those_of_the_definition(
    gpu: Emulator, batch: int, classes: int, min_count: int
) -> None:
    check(gpu, "group_by_class", random_targets(batch, classes), min_count)
    assert gpu.launches == 1


@pytest.mark.parametrize("dims", [1, 7, 8, 520])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("classes", [3, 25])
def test_moments_and_their_gradient(
    gpu: Emulator, dims: int, dtype: torch.dtype, classes: int
) -> None:
    order, offsets, _ = reference.group_by_class(random_targets(37, classes), 2)
    z = random(37, dims, dtype=dtype)
    mean, var = check(gpu, "class_moments", z, order, offsets, EPS)
    assert gpu.launches == 1
    grads = [random(*mean.shape, dtype=mean.dtype, seed=s) for s in (1, 2)]
    check(gpu, "class_moments_backward", *grads, z, mean, var, order, offsets, EPS)
    assert gpu.launches == 1


def test_no_gradient_passes_a_clamped_variance(gpu: Emulator) -> None:
    z = random(6, 5, dtype=torch.float32)
    z[:, 2] = 0.25
    order, offsets, _ = reference.group_by_class(torch.tensor([4, 1, 1, 4, 4, 9]), 2)
    mean, var = gpu.class_moments(z, order, offsets, EPS)
    zeros, ones = torch.zeros_like(mean), torch.ones_like(var)
    grad = gpu.class_moments_backward(zeros, ones, z, mean, var, order, offsets, EPS)
    assert (grad[:, 2] == 0).all()
    assert (grad[5] == 0).all()
    assert (grad[:5, 0] != 0).all()


def test_variances_far_from_zero_are_as_good_as_eager(gpu: Emulator) -> None:
    z = (1000 + random(64, 33)).float()
    order, offsets, _ = reference.group_by_class(random_targets(64, 4), 2)
    truth = reference.class_moments(z.double(), order, offsets, EPS)[1]
    ours = gpu.class_moments(z, order, offsets, EPS)[1].double()
    eager = reference.class_moments(z, order, offsets, EPS)[1].double()
    assert (ours - truth).abs().max() <= max((eager - truth).abs().max(), 1e-6 * truth.max())


@pytest.mark.parametrize("columns", [13, 14, 100, 1003])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("spread", [3, 30])
def test_confusion_weights(gpu: Emulator, columns: int, dtype: torch.dtype, spread: float) -> None:
    groups = reference.group_by_class(random_targets(90, 13), 2)
    logits = (spread * random(90, columns)).to(dtype)
    check(gpu, "confusion_weights", logits, *groups, factor=4)
    assert gpu.launches == 2


@pytest.mark.parametrize("columns", [2, 3, 5])
def test_confusion_weights_of_few_classes_and_many_samples(gpu: Emulator, columns: int) -> None:
    groups = reference.group_by_class(random_targets(150, columns), 2)
    check(gpu, "confusion_weights", random(150, columns, dtype=torch.float16), *groups)


def test_masked_logits_have_no_weight_and_nan_stays_in_its_row(gpu: Emulator) -> None:
    y = torch.arange(5).repeat(8)
    groups = reference.group_by_class(y, 2)
    logits = random(40, 300, dtype=torch.float32)
    logits[:, 100:] = -torch.inf
    check(gpu, "confusion_weights", logits, *groups)
    logits[2, 7] = torch.nan
    alpha = gpu.confusion_weights(logits, *groups)
    assert (alpha.isnan() == reference.confusion_weights(logits, *groups).isnan()).all()
    assert alpha[2, 3].isnan()
    assert not alpha[0, 1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "top_m"), [(2, 5), (20, 1), (20, 64), (130, 300), (130, 9000)])
def test_top_pairs(gpu: Emulator, dtype: torch.dtype, rows: int, top_m: int) -> None:
    alpha = random(rows, rows, dtype=dtype)
    check(gpu, "top_pairs", alpha, top_m)
    assert gpu.launches == 2


def test_ties_go_to_the_smaller_pair_and_nan_is_largest(gpu: Emulator) -> None:
    alpha = torch.zeros(100, 100)
    check(gpu, "top_pairs", alpha, 30)
    alpha[40, 41] = torch.nan
    alpha[3, 90] = torch.inf
    alpha[2, 3] = -0.0
    alpha[0, 1:] = -1.0
    ours, truth = gpu.top_pairs(alpha, 4000), reference.top_pairs(alpha, 4000)
    assert torch.equal(ours[0], truth[0])
    assert torch.equal(ours[1].nan_to_num(7), truth[1].nan_to_num(7))


@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("top_m", [0, 5, 200])
def test_plan_is_its_three_parts_in_four_launches(
    gpu: Emulator, dtype: torch.dtype, top_m: int
) -> None:
    logits, y = random(60, 21, dtype=dtype), random_targets(60, 21)
    check(gpu, "plan", logits, y, top_m, 2)
    assert gpu.launches <= 4


@pytest.mark.parametrize("dims", [1, 6, 8, 1030])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_distance_and_its_gradient(gpu: Emulator, dims: int, dtype: torch.dtype) -> None:
    mean, var = moments(7, dims, dtype)
    pairs = some_pairs(7)
    check(gpu, "pair_distance", mean, var, pairs, EPS)
    check(gpu, "pair_distance_backward", random(12, dtype=dtype), mean, var, pairs, EPS)
    assert gpu.launches == 2


def test_lists_of_pairs_longer_than_a_block(gpu: Emulator) -> None:
    mean, var = moments(40, 5, torch.float32)
    pairs = torch.triu_indices(40, 40, offset=1).T
    grad = random(len(pairs), dtype=torch.float32)
    check(gpu, "pair_distance_backward", grad, mean, var, pairs, EPS)


@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.parametrize(("rows", "dims"), [(2, 1), (3, 333), (65, 40), (130, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_pair_distance_and_its_gradient(
    gpu: Emulator, rows: int, dims: int, dtype: torch.dtype, processors: int
) -> None:
    gpu.processors = processors
    mean, var = moments(rows, dims, dtype)
    distance = check(gpu, "all_pair_distance", mean, var, EPS)
    assert gpu.launches == 2
    assert (distance.diagonal() == 0).all()
    assert torch.equal(distance, distance.T)
    check(gpu, "all_pair_distance_backward", random(rows, rows, dtype=dtype), mean, var, EPS)


def all_pairs_of(case: str) -> tuple[Tensor, Tensor]:
    """Rows that are hard on float32."""
    mean, var = random(20, 173), (random(20, 173, seed=1) / 2).exp()
    if case == "means of 1000":
        mean += 1000
    elif case == "variances from 1e-6 to 1e6 in a row":
        var = 10 ** (12 * torch.rand(20, 173, generator=torch.Generator().manual_seed(0)) - 6)
    elif case == "all variances at the clamp":
        var = torch.full_like(var, 1e-6)
    elif case == "all variances large":
        var *= 1e6
    elif case == "nearly equal rows":
        mean, var = mean[:1] + 1e-3 * mean, var[:1] * (1 + 1e-3 * var)
    elif case == "half the variances at the clamp":
        var = torch.where(random(20, 173, seed=2) > 0, 1e-6, var)
    return mean.float(), var.float()


CASES = [
    "ordinary",
    "means of 1000",
    "variances from 1e-6 to 1e6 in a row",
    "all variances at the clamp",
    "all variances large",
    "nearly equal rows",
    "half the variances at the clamp",
]


def relative_errors(
    ours: Tensor, eager: Tensor, truth: Tensor, size: Tensor
) -> tuple[float, float]:
    return tuple(float(((x.double() - truth).abs() / size).max()) for x in (ours, eager))


@pytest.mark.parametrize("case", CASES)
def test_all_pairs_err_no_more_than_float32_eager(gpu: Emulator, case: str) -> None:
    """Errors are measured against 1 + D, because it is exp(-D) that counts.

    Eager is the published formula in float32. Beyond it, the fast logarithm of eight dimensions may
    be off by its documented 2^-22, that is D by 2^-23.
    """
    mean, var = all_pairs_of(case)
    truth = reference.all_pair_distance(mean.double(), var.double(), EPS)
    eager, ours = oracle.distance(mean, var, EPS), gpu.all_pair_distance(mean, var, EPS)
    error, allowed = relative_errors(ours, eager, truth, 1 + truth)
    assert error <= max(allowed, 2**-20) + mean.shape[1] / 8 * 2**-23 / (1 + float(truth.max()))


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_all_pairs_err_no_more_than_float32_eager(gpu: Emulator, case: str) -> None:
    """Eager is autograd through the published formula; errors are relative to a row's largest."""
    mean, var = all_pairs_of(case)
    grad = random(20, 20, dtype=torch.float32)
    truth = reference_backward.all_pair_distance_backward(*doubles((grad, mean, var)), EPS)
    leaves = [t.clone().requires_grad_() for t in (mean, var)]
    eager = torch.autograd.grad(oracle.distance(*leaves, EPS), leaves, grad)
    ours = gpu.all_pair_distance_backward(grad, mean, var, EPS)
    for one, plain, true in zip(ours, eager, truth, strict=True):
        error, allowed = relative_errors(one, plain, true, true.abs().amax(1, keepdim=True))
        assert error <= max(2 * allowed, 2**-20)


def test_equal_rows_are_exactly_at_distance_zero(gpu: Emulator) -> None:
    mean, var = moments(1, 300, torch.float32)
    spread = torch.logspace(-6, 6, 300)[None]
    for rows in ((mean, var), (mean, spread)):
        assert (gpu.all_pair_distance(*(r.expand(9, -1) for r in rows), EPS) == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_row_spoils_only_its_own_pairs(gpu: Emulator, bad: float) -> None:
    mean, var = moments(70, 50, torch.float32)
    mean[3, 7] = bad
    good = [i for i in range(70) if i != 3]
    distance = gpu.all_pair_distance(mean, var, EPS)
    truth = reference.all_pair_distance(mean.double(), var.double(), EPS)
    assert_close(distance[good][:, good], truth[good][:, good])
    assert not distance[3, good].isfinite().any()


@pytest.mark.parametrize("processors", [1, 40])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("rows", "dims"), [(2, 3), (66, 20), (9, 200)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_weighted_overlap_and_its_gradient(
    gpu: Emulator, rows: int, dims: int, dtype: torch.dtype, log: bool, processors: int
) -> None:
    gpu.processors = processors
    mean, var = moments(rows, dims, dtype)
    mean, var = mean / 10, (0.9 + var.clamp(max=1) / 10)
    alpha = random(rows, rows, dtype=dtype).abs()
    alpha[alpha < 0.3] = 0
    value = check(gpu, "weighted_overlap", mean, var, alpha, EPS, log, factor=4)
    assert gpu.launches == 2
    grad = torch.tensor(1.5, dtype=dtype)
    check(gpu, "weighted_overlap_backward", grad, value, mean, var, alpha, EPS, log, factor=10)


def test_far_tiles_are_given_up_without_changing_the_result(gpu: Emulator) -> None:
    mean, var = moments(70, 400, torch.float32)
    mean[60:] += 100 * torch.arange(10)[:, None]
    mean[1], var[1] = mean[0] + 0.01, var[0]
    alpha = torch.ones(70, 70)
    value = check(gpu, "weighted_overlap", mean, var, alpha, EPS, False, factor=4)
    assert value > 0
    one = torch.ones(())
    check(gpu, "weighted_overlap_backward", one, value, mean, var, alpha, EPS, False, factor=4)


@pytest.mark.parametrize("log", [False, True])
def test_no_weight_gives_zero_and_zero_gradients(gpu: Emulator, log: bool) -> None:
    mean, var = moments(5, 9, torch.float32)
    alpha, one = torch.zeros(5, 5), torch.ones(())
    value = gpu.weighted_overlap(mean, var, alpha, EPS, log)
    assert value == 0
    for grad in gpu.weighted_overlap_backward(one, value, mean, var, alpha, EPS, log):
        assert (grad == 0).all()


def planned(dtype: torch.dtype, dims: tuple[int, ...]) -> tuple[Any, ...]:
    """features, order, offsets, pairs and weights of a batch with groups of one to many samples."""
    y = torch.cat([random_targets(40, 9), torch.full((20,), 3)])
    features = [(random(60, d, seed=d) / d**0.5).to(dtype) for d in dims]
    logits = random(60, 9, dtype=accumulation_dtype(dtype))
    order, offsets, _, pairs, weights = reference.plan(logits, y, 17, 2)
    return features, order, offsets, pairs, weights


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("dtype", INPUT_DTYPES)
@pytest.mark.parametrize("dims", [(5,), (64, 7, 600)])
def test_regularizer_takes_two_launches_each_way(
    gpu: Emulator, dtype: torch.dtype, log: bool, dims: tuple[int, ...]
) -> None:
    features, order, offsets, pairs, weights = planned(dtype, dims)
    plan = (order, offsets, pairs, weights, EPS, log)
    _, mean, var, distance = check(gpu, "regularizer", features, *plan, factor=2)
    assert gpu.launches == 2
    grad = torch.tensor(0.7, dtype=weights.dtype)
    args = (grad, features, mean, var, distance, *plan)
    check(gpu, "regularizer_backward", *args, factor=4)
    assert gpu.launches == 2


def test_more_layers_than_one_launch_holds(gpu: Emulator) -> None:
    features, *plan = planned(torch.float32, (3,) * 35)
    _, mean, var, distance = check(gpu, "regularizer", features, *plan, EPS, False, factor=2)
    args = (torch.ones(()), features, mean, var, distance, *plan, EPS, False)
    check(gpu, "regularizer_backward", *args, factor=4)


def test_a_batch_without_groups_regularizes_to_zero(gpu: Emulator) -> None:
    features = [random(3, 4, dtype=torch.float32)]
    order, offsets, _, pairs, weights = reference.plan(
        torch.zeros(3, 5), torch.tensor([0, 1, 2]), 8, 4
    )
    value, mean, var, distance = gpu.regularizer(
        features, order, offsets, pairs, weights, EPS, False
    )
    assert value == 0
    args = (torch.ones(()), features, mean, var, distance, order, offsets, pairs, weights)
    (grad,) = gpu.regularizer_backward(*args, EPS, False)
    assert (grad == 0).all()


def test_nothing_in_gives_nothing_out(gpu: Emulator) -> None:
    none = torch.zeros(0, dtype=torch.long)
    check(gpu, "group_by_class", none, 2)
    groups = gpu.group_by_class(torch.tensor([1]), 2)
    check(gpu, "class_moments", torch.ones(1, 3), *groups[:2], EPS)
    check(gpu, "confusion_weights", torch.ones(1, 3), *groups)
    for rows, dims in ((0, 3), (1, 3), (5, 0)):
        mean, var, alpha = torch.zeros(rows, dims), torch.ones(rows, dims), torch.ones(rows, rows)
        check(gpu, "all_pair_distance", mean, var, EPS)
        check(gpu, "pair_distance", mean, var, torch.zeros(0, 2).long(), EPS)
        for log in (False, True):
            value = check(gpu, "weighted_overlap", mean, var, alpha, EPS, log)
            args = (torch.ones(()), value, mean, var, alpha, EPS, log)
            check(gpu, "weighted_overlap_backward", *args)


def test_results_do_not_depend_on_the_order_of_threads_or_blocks() -> None:
    mean, var = moments(70, 90, torch.float32)
    alpha, grad = random(70, 70, dtype=torch.float32).abs(), random(12, dtype=torch.float32)
    features, *plan = planned(torch.float32, (30, 9))
    y = random_targets(60, 9)

    def results(seed: int) -> list[Tensor]:
        gpu = Emulator(emulated_library(), processors=40)
        gpu.seed = seed
        value = gpu.weighted_overlap(mean, var, alpha, EPS, True)
        regularizer, *_, distance = gpu.regularizer(features, *plan, EPS, False)
        return [
            value,
            *gpu.weighted_overlap_backward(value, value, mean, var, alpha, EPS, True),
            *gpu.pair_distance_backward(grad, mean, var, some_pairs(70), EPS),
            *gpu.plan(features[0], y, 20, 2),
            regularizer,
            distance,
        ]

    first = results(1)
    for seed in (2, 3):
        for one, other in zip(first, results(seed), strict=True):
            assert torch.equal(one, other)


def test_indices_outside_their_tensor_stop_the_kernel(gpu: Emulator) -> None:
    logits, pairs = torch.zeros(4, 3), torch.tensor([[0, 5]])
    mean = var = torch.ones(5, 2)
    groups = reference.group_by_class(torch.tensor([3, 3, 0, 0]), 2)
    for y in (torch.tensor([0, 1, 3, 0]), torch.tensor([0, -1, 1, 0])):
        with pytest.raises(EmulationError, match="leaves"):
            gpu.plan(logits, y, 2, 2)
    with pytest.raises(EmulationError, match="leaves"):
        gpu.group_by_class(torch.tensor([-1, 0]), 2)
    with pytest.raises(EmulationError, match="leaves"):
        gpu.confusion_weights(logits, *groups)
    with pytest.raises(EmulationError, match="leaves"):
        gpu.pair_distance(mean, var, pairs, EPS)
    with pytest.raises(EmulationError, match="leaves"):
        gpu.pair_distance_backward(torch.ones(1), mean, var, pairs, EPS)
