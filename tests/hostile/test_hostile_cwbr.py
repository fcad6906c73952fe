"""Hostile batches between ordinary ones, in training with `CWBR`.

Whatever the batch, its tensors are not changed, the bank stays finite, and the next ordinary batch
is measured and gets its gradient as ever. Where features and logits are of ordinary size the
hostile batch itself gets finite gradients, no longer than promised. A batch without a finite sample
leaves every bit of the bank as it was.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import hypothesis.strategies as st
import pytest
import torch
from hostile import Batch, Layer, Recipe, recipes
from hypothesis import given
from test_hostile import BACKENDS, examples, snapshot
from torch import Tensor
from torch.nn.functional import one_hot

from cwbr_fused import CWBR, to_vec

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.usefixtures("one_thread"),
]

# The largest features whose squared distances, over the smallest variances, fit in float32.
ORDINARY = 1e6


@dataclass(frozen=True)
class Training:
    """Ordinary batches, then a hostile one."""

    hostile: Recipe
    warm_up: int
    soft: str
    ratio: float
    push: float
    confusions: int

    @property
    def ordinary(self) -> Recipe:
        layers = tuple(
            Layer(layer.dims, "separated", "contiguous", layer.raw, layer.dtype, True)
            for layer in self.hostile.layers
        )
        return replace(
            self.hostile,
            batch=12,
            targets="random",
            layers=layers,
            logits="normal",
            logits_layout="contiguous",
        )


TARGETS = {
    "indices": lambda y, classes: y,
    "one hot": lambda y, classes: one_hot(y.long(), classes).float(),
    "mixed": lambda y, classes: (
        0.7 * one_hot(y.long(), classes) + 0.3 * one_hot(y.flip(0).long(), classes)
    ),
    "equal": lambda y, classes: torch.full((len(y), classes), 1 / classes),
    "zero": lambda y, classes: torch.zeros(len(y), classes),
    "1e30": lambda y, classes: 1e30 * one_hot(y.long(), classes),
}


def trainings(max_batch: int) -> st.SearchStrategy[Training]:
    return st.builds(
        Training,
        hostile=recipes(max_batch),
        warm_up=st.integers(0, 2),
        soft=st.sampled_from(["indices", *TARGETS]),
        ratio=st.sampled_from([1.0, 0.0, 0.3, 50.0]),
        push=st.sampled_from([1.0, 0.0, 0.5]),
        confusions=st.sampled_from([1, 5, 2**40]),
    )


def step(cwbr: CWBR, batch: Batch, targets: Tensor, seed: int) -> tuple[Tensor, list[Tensor]]:
    """The energy; incoming and outgoing gradients of the features that have one, in turn."""
    energy = cwbr(batch.features, batch.logits, targets)
    wanted = [x for x in batch.features if x.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    incoming = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in wanted]
    if wanted:
        torch.autograd.backward(wanted, incoming)
    return energy, [g for x, g in zip(wanted, incoming, strict=True) for g in (g, x.grad)]


def check_gradients(training: Training, gradients: list[Tensor]) -> None:
    """Finite, and what was added no longer than `ratio` times what came in."""
    for incoming, outgoing in zip(gradients[::2], gradients[1::2], strict=True):
        assert outgoing.isfinite().all()
        added = (outgoing.double() - incoming.double()).norm()
        rounding = 4 * torch.finfo(incoming.dtype).eps * (1 + training.ratio)
        assert added <= (training.ratio * 1.001 + rounding) * incoming.double().norm()


def check(training: Training, backend: str) -> None:
    recipe = training.hostile
    options = {"ratio": training.ratio, "push": training.push, "confusions": training.confusions}
    cwbr = CWBR(recipe.classes, backend=backend, **options)
    ordinary = training.ordinary
    for seed in range(training.warm_up):
        batch = replace(ordinary, seed=seed).build()
        step(cwbr, batch, batch.targets, seed)

    before = {name: t.clone() for name, t in cwbr.state_dict().items()}
    batch = recipe.build()
    targets = TARGETS[training.soft](batch.targets, recipe.classes)
    given = [*snapshot(batch), targets.clone()]
    energy, gradients = step(cwbr, batch, targets, recipe.seed)
    for old, new in zip(given, [*snapshot(batch), targets], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=0, equal_nan=True)
    assert energy.shape == ()
    assert not energy.requires_grad
    vectors = [to_vec(x.detach()) for x in batch.features]
    if recipe.batch and all(bool((t.abs() < ORDINARY).all()) for t in (*vectors, batch.logits)):
        assert energy.isfinite()
        check_gradients(training, gradients)

    after = cwbr.state_dict()
    for name, buffer in after.items():
        assert buffer.isfinite().all(), name
    for layer, z in enumerate(vectors):
        if training.warm_up and not z.isfinite().all(1).any():
            names = [name for name in before if name.startswith(f"banks.{layer}.")]
            assert all(torch.equal(before[name], after[name]) for name in names)

    batch = replace(ordinary, seed=7).build()
    energy, gradients = step(cwbr, batch, batch.targets, 7)
    assert energy.isfinite()
    check_gradients(training, gradients)


COUNTS = {"cpu": 300, "reference": 150, "triton": 4}


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_batch_poisons_the_bank_or_the_gradient(backend: str) -> None:
    @examples(COUNTS[backend], backend)
    @given(training=trainings(6 if backend == "triton" else 24))
    def holds(training: Training) -> None:
        check(training, backend)

    holds()
