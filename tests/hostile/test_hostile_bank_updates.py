"""Hostile inputs to the operations that write into the class bank, on every backend.

The property is that of test_hostile.py: right, or not finite where the definition is not, and
nothing changes that is left out. The CUDA kernels run on the emulated GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hostile import FEATURES, INF, LAYOUTS, NAN
from hypothesis import given
from test_hostile import BACKENDS, examples
from test_hostile_bank import every_second, kernels, randn
from test_hostile_pairs import VARIANCES
from torch import Tensor

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]

DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Which of K distinct classes are left out, by a negative number, for a drawn standard normal x.
LEFT_OUT = {
    "none": lambda x: x > INF,
    "some": lambda x: x > 0.5,
    "most": lambda x: x > -1.5,
    "all": lambda x: x < INF,
}
# Sizes and counts, for a drawn standard normal x.
SIZES = {
    "counts": lambda x: (3 * x.abs()).ceil(),
    "some zero": lambda x: x.abs().floor(),
    "fractions": lambda x: x.abs() / 3,
    "some negative or nan": lambda x: torch.where(x > 1.5, NAN, x),
    "1e-30 and 1e20": lambda x: torch.where(x > 0, 1e20, 1e-30),
}
COUNTS = {
    "zero": torch.zeros_like,
    "some zero": lambda x: (2 * x.abs()).floor(),
    "fractions": lambda x: x.abs() / 3,
    "1e9": lambda x: torch.full_like(x, 1e9),
}
# Moments so near the largest number that rounding decides whether they are left out are not drawn.
MEANS = {k: v for k, v in FEATURES.items() if k != "1e18"}


@dataclass(frozen=True)
class Learning:
    seed: int
    groups: int
    classes: int
    dims: int
    bank_mean: str
    bank_var: str
    count: str
    updates: float
    left_out: str
    size: str
    mean: str
    var: str
    layout: str
    momentum: float
    dtype: str

    def normal(self, salt: int, *shape: int) -> Tensor:
        return randn(*shape, seed=self.seed + salt)

    def means(self, name: str, salt: int, rows: int) -> Tensor:
        x = self.normal(salt, rows, self.dims)
        return MEANS[name](x, torch.arange(rows), self.seed + salt)

    def build(self) -> tuple[Any, ...]:
        """Arguments of observe_classes."""
        dtype, layout = DTYPES[self.dtype], LAYOUTS[self.layout]
        rows = self.normal(1, self.classes).argsort()[: self.groups]
        rows = torch.cat([rows, torch.full((self.groups - len(rows),), -1)])
        rows = torch.where(LEFT_OUT[self.left_out](self.normal(2, self.groups)), -1, rows)
        return (
            layout(self.means(self.bank_mean, 3, self.classes).to(dtype)),
            every_second(COUNTS[self.count](self.normal(4, self.classes)).to(dtype)),
            VARIANCES[self.bank_var](self.normal(5, self.dims)).to(dtype),
            torch.tensor(self.updates, dtype=dtype),
            every_second(rows),
            every_second(SIZES[self.size](self.normal(6, self.groups)).to(dtype)),
            layout(self.means(self.mean, 7, self.groups).to(dtype)),
            layout(VARIANCES[self.var](self.normal(8, self.groups, self.dims)).to(dtype)),
            self.momentum,
            1e-3,
        )


LEARNING = st.builds(
    Learning,
    seed=st.integers(0, 1000),
    groups=st.sampled_from([0, 1, 2, 5, 16, 17, 40]),
    classes=st.sampled_from([1, 2, 9, 40, 50]),
    dims=st.sampled_from([1, 2, 4, 7, 16, 33, 70]),
    bank_mean=st.sampled_from(list(MEANS)),
    bank_var=st.sampled_from(list(VARIANCES)),
    count=st.sampled_from(list(COUNTS)),
    updates=st.sampled_from([0.0, 1.0, 3.0, 1e5]),
    left_out=st.sampled_from(list(LEFT_OUT)),
    size=st.sampled_from(list(SIZES)),
    mean=st.sampled_from(list(MEANS)),
    var=st.sampled_from(list(VARIANCES)),
    layout=st.sampled_from(list(LAYOUTS)),
    momentum=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    dtype=st.sampled_from(list(DTYPES)),
)


def agree(actual: Tensor, wanted: Tensor, scale: Tensor, relative: float) -> bool:
    """Near the definition by rounding of `scale`; where that is not finite, not finite either."""
    assert actual.shape == wanted.shape
    tiny = torch.finfo(actual.dtype).tiny
    near = (actual.double() - wanted).abs() <= relative * scale.abs() + 30 * tiny
    same = torch.where(wanted.to(actual.dtype).isfinite(), near, ~actual.isfinite())
    return bool(same.all())


def expected_observation(arguments: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """weight, metric, var and updates, from the docstring's words, in float64.

    Only what overflows in the dtype of the arguments does so here.
    """
    dtype, classes = arguments[0].dtype, arguments[4].tolist()
    mean, count, var, updates = (t.double() for t in arguments[:4])
    size, batch_mean, batch_var = (t.double() for t in arguments[5:8])
    momentum, floor = arguments[8:]
    weight, total, sums = torch.zeros_like(size), 0.0, torch.zeros_like(var)
    for k, row in enumerate(classes):
        moments = (batch_var[k] + batch_mean[k].square()).sum()
        if row < 0 or not size[k] > 0 or not 4 * moments <= torch.finfo(dtype).max:
            continue
        weight[k] = size[k]
        if count[row] > 0:
            scatter = batch_var[k] + (batch_mean[k] - mean[row]).square()
            total += float(size[k])
            sums += size[k] * scatter.to(dtype)
    if total > 0:
        updates = updates + 1
        pace = max(1 / max(float(updates), 1), 1 - momentum)
        var = (1 - pace) * var + pace * (sums / total)
    level = var.mean()
    metric = var + floor * level if level > 0 else torch.ones_like(var)
    return weight, metric, var, updates


def check_observation(example: Learning, backend: str) -> None:
    arguments = example.build()
    before = [a.clone() for a in arguments[:8]]
    found = kernels(backend).outcome("observe_classes", *arguments)
    torch.testing.assert_close(before, list(arguments[:8]), rtol=0, atol=0, equal_nan=True)
    wanted = expected_observation(arguments)
    relative = (50 + example.dims + 2 * example.groups) * torch.finfo(found[0].dtype).eps
    weight, metric, var, updates = found
    assert torch.equal(weight.double(), wanted[0])
    assert updates.double() == wanted[3]
    assert agree(var, wanted[2], wanted[2], relative), (var, wanted[2])
    if wanted[2].isfinite().all():
        assert agree(metric, wanted[1], wanted[1], relative), (metric, wanted[1])


def check_following(example: Learning, backend: str) -> None:
    observed = example.build()
    weight = expected_observation(observed)[0].to(observed[0].dtype)
    mean, count, classes, target = (observed[i] for i in (0, 1, 4, 6))
    mean, count = mean.contiguous(), count.contiguous()
    arguments = (mean, count, classes, weight, target, example.momentum)
    before = [a.clone() for a in arguments[:5]]
    new_mean, new_count = kernels(backend).outcome("follow_classes", *arguments)
    torch.testing.assert_close(before, list(arguments[:5]), rtol=0, atol=0, equal_nan=True)
    unit = torch.finfo(mean.dtype).eps
    for k, row in enumerate(classes.tolist()):
        if not weight[k] > 0:
            continue
        seen = count[row].double() + weight[k].double()
        rate = max(float(weight[k] / seen.clamp(min=1)), 1 - example.momentum)
        old, new = mean[row].double(), target[k].double()
        assert agree(new_count[row], seen, seen, 4 * unit)
        assert agree(new_mean[row], old + rate * (new - old), old.abs() + new.abs(), 8 * unit)
        new_mean[row], new_count[row] = mean[row], count[row]
    torch.testing.assert_close(new_mean, mean, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(new_count, count, rtol=0, atol=0)


EXAMPLES = {"cpu": 400, "reference": 150, "triton": 15, "cuda": 60}


@pytest.mark.parametrize("backend", [*BACKENDS, "cuda"])
@pytest.mark.parametrize("check", [check_observation, check_following])
def test_no_batch_teaches_a_bank_something_wrong(
    check: Callable[[Learning, str], None], backend: str
) -> None:
    kernels(backend)  # skips where there are none

    @examples(EXAMPLES[backend], backend)
    @given(example=LEARNING)
    def holds(example: Learning) -> None:
        check(example, backend)

    holds()
