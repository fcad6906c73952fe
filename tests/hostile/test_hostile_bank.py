"""Hostile inputs to the class bank: its two operations on every backend, and `CWBR` itself.

The property is that of test_hostile.py. The CUDA kernels run on the emulated GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hostile import (
    DTYPES,
    FEATURES,
    INDEX_DTYPES,
    INF,
    LAYOUTS,
    LOGITS,
    NAN,
    TARGETS,
)
from hypothesis import given
from kernel_backends import Kernels, kernels_of
from one_layer import REFERENCE, OneLayer
from test_hostile import BACKENDS, examples
from test_hostile_pairs import VARIANCES
from torch import Tensor

from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.operations.reference import accumulation_dtype

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def kernels(backend: str) -> OneLayer:
    if backend == "reference":
        return OneLayer(Kernels(OPERATIONS["reference"], "cpu"))
    return OneLayer(kernels_of(backend))


def randn(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def every_second(x: Tensor) -> Tensor:
    """The same values, two elements of the storage apart."""
    return torch.stack([x, x], dim=-1)[..., 0]


# What standard normal logits of samples with these targets become, beside those of hostile.py.
CONFUSION_LOGITS = LOGITS | {
    "masked": lambda x, y, seed: torch.where(x < 0.5, -INF, x),
    "all but one -inf": lambda x, y, seed: torch.where(x < x.amax(1, keepdim=True), -INF, x),
    "both zeros": lambda x, y, seed: torch.where(x < 0.5, -0.0, 0.0).double(),
    "large equal": lambda x, y, seed: torch.full_like(x, 3e8),
    "inf and nan": lambda x, y, seed: torch.where(x > 1.5, INF, torch.where(x < -2, NAN, x)),
    "both signs of 1e38": lambda x, y, seed: x.sign() * 3e38,
}
SEEN = {
    "all": lambda classes, seed: torch.ones((), dtype=torch.bool).expand(classes),
    "none": lambda classes, seed: torch.zeros(classes, dtype=torch.bool),
    "last": lambda classes, seed: torch.arange(classes) == classes - 1,
    "some": lambda classes, seed: every_second(randn(classes, seed=seed) > 0),
}


@dataclass(frozen=True)
class Confusions:
    seed: int
    batch: int
    classes: int
    targets: str
    index_dtype: str
    logits: str
    layout: str
    dtype: str
    seen: str
    top: int

    def build(self) -> tuple[Tensor, Tensor, Tensor]:
        targets = TARGETS[self.targets](self.batch, self.classes, self.seed)
        logits = randn(self.batch, self.classes, seed=self.seed)
        logits = CONFUSION_LOGITS[self.logits](logits, targets, self.seed)
        logits = LAYOUTS[self.layout](logits.to(DTYPES[self.dtype]))
        targets = every_second(targets.to(INDEX_DTYPES[self.index_dtype]))
        return logits, targets, SEEN[self.seen](self.classes, self.seed)


def confusions(backend: str) -> st.SearchStrategy[Confusions]:
    any_index = backend != "cuda"  # its launcher converts them, and the emulated GPU has none
    return st.builds(
        Confusions,
        seed=st.integers(0, 1000),
        batch=st.integers(0, 9),
        classes=st.sampled_from([1, 2, 3, 5, 16, 17, 70]),
        targets=st.sampled_from(list(TARGETS)),
        index_dtype=st.sampled_from(list(INDEX_DTYPES) if any_index else ["int64"]),
        logits=st.sampled_from(list(CONFUSION_LOGITS)),
        layout=st.sampled_from(list(LAYOUTS)),
        dtype=st.sampled_from(list(DTYPES)),
        seen=st.sampled_from(list(SEEN)),
        top=st.sampled_from([0, 1, 2, 5, 64, 2**40]),
    )


def expected_confusions(
    row: list[float], own: int, seen: list[bool], width: int
) -> tuple[list[int], list[float], float]:
    """Classes, their probabilities and the own one of a sample, from the docstring's words."""
    if not all(x < INF for x in row):
        known = not any(map(math.isnan, row)) and row[own] < INF
        return [-1] * width, [0.0] * width, 0.0 if known else NAN
    probabilities = torch.tensor(row, dtype=torch.float64).softmax(0).tolist()
    candidates = [c for c, x in enumerate(row) if seen[c] and c != own and x > -INF]
    index = sorted(candidates, key=lambda c: -row[c])[:width]
    missing = width - len(index)
    weight = [probabilities[c] for c in index] + [0.0] * missing
    return index + [-1] * missing, weight, probabilities[own]


