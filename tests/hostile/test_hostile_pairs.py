"""Hostile moments and weights, as people who build their own loss may pass them to
`cwbr_fused.functional`: the property is that of test_hostile.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hostile import DTYPES, FEATURES, INF, LAYOUTS, NAN
from hypothesis import given
from test_hostile import BACKENDS, examples
from torch import Tensor

from cwbr_fused import functional, reference

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def _one(value: float) -> Callable[[Tensor], Tensor]:
    """A standard lognormal with one element replaced."""

    def spoil(x: Tensor) -> Tensor:
        x = x.exp()
        x.view(-1)[: min(1, x.numel())] = value
        return x

    return spoil


# What a standard normal x becomes.
VARIANCES: dict[str, Callable[[Tensor], Tensor]] = {
    "lognormal": torch.exp,
    "equal": torch.ones_like,
    "zero": torch.zeros_like,
    "1e-30": lambda x: x.exp() * 1e-30,
    "1e30": lambda x: x.exp() * 1e30,
    "zero or one": lambda x: (x > 0).double(),
    "from 1e-12 to 1e12": lambda x: 10 ** (12 * x.tanh()),
    "one inf": _one(INF),
    "one nan": _one(NAN),
    "one huge": _one(1e25),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "random": torch.abs,
    "ties": lambda x: x.abs().round(),
    "zero": torch.zeros_like,
    "tiny": lambda x: x.abs() * 1e-30,
    "sparse": lambda x: (x - 1).relu(),
    "one nan": _one(NAN),
    "one inf": _one(INF),
}


@dataclass(frozen=True)
class Moments:
    seed: int
    groups: int
    dims: int
    mean: str
    var: str
    weights: str
    layout: str
    dtype: str
    top_m: int | None
    eps: float
    objective: str

    def build(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        shapes = (self.groups, self.dims), (self.groups, self.dims), (self.groups, self.groups)
        mean, var, alpha = (torch.randn(*s, generator=generator).double() for s in shapes)
        mean = FEATURES[self.mean](mean, torch.arange(self.groups), self.seed)
        var, alpha = VARIANCES[self.var](var), WEIGHTS[self.weights](alpha)
        alpha = torch.maximum(alpha, alpha.T).fill_diagonal_(0)
        dtype, layout = DTYPES[self.dtype], LAYOUTS[self.layout]
        mean, var = (layout(x.to(dtype)) for x in (mean, var))
        return mean.detach().requires_grad_(), var.detach().requires_grad_(), alpha.to(dtype).T


MOMENTS = st.builds(
    Moments,
    seed=st.integers(0, 1000),
    groups=st.sampled_from([0, 1, 2, 3, 5, 17]),
    dims=st.sampled_from([1, 2, 7, 8, 9, 33]),
    mean=st.sampled_from(list(FEATURES)),
    var=st.sampled_from(list(VARIANCES)),
    weights=st.sampled_from(list(WEIGHTS)),
    layout=st.sampled_from(list(LAYOUTS)),
    dtype=st.sampled_from(list(DTYPES)),
    top_m=st.sampled_from([1, 3, 64, None]),
    eps=st.sampled_from([1e-12, 1e-6, 1e-3]),
    objective=st.sampled_from(["overlap", "log_overlap"]),
)


def is_comfortable(mean: Tensor, var: Tensor, alpha: Tensor, eps: float, limit: float) -> bool:
    """No intermediate beyond `limit`, in any pair: then D can be held to the truth."""
    u = var + eps
    sizes = [
        (mean[:, None] - mean[None]).square() * (1 + 1 / (u[:, None] + u[None]).square()),
        u[:, None] / u[None],
        u,
        alpha,
    ]
    return all(bool((size < limit).all()) for size in sizes)


def check_distance(moments: Moments, backend: str) -> None:
    mean, var, alpha = moments.build()
    distance, rho = functional.bhattacharyya_diag(mean, var, moments.eps, backend=backend)
    assert distance.shape == rho.shape == (moments.groups, moments.groups)
    assert distance.dtype == reference.accumulation_dtype(mean.dtype)
    grads = torch.autograd.grad(rho.sum(), (mean, var))
    assert all(g.shape == mean.shape and g.dtype == mean.dtype for g in grads)

    wide = mean.detach().double(), var.detach().double()
    truth, _ = reference.bhattacharyya_diag(*wide, moments.eps)
    limit = 1e300 if mean.dtype == torch.float64 else 1e36
    if is_comfortable(*wide, alpha.double(), moments.eps, limit):
        unit = torch.finfo(distance.dtype).eps
        error = (distance.double() - truth).abs()
        # eps rounds u, the mean difference is exact to rounding, and each dimension adds a unit.
        assert (error <= (20 + moments.dims + 8 * truth) * unit).all(), error.max()
        assert all(g.isfinite().all() for g in grads if g.dtype != torch.float16)
    else:
        near, _ = reference.bhattacharyya_diag(
            mean.detach().to(distance.dtype), var.detach().to(distance.dtype), moments.eps
        )
        off_diagonal = ~torch.eye(moments.groups, dtype=torch.bool)
        seen = distance.isnan() == truth.isnan(), distance.isnan() == near.isnan()
        assert ((seen[0] | seen[1]) | ~off_diagonal).all(), (distance, near)


def finite_in_reference(moments: Moments, *inputs: list[Tensor]) -> set[bool]:
    """Whether the reference is finite, with and without the pairs that have no weight."""
    kinds = set()
    for mean, var, alpha in inputs:
        pairs, weights = reference.top_pairs(alpha, moments.top_m or moments.groups**2)
        for kept in (slice(None), weights != 0):
            distance = reference.pair_distance(mean, var, pairs[kept], moments.eps)
            log = moments.objective == "log_overlap"
            value = reference.overlap(distance, weights[kept], moments.eps, log)
            kinds.add(bool(value.isfinite()))
    return kinds


def check_loss(moments: Moments, backend: str) -> None:
    mean, var, alpha = moments.build()
    options = {"top_m": moments.top_m, "eps": moments.eps, "objective": moments.objective}
    value = functional.bhat_confusion_loss(mean, var, alpha, backend=backend, **options)
    grads = torch.autograd.grad(value, (mean, var))
    assert value.shape == ()
    assert all(g.shape == mean.shape and g.dtype == mean.dtype for g in grads)
    wide = [t.detach().double() for t in (mean, var, alpha)]
    truth = reference.bhat_confusion_loss(*wide, **options)
    if not is_comfortable(*wide, moments.eps, 1e300 if mean.dtype == torch.float64 else 1e36):
        near = [t.to(value.dtype) for t in wide]
        assert bool(value.isfinite()) in finite_in_reference(moments, wide, near)
        return
    i, j = reference.upper_pairs(wide[2])
    logs = wide[2][i, j][wide[2][i, j] > 0].log().abs()
    largest = float(logs.max()) if moments.objective == "log_overlap" and len(logs) else 0
    unit = torch.finfo(value.dtype).eps
    bound = (20 + moments.dims + 20 * (float(truth.abs()) + largest)) * unit
    assert abs(float(value.detach().double() - truth)) <= bound
    assert all(g.isfinite().all() for g in grads if g.dtype != torch.float16)


COUNTS = {"cpu": 400, "reference": 150, "triton": 8}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", [check_distance, check_loss])
def test_no_moments_get_a_silently_wrong_answer(
    check: Callable[[Moments, str], None], backend: str
) -> None:
    @examples(COUNTS[backend], backend)
    @given(moments=MOMENTS)
    def holds(moments: Moments) -> None:
        check(moments, backend)

    holds()
