"""Random training loops, and a slow model of what `CWBR` must add to which gradient.

`Loop` drives a network, a `CWBR` and a catcher through one step after another of `STEPS`. Beside
them it keeps what must come out, by hand: every forward knows the calls that were made on it, and
`Forward.gradients` is the chain rule for a network of three linear layers, with the pull of each
call added at its place. Nothing of autograd, hooks or graphs is used for it.
"""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from one_layer import REFERENCE
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from cwbr_fused import CWBR
from cwbr_fused.balanced.bank import VARIANCE_FLOOR, VARIANCE_MOMENTUM
from cwbr_fused.operations import reference, reference_bank

SAMPLES, CLASSES, WIDTHS = 6, 3, (4, 5, 3)
LAYERS = ("0", "2")
MOMENTUM, CONFUSIONS = 0.7, 5

Bank = dict[str, Tensor]


class Trained(nn.Module):
    """What people save, copy and load: a network, its regularizer and the catcher between them."""

    def __init__(self) -> None:
        super().__init__()
        inputs, first, second = WIDTHS
        self.model = nn.Sequential(
            nn.Linear(inputs, first + 1, bias=False),
            nn.Tanh(),
            nn.Linear(first + 1, second, bias=False),
            nn.Tanh(),
            nn.Linear(second, CLASSES, bias=False),
        ).double()
        self.cwbr = CWBR(CLASSES, momentum=MOMENTUM, confusions=CONFUSIONS)
        self.catcher = self.cwbr.catch(self.model, LAYERS)

    def weights(self) -> list[Tensor]:
        return list(self.model.parameters())


