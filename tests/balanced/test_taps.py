"""`CWBR.catch`: how CWBR reaches the layers of a model, also of one that is compiled."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cwbr_models import CLASSES, Network, batch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy

from cwbr_fused import CWBR, FeatureCatcher
from cwbr_fused.balanced import taps

LAYERS = ["network.conv", "network.body"]


class Plain(nn.Module):
    """`Network` without the features."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, x: Tensor) -> Tensor:
        feature_map = self.network.conv(x)
        return self.network.head(self.network.body(feature_map.mean((2, 3)).relu()).relu())


class Residual(nn.Module):
    """Changes a layer's output in place, or does the same out of place."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)
        self.after, self.head = nn.Identity(), nn.Linear(1, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.conv(x))
        if self.in_place:
            out += x
        else:
            out = self.after(out + x)
        return self.head(out.relu().mean((2, 3)))


class WithShape(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        outputs = super().forward(x)
        return outputs, outputs.shape


class Tupled(nn.Module):
    """Its layer gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = WithShape(6, 5), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        outputs, (size, _) = self.body(x[:, 0, 0])
        assert size == len(x)
        return self.head(outputs.tanh())


def parameter_gradients(
    model: nn.Module,
    layers: list[str],
    *,
    catch: bool = True,
    wrap: Callable[[Any], Any] = lambda model: model,
) -> list[Tensor]:
    """After four training steps, with `CWBR.catch` or a `FeatureCatcher`."""
    cwbr = CWBR(CLASSES)
    catcher = cwbr.catch(model, layers) if catch else FeatureCatcher(model, layers)
    called = wrap(model)
    for seed in range(4):
        images, targets = batch(seed)
        logits = called(images)
        cwbr(catcher, logits, targets)
        model.zero_grad()
        cross_entropy(logits, targets).backward()
    health = cwbr.health()
    assert list(health) == layers
    assert min(numbers["reg_norm"] for numbers in health.values()) > 0
    return [p.grad for p in model.parameters() if p.grad is not None]


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make()


def compiled(backend: str) -> Callable[[Any], Any]:
    return lambda model: torch.compile(model, fullgraph=True, backend=backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_gets_the_gradients_of_the_eager_one(
    backend: str, fresh_compiler: None
) -> None:
    ours = parameter_gradients(built(Plain), LAYERS, wrap=compiled(backend))
    theirs = parameter_gradients(built(Plain), LAYERS, catch=False)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wrap", [lambda model: model, compiled("aot_eager")])
def test_a_layer_that_gives_a_tuple_is_caught_by_its_first_tensor(
    wrap: Any, fresh_compiler: None
) -> None:
    ours = parameter_gradients(built(Tupled), ["body"], wrap=wrap)
    theirs = parameter_gradients(built(Tupled), ["body"], catch=False)
    torch.testing.assert_close(ours, theirs)


def test_a_layer_that_is_changed_in_place_counts_as_changed() -> None:
    ours = parameter_gradients(built(lambda: Residual(in_place=True)), ["norm"])
    theirs = parameter_gradients(built(lambda: Residual(in_place=False)), ["after"])
    torch.testing.assert_close(ours, theirs)


def test_in_a_compiled_model_a_layer_that_is_changed_in_place_counts_as_it_was(
    fresh_compiler: None,
) -> None:
    model = built(lambda: Residual(in_place=True))
    ours = parameter_gradients(model, ["norm"], wrap=compiled("aot_eager"))
    theirs = parameter_gradients(built(lambda: Residual(in_place=False)), ["norm"])
    torch.testing.assert_close(ours, theirs)


def test_ten_models_share_one_graph(fresh_compiler: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    images, targets = batch()
    for _ in range(10):
        model, cwbr = Plain(), CWBR(CLASSES)
        catcher = cwbr.catch(model, LAYERS)
        called = torch.compile(model, fullgraph=True, backend=counter)
        for _ in range(2):
            logits = called(images)
            cwbr(catcher, logits, targets)
            cross_entropy(logits, targets).backward()
    assert counter.frame_count == 1


def test_what_was_laid_ready_dies_with_the_graph_of_a_compiled_model(fresh_compiler: None) -> None:
    gc.collect()
    before = len(taps._TICKETS)
    model, cwbr = Plain(), CWBR(CLASSES)
    catcher = cwbr.catch(model, LAYERS)
    called = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(3):
        images, targets = batch(seed)
        logits = called(images)
        cwbr(catcher, logits, targets)
        if seed > 0:  # the first step is skipped
            cross_entropy(logits, targets).backward()
    assert len(taps._TICKETS) == before + len(LAYERS)
    catcher.clear()
    del logits
    gc.collect()
    assert len(taps._TICKETS) == before


def test_an_exported_model_has_no_taps() -> None:
    model = Plain()
    CWBR(CLASSES).catch(model, LAYERS)
    program = torch.export.export(model, (batch()[0],))
    assert "cwbr_fused" not in str(program.graph)


def test_after_remove_the_model_is_as_before() -> None:
    model, x = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES)), torch.randn(6, 5)
    before = pickle.dumps(model)
    cwbr = CWBR(CLASSES)
    catcher = cwbr.catch(model, ["0", "1"])
    logits = model(x)
    cwbr(catcher, logits, torch.arange(6))
    cross_entropy(logits, torch.arange(6)).backward()
    catcher.remove()
    model.zero_grad()
    assert b"cwbr_fused" not in pickle.dumps(model)
    assert len(pickle.dumps(model)) == len(before)
    torch.jit.save(torch.jit.trace(model, x), io.BytesIO())
    torch.jit.script(model)
    torch.fx.symbolic_trace(model)
    parameters = dict(model.named_parameters())
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).sum())(parameters)


