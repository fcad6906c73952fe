"""Random training loops: a pull is added to the gradient of the very forward it was measured on.

Each sequence of steps drives a caught model, and beside it an obviously right one: a model without
hooks that keeps, for every forward, the pulls that must be added to its gradients, and adds them by
an autograd function of its own. All parameter gradients must agree after every backward pass.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cwbr_fused import CWBR, FeatureCatcher

CLASSES, LAYERS, STEPS = 4, ("first", "second"), 9
EAGER, COMPILED = 1600, 400


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 5), nn.Linear(5, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x).tanh()).tanh())
        return logits


class Add(torch.autograd.Function):
    """The identity, whose gradient g becomes `g + |g| u` for each u, one after the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pulls: list[Tensor]) -> Tensor:
        ctx.pulls = pulls
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        for pull in ctx.pulls:
            g = g + g.norm() * pull
        return g, None


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(CLASSES, (10,), generator=generator)
    centers = torch.eye(CLASSES, 6, dtype=torch.float64)
    noise = torch.randn(10, 6, generator=generator, dtype=torch.float64)
    return centers[targets] + 0.5 * noise, targets


class Forward:
    """One forward pass of the caught model, and what must be added when it is differentiated."""

    def __init__(self, seed: int, logits: Tensor, features: dict[str, Tensor]) -> None:
        self.images, self.targets = batch(seed)
        self.logits, self.features = logits, features
        self.over = not logits.requires_grad
        self.pulls: dict[str, list[Tensor]] = {name: [] for name in LAYERS}


def loss_of_the_right_model(model: Network, forward: Forward) -> Tensor:
    first = Add.apply(model.first(forward.images), forward.pulls["first"])
    second = Add.apply(model.second(first.tanh()), forward.pulls["second"])
    return cross_entropy(model.head(second.tanh()), forward.targets)


def unit_pulls(model: Network, cwbr: CWBR, forward: Forward) -> dict[str, Tensor]:
    """What a call of `cwbr` now adds, over the length of the gradient: of one forward alone."""
    model, cwbr = copy.deepcopy(model), copy.deepcopy(cwbr)
    gradients: list[dict[str, Tensor]] = []
    for regularized in (False, True):
        first = model.first(forward.images)
        second = model.second(first.tanh())
        features = {"first": first, "second": second}
        for feature in features.values():
            feature.retain_grad()
        logits = model.head(second.tanh())
        if regularized:
            # A layer's own pull, not what the pull of a later one changes at it.
            detached = {n: f.detach().requires_grad_() for n, f in features.items()}
            cwbr(detached, logits.detach(), forward.targets)
            for name, feature in detached.items():
                feature.backward(gradients[0][name])
            gradients.append({n: f.grad for n, f in detached.items() if f.grad is not None})
        else:
            cross_entropy(logits, forward.targets).backward()
            gradients.append({n: f.grad for n, f in features.items() if f.grad is not None})
    plain, pulled = gradients
    return {n: (pulled[n] - plain[n]) / plain[n].norm() for n in LAYERS}