def check_confusions(example: Confusions, backend: str) -> None:
    logits, targets, seen = arguments = example.build()
    before = [t.clone() for t in arguments]
    index, weight, own = kernels(backend)("top_confusions", *arguments, example.top)
    for old, new in zip(before, arguments, strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)

    width = max(0, min(example.top, example.classes - 1))
    dtype = accumulation_dtype(logits.dtype)
    assert (index.shape, index.dtype) == ((example.batch, width), torch.int64)
    assert (weight.shape, weight.dtype) == ((example.batch, width), dtype)
    assert (own.shape, own.dtype) == ((example.batch,), dtype)
    close = {"rtol": 1e-11 if dtype == torch.float64 else 2e-5, "atol": 1e-37, "equal_nan": True}
    rows = zip(logits.double().tolist(), targets.tolist(), strict=True)
    for sample, (row, target) in enumerate(rows):
        classes, weights, probability = expected_confusions(row, target, seen.tolist(), width)
        assert index[sample].tolist() == classes
        wanted = torch.tensor([*weights, probability], dtype=torch.float64)
        found = torch.cat([weight[sample], own[sample : sample + 1]]).double()
        torch.testing.assert_close(found, wanted, **close)


# What standard normal coefficients become.
COEFFICIENTS = {
    "normal": lambda x: x,
    "zero": torch.zeros_like,
    "cancelling": lambda x: x.sign() * (1 - 2 * (torch.arange(x.shape[1]) % 2)),
    "tiny": lambda x: x * 1e-35,
    "1e30": lambda x: x * 1e30,
    "some nan": lambda x: torch.where(x > 1.5, NAN, x),
}


@dataclass(frozen=True)
class Attraction:
    seed: int
    batch: int
    classes: int
    dims: int
    chosen: int
    features: str
    mean: str
    var: str
    coefficients: str
    missing: float
    layout: str
    mean_layout: str
    dtype: str

    def build(self) -> tuple[Tensor, ...]:
        """z, mean, var, index, coefficient; the coefficients of index -1 are NaN."""
        dtype = DTYPES[self.dtype]
        accumulation = accumulation_dtype(dtype)
        rows, classes = torch.arange(self.batch), torch.arange(self.classes)
        z = FEATURES[self.features](randn(self.batch, self.dims, seed=self.seed), rows, self.seed)
        mean = randn(self.classes, self.dims, seed=self.seed + 1)
        mean = FEATURES[self.mean](mean, classes, self.seed + 1)
        var = VARIANCES[self.var](randn(self.dims, seed=self.seed + 2))
        drawn = randn(self.batch, self.chosen, seed=self.seed + 3)
        index = (drawn.abs() * 1000).long() % self.classes
        index = torch.where(drawn.frac().abs() < self.missing, -1, index)
        coefficient = COEFFICIENTS[self.coefficients](
            randn(self.batch, self.chosen, seed=self.seed + 4)
        )
        coefficient = torch.where(index < 0, NAN, coefficient)
        return (
            LAYOUTS[self.layout](z.to(dtype)),
            LAYOUTS[self.mean_layout](mean.to(accumulation)),
            every_second(var.to(accumulation)),
            every_second(index),
            every_second(coefficient.to(accumulation)),
        )