def test_a_caught_model_takes_gradient_penalties(recwarn: pytest.WarningsRecorder) -> None:
    model, y = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 4)), torch.arange(12) % 4
    x = torch.randn(12, 5, requires_grad=True)

    def penalty() -> Tensor:
        model.zero_grad()
        (g,) = torch.autograd.grad(cross_entropy(model(x), y), x, create_graph=True)
        g.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    expected = penalty()
    CWBR(4).catch(model, ["0"])
    assert torch.equal(penalty(), expected)
    assert not recwarn.list


def test_a_bad_name_leaves_the_model_as_it_was() -> None:
    model, cwbr = Plain(), CWBR(CLASSES)
    with pytest.raises(ValueError, match=r"got 'network\.cnov'; did you"):
        cwbr.catch(model, ["network.conv", "network.cnov"])
    assert not any(module._forward_hooks for module in model.modules())


def test_a_second_model_needs_a_regularizer_of_its_own() -> None:
    first, second, cwbr = Plain(), Plain(), CWBR(CLASSES)
    catcher = cwbr.catch(first, ["network.conv"])
    with pytest.raises(ValueError, match=r"'network\.conv' of another model.*a CWBR for each"):
        cwbr.catch(second, ["network.conv"])
    assert not second.network.conv._forward_hooks
    cwbr.catch(first, ["network.conv"])
    catcher.remove()
    del first
    gc.collect()
    cwbr.catch(second, ["network.conv"])


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_a_copy_of_model_regularizer_and_catcher_goes_on_like_the_original(copied: Any) -> None:
    class Trained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.cwbr = built(Plain), CWBR(CLASSES)
            self.catcher = self.cwbr.catch(self.model, LAYERS)

        def step(self, seed: int) -> list[Tensor]:
            images, targets = batch(seed)
            logits = self.model(images)
            self.cwbr(self.catcher, logits, targets)
            self.model.zero_grad()
            cross_entropy(logits, targets).backward()
            return [p.grad for p in self.model.parameters() if p.grad is not None]

    globals()["Trained"], Trained.__qualname__ = Trained, "Trained"  # for pickle
    original = Trained()
    for seed in range(3):
        original.step(seed)
    other = copied(original)
    torch.testing.assert_close(other.step(3), original.step(3))
    watched = weakref.ref(other.catcher.feats["network.conv"])
    other.catcher.clear()
    assert watched() is None


def test_a_catcher_copied_without_its_model_says_so() -> None:
    model, cwbr = Plain(), CWBR(CLASSES)
    copied = copy.deepcopy(cwbr.catch(model, LAYERS))
    images, targets = batch()
    with pytest.raises(ValueError, match=r"copied without its model: call catch\(\) again"):
        cwbr(copied, model(images), targets)
