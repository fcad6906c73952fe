"""No input crashes a backend, hangs it, or gets a silently wrong answer.

`cwbr_fused.reference` in float64, on the very values that the backend was given, is the truth.
For each example:

- Groups are the reference's exactly; the weights of the chosen pairs are the reference's to
  rounding, and no pair left out is heavier. Which of equally heavy pairs was chosen is not held
  against a backend, so everything after is measured at its own choice.
- *Comfortable* examples, where no intermediate of the formulas leaves float32's range (float64's
  for float64): value and gradients are finite, and as near to the truth as the truth moves when
  each input is changed in its last place, plus a few units in the last place of the result.
- All others, inputs that are not finite included: the value is NaN or infinite where that of the
  reference is, else near it, and where it is not finite the gradients are not either, so that a
  GradScaler skips the step. Either the reference in float64 or that in the backend's accumulation
  dtype, which overflows sooner. A backend may or may not look at pairs of no weight.
- Shapes, dtypes, which inputs get gradients; no input is changed.

CWBR_HOSTILE_EXAMPLES=N draws N new examples per test; without it they are the same in every run.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from hostile import Batch, Recipe, recipes
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import cwbr_fused
from cwbr_fused import backends, reference, to_vec
from cwbr_fused.operations.autograd import OPERATIONS, Regularizer

SOAK = int(os.environ.get("CWBR_HOSTILE_EXAMPLES", 0))
BACKENDS = [name for name in backends.NAMES if backends.rejection(name, "cpu") is None]
Gradients = list[Tensor | None]
COMFORTABLE = {torch.float32: 1e36, torch.float64: 1e300}

pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("one_thread"),
]


def examples(count: int, backend: str) -> settings:
    """Triton's interpreter is too slow to look for a smaller example of a failure."""
    return settings(
        phases=[Phase.generate] if backend == "triton" else list(Phase),
        max_examples=SOAK or count,
        derandomize=not SOAK,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def snapshot(batch: Batch) -> list[Tensor]:
    return [t.detach().clone() for t in (*batch.features, batch.logits, batch.targets)]


def accumulation_dtype(batch: Batch) -> torch.dtype:
    double = any(x.dtype == torch.float64 for x in batch.features)
    return torch.float64 if double else torch.float32


@dataclass
class Plan:
    order: Tensor
    offsets: Tensor
    pairs: Tensor
    weights: Tensor


def checked_plan(recipe: Recipe, batch: Batch, backend: str) -> Plan:
    """The backend's plan, found right."""
    operations = OPERATIONS[backend]
    everything = max(1, recipe.batch * recipe.batch)
    top_m = recipe.top_m or everything
    *groups, pairs, weights = operations.plan(batch.logits, batch.targets, top_m, recipe.min_count)
    expected = reference.group_by_class(batch.targets, recipe.min_count)
    for actual, wanted in zip(groups, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)

    alpha = reference.confusion_weights(batch.logits.double(), *groups)
    i, j = reference.upper_pairs(alpha)
    assert pairs.shape == (min(top_m, len(i)), 2)
    assert (pairs[:, 0] < pairs[:, 1]).all()
    assert len(pairs.unique(dim=0)) == len(pairs)
    truth = alpha[pairs[:, 0], pairs[:, 1]]
    close = {"rtol": 1e-5, "atol": 1e-37, "equal_nan": True}
    torch.testing.assert_close(weights.double(), truth, **close)
    heaviest = alpha[i, j].sort(descending=True)[0][: len(pairs)]
    torch.testing.assert_close(truth.sort(descending=True)[0], heaviest, **close)
    order, offsets, _ = groups
    return Plan(order, offsets, pairs, weights.to(accumulation_dtype(batch)))


def truth_of(recipe: Recipe, features: list[Tensor], plan: Plan) -> tuple[Tensor, list[Tensor]]:
    """Value and gradients by ordinary autograd through the reference, in float64."""
    leaves = [x.detach().requires_grad_() for x in features]
    value, *_ = reference.regularizer(
        leaves,
        plan.order,
        plan.offsets,
        plan.pairs,
        plan.weights.double(),
        recipe.eps,
        recipe.objective == "log_overlap",
    )
    gradients = torch.autograd.grad(value, leaves, torch.full_like(value, recipe.upstream))
    return value.detach(), list(gradients)


def is_comfortable(recipe: Recipe, vectors: list[Tensor], plan: Plan, limit: float) -> bool:
    """No intermediate of the formulas, or of their gradients, beyond `limit`."""
    for z in vectors:
        mean, var = reference.class_moments(z, plan.order, plan.offsets, recipe.eps)
        (mean_i, mean_j), (u_i, u_j) = (x[plan.pairs.T] for x in (mean, var + recipe.eps))
        difference = (mean_i - mean_j).square()
        sizes = [
            z.square() * max(1, len(z)),
            var,
            difference,
            difference / (u_i + u_j).square(),
            u_i / u_j,
            u_j / u_i,
        ]
        if not all(bool((size < limit).all()) for size in sizes):
            return False
    return True


def check_values(recipe: Recipe, batch: Batch, plan: Plan, value: Tensor, grads: Gradients) -> None:
    """A comfortable example against the truth."""
    vectors = [to_vec(x.detach()).double() for x in batch.features]
    truth, truth_grads = truth_of(recipe, vectors, plan)
    unit = torch.finfo(accumulation_dtype(batch)).eps
    spread, grad_spreads = torch.zeros(()).double(), [0.0] * len(vectors)
    generator = torch.Generator().manual_seed(recipe.seed)
    for _ in range(3):
        moved = [
            z * (1 + unit * (2 * torch.rand(z.shape, generator=generator).double() - 1))
            for z in vectors
        ]
        other, other_grads = truth_of(recipe, moved, plan)
        spread = torch.maximum(spread, (other - truth).abs())
        grad_spreads = [
            max(s, float((a - b).abs().max())) if a.numel() else s
            for s, a, b in zip(grad_spreads, other_grads, truth_grads, strict=True)
        ]

    # A distance sums D logarithms of products near 1, to which it adds log(weight) for log_overlap.
    dims = max(z.shape[1] for z in vectors)
    logs = plan.weights[plan.weights > 0].log().abs()
    largest = float(logs.max()) if recipe.objective == "log_overlap" and len(logs) else 0
    bound = float((20 + dims + 20 * (truth.abs() + largest)) * unit + 30 * spread)
    assert abs(float(value.double() - truth)) <= bound, (float(value), float(truth), bound)
    for x, grad, true_grad, grad_spread in zip(
        batch.features, grads, truth_grads, grad_spreads, strict=True
    ):
        if grad is None or true_grad.numel() == 0:
            continue
        largest = float(true_grad.abs().max())
        info = torch.finfo(x.dtype)
        if largest > info.max / 4:
            continue  # half precision may round it to infinity
        pooled = grad[:, 0] if grad.dim() == 3 else grad.flatten(1)
        bound = (300 * unit + info.eps) * largest + 30 * grad_spread + info.smallest_normal
        error = float((pooled.double() - true_grad).abs().max())
        assert error <= bound, (error, bound, largest)


def check(recipe: Recipe, backend: str) -> None:
    batch = recipe.build()
    before = snapshot(batch)
    value = cwbr_fused.loss(
        batch.features, batch.logits, batch.targets, backend=backend, **recipe.options
    )
    dtype = accumulation_dtype(batch)
    assert value.shape == ()
    assert value.dtype == dtype
    assert value.requires_grad == any(layer.needs_grad for layer in recipe.layers)
    wanted = [x for x in batch.features if x.requires_grad]
    upstream = torch.full_like(value, recipe.upstream)
    found = iter(torch.autograd.grad(value, wanted, upstream) if wanted else ())
    grads = [next(found) if x.requires_grad else None for x in batch.features]
    for x, grad in zip(batch.features, grads, strict=True):
        assert grad is None or (grad.shape == x.shape and grad.dtype == x.dtype)
    value = value.detach()
    for old, new in zip(before, snapshot(batch), strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)

    plan = checked_plan(recipe, batch, backend)
    vectors = [to_vec(x.detach()).double() for x in batch.features]
    comfortable = bool(plan.weights.isfinite().all())
    if comfortable and is_comfortable(recipe, vectors, plan, COMFORTABLE[dtype]):
        check_values(recipe, batch, plan, value, grads)
        return
    assert any(
        agrees(value, grads, *backward_of(recipe, batch, plan, kept, upstream.to(precision)))
        for precision in {dtype, torch.float64}
        for kept in (slice(None), plan.weights != 0)
    ), (value, grads, backward_of(recipe, batch, plan, slice(None), upstream))


def agrees(value: Tensor, grads: Gradients, expected: Tensor, expected_grads: Gradients) -> bool:
    """Beyond the comfortable range: no finite number where NaN or infinity is right, or reversed.

    The gradient of a finite value may be 0 where the reference has 0 times infinity.
    """
    if not expected.isfinite():
        loud = all_finite(grads) == all_finite(expected_grads)
        return loud and not value.isfinite() and bool(value.isnan() == expected.isnan())
    return abs(float(value - expected)) <= 1e-3 * (1 + abs(float(expected))) and (
        all_finite(grads) or not all_finite(expected_grads)
    )


def all_finite(tensors: Gradients) -> bool:
    return all(bool(t.isfinite().all()) for t in tensors if t is not None)


def backward_of(
    recipe: Recipe, batch: Batch, plan: Plan, kept: slice | Tensor, upstream: Tensor
) -> tuple[Tensor, Gradients]:
    """Value and gradients by the reference in the dtype of `upstream`, of the pairs `kept`."""
    leaves = [
        to_vec(x.detach()).to(upstream.dtype).requires_grad_(x.requires_grad)
        for x in batch.features
    ]
    pairs, weights = plan.pairs[kept], plan.weights[kept].to(upstream.dtype)
    log = recipe.objective == "log_overlap"
    value = Regularizer.apply(
        plan.order, plan.offsets, pairs, weights, recipe.eps, log, "reference", *leaves
    )
    wanted = [x for x in leaves if x.requires_grad]
    found = iter(torch.autograd.grad(value, wanted, upstream) if wanted else ())
    grads = [
        next(found).to(raw.dtype) if x.requires_grad else None
        for raw, x in zip(batch.features, leaves, strict=True)
    ]
    return value.detach(), grads


COUNTS = {"cpu": 1400, "reference": 600, "triton": 12}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_batch_gets_a_silently_wrong_answer(backend: str) -> None:
    @examples(COUNTS[backend], backend)
    @given(recipe=recipes(8 if backend == "triton" else 24))
    def holds(recipe: Recipe) -> None:
        check(recipe, backend)

    holds()