ATTRACTIONS = st.builds(
    Attraction,
    seed=st.integers(0, 1000),
    batch=st.integers(0, 9),
    classes=st.sampled_from([1, 2, 5, 17]),
    dims=st.sampled_from([0, 1, 2, 7, 8, 9, 16, 17, 33, 70]),
    chosen=st.sampled_from([0, 1, 2, 6, 20]),
    features=st.sampled_from(list(FEATURES)),
    mean=st.sampled_from(list(FEATURES)),
    var=st.sampled_from(list(VARIANCES)),
    coefficients=st.sampled_from(list(COEFFICIENTS)),
    missing=st.sampled_from([0.0, 0.3, 1.0]),
    layout=st.sampled_from(list(LAYOUTS)),
    mean_layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(list(DTYPES)),
)


def rows_that_agree(
    found: tuple[Tensor, Tensor], arguments: tuple[Tensor, ...], unit: float, tiny: float
) -> Tensor:
    """Which samples' energy and gradient are those of the reference in the arguments' dtype.

    Near it, relative to the sum of what they are the differences of, and to what products below
    the normal range lose; where the reference is not finite, not finite either.
    """
    z, mean, var, index, coefficient = arguments
    energy, gradient = REFERENCE("class_attraction", z, mean, var, index, coefficient)
    size, _ = REFERENCE("class_attraction", z, mean, var, index, coefficient.abs())
    used = (index >= 0)[:, :, None]
    difference = torch.where(used, z[:, None] - mean[index.clamp(min=0)], 0)
    strength = torch.where(used, coefficient[:, :, None].abs(), 0)
    gradient_size = (strength * difference.abs()).sum(1) / var
    lost = 30 * tiny * (1 + strength.nan_to_num().sum(1)) * (1 + 1 / var).nan_to_num()
    largest = torch.finfo(found[0].dtype).max
    relative = (20 + 2 * var.shape[0] + index.shape[1]) * unit
    results = (
        (found[0], energy, relative * size + lost.sum(1)),
        (found[1], gradient, relative * gradient_size + lost),
    )
    agrees = []
    for actual, wanted, bound in results:
        near = (actual.double() - wanted.double()).abs() <= bound.double()
        # A sum may leave the range before it is halved.
        at_edge = ~actual.isfinite() & (bound > relative * largest / 8)
        same = torch.where(wanted.isfinite(), near | at_edge, ~actual.isfinite())
        agrees.append(same if same.dim() == 1 else same.all(1))
    return agrees[0] & agrees[1]


def check_attraction(example: Attraction, backend: str) -> None:
    arguments = example.build()
    before = [t.clone() for t in arguments]
    energy, gradient = found = kernels(backend)("class_attraction", *arguments)
    for old, new in zip(before, arguments, strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    z, mean, var, index, coefficient = arguments
    assert energy.shape == (example.batch,)
    assert gradient.shape == (example.batch, example.dims)
    assert energy.dtype == gradient.dtype == mean.dtype
    info = torch.finfo(mean.dtype)
    near = (z.to(mean.dtype), mean, var, index, coefficient)
    wide = (z.double(), mean.double(), var.double(), index, coefficient.double())
    good = rows_that_agree(found, near, info.eps, info.tiny)
    good |= rows_that_agree(found, wide, info.eps, info.tiny)
    if not (var > 0).all():  # a sum of no terms without a metric: 0 or NaN
        good |= (index < 0).all(1)
    if example.dims == 0:  # a sum of no terms times a coefficient that is no number: 0 or NaN
        good |= coefficient.isnan().any(1)
    assert good.all(), (energy, REFERENCE("class_attraction", *near)[0])


COUNTS = {"cpu": 500, "reference": 200, "triton": 20, "cuda": 60}


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_no_logits_are_confused_with_the_wrong_classes(backend: str) -> None:
    kernels(backend)  # skips where there are none

    @examples(COUNTS[backend], backend)
    @given(example=confusions(backend))
    def holds(example: Confusions) -> None:
        check_confusions(example, backend)

    holds()


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
def test_no_sample_is_attracted_by_a_silently_wrong_force(backend: str) -> None:
    kernels(backend)  # skips where there are none

    @examples(COUNTS[backend], backend)
    @given(example=ATTRACTIONS)
    def holds(example: Attraction) -> None:
        check_attraction(example, backend)

    holds()