class Forward:
    """One forward pass: its tensors, and the calls made on it that must have an effect."""

    def __init__(self, trained: Trained, call: Callable[[Tensor], Tensor], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.targets = torch.randint(CLASSES, (SAMPLES,), generator=generator)
        inputs = torch.randn(SAMPLES, WIDTHS[0], generator=generator, dtype=torch.float64)
        self.inputs = inputs + self.targets[:, None]
        self.weights = trained.weights()
        self.logits = call(self.inputs)
        self.features = trained.catcher.feats
        self.has_graph = self.logits.requires_grad
        self.is_over = False
        self.pulls: list[list[Tensor]] = []

    def loss(self) -> Tensor:
        return cross_entropy(self.logits, self.targets)

    @torch.no_grad()
    def values(self) -> tuple[list[Tensor], Tensor]:
        """The features by hand, and the logits."""
        first, second, last = self.weights
        z = self.inputs @ first.T
        w = z.tanh() @ second.T
        return [z, w], w.tanh() @ last.T

    @torch.no_grad()
    def gradients(self, factor: float) -> list[Tensor]:
        """Of `factor` times the loss, by the chain rule, with every pull added at its place."""
        _, second, last = self.weights
        (z, w), logits = self.values()
        g = factor * (logits.softmax(1) - one_hot(self.targets, CLASSES)) / SAMPLES
        of_last = g.T @ w.tanh()
        g = self._pulled(g @ last * (1 - w.tanh() ** 2), 1)
        of_second = g.T @ z.tanh()
        g = self._pulled(g @ second * (1 - z.tanh() ** 2), 0)
        return [g.T @ self.inputs, of_second, of_last]

    def _pulled(self, g: Tensor, layer: int) -> Tensor:
        for pulls in self.pulls:
            g = g + g.norm() * pulls[layer]
        return g


class Loop:
    """A training loop of random steps, checked after each of them.

    Args:
        seed: of the steps.
        compiled: how to compile the network; None leaves it as it is.
    """

    def __init__(self, seed: int, compiled: Callable[[nn.Module], Any] | None = None) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        self.compiled = compiled
        self.trained = Trained()
        self.call = self._callable()
        self.forwards: list[Forward] = []
        self.latest: Forward | None = None
        self.banks: dict[str, Bank] = {}
        self.saved: tuple[dict[str, Any], dict[str, Bank]] = self._state()
        self.said: set[str] = set()
        self.unused = 0
        self.history: list[str] = []

    def run(self, steps: int) -> None:
        for _ in range(steps):
            possible = [name for name in STEPS if name != "copy" or self.compiled is None]
            name = self.random.choice(possible)
            self.history.append(name)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                getattr(self, name)()
            assert not caught, [str(warning.message) for warning in caught]
            self._check_banks()

    # ---- steps

    def forward(self) -> None:
        self.latest = Forward(self.trained, self.call, self.random.getrandbits(30))
        self.forwards = [*self.forwards[-2:], self.latest]

    def forward_without_gradient(self) -> None:
        with torch.no_grad():
            self.latest = Forward(self.trained, self.call, self.random.getrandbits(30))

    def regularize(self) -> None:
        """CWBR on what the catcher holds."""
        if self.latest is None:
            with pytest.raises(ValueError, match="has not run"):
                self._call(self.trained.catcher, *self._any_batch())
        else:
            self._regularize(self.latest, self.trained.catcher)

    def regularize_kept_features(self) -> None:
        """CWBR on the features of any forward, also of an earlier step."""
        if self.forwards:
            forward = self.random.choice(self.forwards)
            self._regularize(forward, dict(forward.features))

    def measure(self) -> None:
        if self.latest is not None:
            with torch.no_grad():
                self._call(self.trained.catcher, self.latest.logits, self.latest.targets)
            self._expect_banks(self.latest)

    def backward(self, keep: bool = False) -> None:
        """One backward pass for the sum of some losses, as micro-batches and views have it."""
        usable = [f for f in self.forwards if not f.is_over]
        chosen = self.random.sample(usable, self.random.randint(0, len(usable)))
        if not chosen:
            return
        weights = list({id(w): w for f in chosen for w in f.weights}.values())
        factors = [self.random.choice([1.0, 0.5, 1024.0]) for _ in chosen]
        for weight in weights:
            weight.grad = None
        total = sum(a * f.loss() for a, f in zip(factors, chosen, strict=True))
        assert isinstance(total, Tensor)
        total.backward(retain_graph=keep)
        for weight in weights:
            expected = sum(
                g
                for a, f in zip(factors, chosen, strict=True)
                for w, g in zip(f.weights, f.gradients(a), strict=True)
                if w is weight
            )
            _assert_close(weight.grad, expected)
        for forward in chosen:
            forward.is_over = not keep

    def backward_and_keep_the_graph(self) -> None:
        self.backward(keep=True)

    def probe(self) -> None:
        """Looks at the gradient of one loss, as gradient statistics do."""
        usable = [f for f in self.forwards if not f.is_over]
        if usable:
            forward = self.random.choice(usable)
            gradients = torch.autograd.grad(forward.loss(), forward.weights, retain_graph=True)
            for gradient, expected in zip(gradients, forward.gradients(1.0), strict=True):
                _assert_close(gradient, expected)

    def skip(self) -> None:
        """Drops a forward, whose loss was not finite."""
        if self.forwards:
            self.forwards.remove(self.random.choice(self.forwards))

    def clear(self) -> None:
        self.trained.catcher.clear()
        self.latest = None

    def switch_mode(self) -> None:
        self.trained.cwbr.train(not self.trained.cwbr.training)

    def copy(self) -> None:
        """Goes on with a copy; what was laid ready in the graphs of the original stays there."""
        self.trained = copy.deepcopy(self.trained)
        self.call = self._callable()
        self.latest, self.said = None, set()

    def save(self) -> None:
        self.saved = self._state()

    def load(self) -> None:
        state, banks = self.saved
        self.trained.cwbr.load_state_dict(state)
        self.banks = {
            name: {key: value.clone() for key, value in banks[name].items()}
            if name in banks
            else _empty(len(bank["var"]))
            for name, bank in self.banks.items()
        }

    def catch_again(self) -> None:
        if self.compiled is None:
            self.trained.catcher.remove()
            self.trained.catcher = self.trained.cwbr.catch(self.trained.model, LAYERS)
            self.latest = None

    # ---- what must come out

    def _callable(self) -> Callable[[Tensor], Tensor]:
        model = self.trained.model
        return model if self.compiled is None else self.compiled(model)

    def _state(self) -> tuple[dict[str, Any], dict[str, Bank]]:
        return copy.deepcopy(self.trained.cwbr.state_dict()), copy.deepcopy(self.banks)

    def _any_batch(self) -> tuple[Tensor, Tensor]:
        return torch.zeros(SAMPLES, CLASSES), torch.zeros(SAMPLES, dtype=torch.long)

    def _call(self, features: Any, logits: Tensor, targets: Tensor) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.trained.cwbr(features, logits, targets)
        # Whether a skipped step is one too many depends on when graphs die.
        texts = [str(warning.message) for warning in caught]
        return [text for text in texts if "no gradient of the loss reached" not in text]

    def _regularize(self, forward: Forward, features: Any) -> None:
        said = self._call(features, forward.logits, forward.targets)
        self._expect_banks(forward)
        if not self.trained.cwbr.training:
            assert not said
            return
        pulls = self._learn(forward)
        reason = None if forward.has_graph else "has no graph"
        if forward.is_over:
            reason = "has already run through it"
        if reason is None:
            forward.pulls.append(pulls)
        expected = [] if reason is None or reason in self.said else [reason]
        assert len(said) == len(expected), (said, expected)
        for text, words in zip(said, expected, strict=True):
            assert words in text
            self.said.add(words)

    def _expect_banks(self, forward: Forward) -> None:
        for name, z in zip(LAYERS, forward.values()[0], strict=True):
            self.banks.setdefault(name, _empty(z.shape[1]))

    def _learn(self, forward: Forward) -> list[Tensor]:
        """The pull at each layer, as long as its share of the gradient; updates the banks."""
        features, logits = forward.values()
        counts = [self.banks[name]["count"] for name in LAYERS]
        seen = torch.stack(counts).gt(0).all(0)
        index, weight, _ = reference_bank.top_confusions(logits, forward.targets, seen, CONFUSIONS)
        index = torch.cat([forward.targets[:, None], index], 1)
        coefficient = torch.cat([torch.ones_like(weight[:, :1]), -weight], 1)
        index = torch.where(seen[forward.targets][:, None], index, -1)
        order, offsets, classes = reference.group_by_class(forward.targets, 1)
        known = _share_on_top(logits, forward.targets, seen)
        pulls = []
        for name, z in zip(LAYERS, features, strict=True):
            bank = self.banks[name]
            mean, var = reference.class_moments(z, order, offsets, 0.0)
            size = offsets.diff().to(z.dtype)
            learned = size, mean, var, VARIANCE_MOMENTUM, VARIANCE_FLOOR
            moves, metric = REFERENCE("observe_classes", *bank.values(), classes, *learned)
            r = REFERENCE("class_attraction", z, bank["mean"], metric, index, coefficient)[1]
            nearness = -((z[:, None] - bank["mean"]) ** 2 / metric).sum(2)
            met = seen[forward.targets] & (seen.sum() > 1)
            right = _share_on_top(nearness, forward.targets, seen, met)
            share = 4 * known * (1 - known) * right**4
            pulls.append(share * r / r.norm() if r.norm() > 0 else r)
            moved = bank["mean"], bank["count"]
            REFERENCE("follow_classes", *moved, classes, moves, mean, MOMENTUM)
        return pulls

    def _check_banks(self) -> None:
        banks = self.trained.cwbr.banks
        assert banks.keys() == self.banks.keys()
        for name, expected in self.banks.items():
            for key, value in expected.items():
                _assert_close(getattr(banks[name], key), value)


STEPS = (
    *("forward",) * 6,
    "forward_without_gradient",
    *("regularize",) * 5,
    *("regularize_kept_features",) * 2,
    "measure",
    *("backward",) * 4,
    "backward_and_keep_the_graph",
    "probe",
    "skip",
    "clear",
    "switch_mode",
    "copy",
    "save",
    "load",
    "catch_again",
)


def _assert_close(actual: Tensor, expected: Any) -> None:
    assert (actual - expected).abs().max() <= 1e-9 * (1 + expected.abs().max())


def _share_on_top(
    scores: Tensor, targets: Tensor, seen: Tensor, counts: Tensor | None = None
) -> float:
    """The share of samples whose own class scores above all others that are seen."""
    right = 0
    for i, (row, own) in enumerate(zip(scores.tolist(), targets.tolist(), strict=True)):
        rivals = [row[j] for j in range(CLASSES) if j != own and seen[j]]
        if counts is None or counts[i]:
            right += all(row[own] > rival for rival in rivals)
    return right / len(targets)


def _empty(width: int) -> Bank:
    zeros: dict[str, Any] = {"dtype": torch.float64}
    return {
        "mean": torch.zeros(CLASSES, width, **zeros),
        "count": torch.zeros(CLASSES, **zeros),
        "var": torch.zeros(width, **zeros),
        "updates": torch.zeros((), **zeros),
    }