class Sequence:
    """The caught model, the right one, and the steps that were taken."""

    def __init__(
        self,
        model: Network,
        warm: CWBR,
        called: Callable[[Tensor], Tensor],
        catcher: FeatureCatcher,
    ) -> None:
        self.model, self.called, self.catcher = model, called, catcher
        self.cwbr = copy.deepcopy(warm)
        self.right = copy.deepcopy(model)
        for parameter in (*self.model.parameters(), *self.right.parameters()):
            parameter.grad = None
        self.forwards: list[Forward] = []
        self.steps: list[str] = []
        self.acted = 0

    def forward(self, rng: random.Random) -> None:
        seed = rng.randrange(10**6)
        logits = self.called(batch(seed)[0])
        self.forwards = [*self.forwards[-2:], Forward(seed, logits, dict(self.catcher.feats))]

    def no_grad_forward(self, rng: random.Random) -> None:
        with torch.no_grad():
            self.forward(rng)

    def call(self, rng: random.Random) -> None:
        """With the catcher, or with the features of an earlier forward."""
        if not self.forwards:
            return
        chosen = rng.choice([self.forwards[-1], rng.choice(self.forwards)])
        units = unit_pulls(self.model, self.cwbr, chosen)
        latest = chosen is self.forwards[-1] and len(self.catcher.feats) == len(LAYERS)
        features = self.catcher if latest else chosen.features
        self.cwbr(features, chosen.logits, chosen.targets)
        if not chosen.over and self.cwbr.training:
            for name in LAYERS:
                chosen.pulls[name].append(units[name])
            self.acted += bool(units["second"].any())

    def backward(self, rng: random.Random) -> None:
        alive = [forward for forward in self.forwards if not forward.over]
        if not alive:
            return
        chosen = rng.sample(alive, rng.randint(1, len(alive)))  # losses of micro-batches are summed
        keep = rng.random() < 0.3
        losses = [cross_entropy(f.logits, f.targets) for f in chosen]
        torch.stack(losses).sum().backward(retain_graph=keep)
        for forward in chosen:
            loss_of_the_right_model(self.right, forward).backward()
            forward.over = not keep
        self.check([p.grad for p in self.model.parameters()])

    def probe(self, rng: random.Random) -> None:
        alive = [forward for forward in self.forwards if not forward.over]
        if alive:
            chosen = rng.choice(alive)
            loss = cross_entropy(chosen.logits, chosen.targets)
            found = torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True)
            right = loss_of_the_right_model(self.right, chosen)
            wanted = torch.autograd.grad(right, list(self.right.parameters()))
            torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)

    def skip(self, rng: random.Random) -> None:
        self.forwards = self.forwards[1:]

    def clear(self, rng: random.Random) -> None:
        self.catcher.clear()

    def change_mode(self, rng: random.Random) -> None:
        self.cwbr.train(not self.cwbr.training)

    def deepcopy(self, rng: random.Random) -> None:
        self.cwbr = copy.deepcopy(self.cwbr)

    def save_and_load(self, rng: random.Random) -> None:
        loaded = CWBR(CLASSES).double()
        loaded.load_state_dict(copy.deepcopy(self.cwbr.state_dict()))
        self.cwbr = loaded

    def zero_grad(self, rng: random.Random) -> None:
        self.model.zero_grad()
        self.right.zero_grad()

    def check(self, found: list[Tensor | None]) -> None:
        wanted = [p.grad for p in self.right.parameters()]
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-10)


CHOICES = {
    "forward": 4,
    "no_grad_forward": 1,
    "call": 5,
    "backward": 3,
    "probe": 1,
    "skip": 1,
    "clear": 1,
    "change_mode": 1,
    "deepcopy": 1,
    "save_and_load": 1,
    "zero_grad": 1,
}


def warmed_up() -> tuple[Network, CWBR]:
    """A model that gets some samples right and others not, so that a pull acts."""
    torch.manual_seed(0)
    model, cwbr = Network().double(), CWBR(CLASSES).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    catcher = cwbr.catch(model, LAYERS)
    for seed in range(60):
        images, targets = batch(-1 - seed)
        logits = model(images)
        cwbr(catcher, logits, targets)
        optimizer.zero_grad()
        cross_entropy(logits, targets).backward()
        optimizer.step()
    catcher.remove()
    return model, cwbr


def run(count: int, compile_model: bool) -> None:
    model, warm = warmed_up()
    catcher = warm.catch(model, LAYERS)
    called = torch.compile(model, fullgraph=True, backend="aot_eager") if compile_model else model
    taken: Counter[str] = Counter()
    acted = 0
    for number in range(count):
        rng = random.Random(number)
        sequence = Sequence(model, warm, called, catcher)
        for _ in range(STEPS):
            (name,) = rng.choices(list(CHOICES), list(CHOICES.values()))
            sequence.steps.append(name)
            taken[name] += 1
            try:
                getattr(sequence, name)(rng)
            except Exception as error:
                raise AssertionError(f"sequence {number}: {sequence.steps}") from error
        acted += sequence.acted
        catcher.clear()
    assert set(taken) == set(CHOICES)
    assert acted > count // 2  # calls whose pull is not 0: otherwise nothing would be shown
    catcher.remove()


@pytest.mark.filterwarnings("ignore:CWBR has no effect")
def test_random_loops_add_each_pull_to_the_gradient_of_its_own_forward() -> None:
    run(EAGER, compile_model=False)


@pytest.mark.filterwarnings("ignore:CWBR has no effect")
def test_random_loops_of_a_compiled_model_do_the_same(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A graph that is kept must keep its buffers.
    monkeypatch.setattr("torch._functorch.config.donated_buffer", False)
    run(COMPILED, compile_model=True)
