"""Inputs for the tests of the kernels of every backend, and the truth they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cwbr_fused import reference
from cwbr_fused.operations import extension
from cwbr_fused.operations.schema import written as written

EPS = 1e-6
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
ACCUMULATION_DTYPES = (torch.float32, torch.float64)
# What rounding the result to its dtype, and the sums before it, may cost relative to its scale.
TOLERANCE = {
    torch.float32: 2e-6,
    torch.float64: 2e-13,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
needs_cpu_kernels = pytest.mark.skipif(
    extension.missing("cpu") is not None, reason=str(extension.missing("cpu"))
)
# What pytest does with the tests of the C++ kernels on the CPU.
CPU_KERNELS = [needs_cpu_kernels, pytest.mark.usefixtures("one_thread")]


def randn(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def rand(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def classes(size: int, count: int, seed: int = 0, device: str = "cpu") -> Tensor:
    drawn = torch.randint(count, (size,), generator=torch.Generator().manual_seed(seed))
    return drawn.to(device)


# (B,) targets.
TARGETS = {
    "random": classes(57, 19),
    "more classes than samples": classes(40, 500),
    "one class": torch.full((7,), 3),
    "all singletons": torch.arange(9).flip(0),
    "one sample": torch.tensor([4]),
    "no samples": torch.zeros(0, dtype=torch.int64),
    "high bytes only": torch.tensor([3 << 40, 1 << 40, 2 << 40, 1 << 40, 3 << 40]),
}

# Weights (K, K) in which the choice of pairs, or their order, may go wrong.
WEIGHTS: dict[str, Callable[[int], Tensor]] = {
    "random": lambda k: rand(k, k),
    "equal": lambda k: torch.ones(k, k),
    "many ties": lambda k: (rand(k, k) * 4).floor(),
    "mostly zero": lambda k: rand(k, k) * (rand(k, k, seed=1) < 0.05),
    "tiny, huge and negative": lambda k: randn(k, k) * 10.0 ** (randn(k, k, seed=1) * 9),
    "negative and both zeros": lambda k: torch.where(
        rand(k, k) < 0.3, -0.0, rand(k, k) - 0.6
    ).round(decimals=1),
    "zero beyond the groups in use": lambda k: (
        rand(k, k) * (torch.arange(k) < k // 2).outer(torch.arange(k) < k // 2)
    ),
    "infinite": lambda k: torch.where(rand(k, k) < 0.1, float("inf"), rand(k, k)),
    "nan": lambda k: torch.where(rand(k, k) < 0.1, float("nan"), rand(k, k)),
    "falling": lambda k: torch.arange(k * k).flip(0).reshape(k, k).float(),
    "rising": lambda k: torch.arange(k * k).reshape(k, k).float(),
}


def planned(
    batch: int, count: int, top_m: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """order, offsets, pairs, weights by the reference; some groups are empty."""
    logits = randn(batch, count, seed=1, dtype=dtype, device=device)
    targets = classes(batch, count, device=device)
    order, offsets, _, pairs, weights = reference.plan(logits, targets, top_m, 2)
    return order, offsets, pairs, weights


def regularizer_case(
    batch: int, dims: tuple[int, ...], count: int, top_m: int, dtype: torch.dtype
) -> tuple[list[Tensor], tuple[Tensor, ...]]:
    """Features at a scale where overlaps neither vanish nor reach 1, and a plan."""
    features = [randn(batch, d, seed=s, dtype=dtype) for s, d in enumerate(dims)]
    logits = randn(batch, 200, seed=99, dtype=reference.accumulation_dtype(dtype)) * 3
    order, offsets, _, pairs, weights = reference.plan(logits, classes(batch, count), top_m, 2)
    return features, (order, offsets, pairs, weights)


def regularizer_with_moments(
    features: Sequence[Tensor], order: Tensor, offsets: Tensor, *others: Any
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """`reference.regularizer` as on a GPU, where the moments of every layer are among its results.

    Args:
        others: pairs, weights, eps, log.
    """
    value, *_, distance = reference.regularizer(features, order, offsets, *others)
    moments = [reference.class_moments(z, order, offsets, others[2]) for z in features]
    return value, [mean for mean, _ in moments], [var for _, var in moments], distance


def symmetric(groups: int, dtype: torch.dtype, device: str = "cpu") -> Tensor:
    """Weights (K, K) >= 0 with zero diagonal."""
    alpha = rand(groups, groups, seed=5, dtype=dtype, device=device).triu(1)
    return alpha + alpha.T


def assert_near(actual: Tensor, truth: Tensor, scale: float = 1) -> None:
    """Relative to the largest element of the truth, `scale` times the tolerance of the dtype."""
    assert actual.shape == truth.shape
    largest = float(truth.abs().max()) if truth.numel() else 0
    underflow = torch.finfo(actual.dtype).smallest_normal
    bound = TOLERANCE[actual.dtype] * max(scale * largest, underflow)
    torch.testing.assert_close(actual.double(), truth.double(), rtol=0, atol=bound, equal_nan=True)


def outcome(operation: Callable[..., Any], name: str, arguments: Sequence[Any]) -> list[Tensor]:
    """All that a call of `name` gives: its results, and copies of the arguments that it writes."""
    given = list(arguments)
    for position in written(name):
        given[position] = map_tensors(Tensor.clone, given[position])
    return [*flat(operation(*given)), *flat([given[i] for i in written(name)])]


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """`value`, or in its place what `function` makes of it, or of each tensor in a list of them."""
    if isinstance(value, list):
        return [map_tensors(function, item) for item in value]
    return function(value) if isinstance(value, Tensor) else value


def flat(result: Any) -> list[Tensor]:
    if result is None:
        return []
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in flat(part)]
