"""Taps: how CWBR reaches the layers of a model that is compiled."""

from __future__ import annotations

import copy

import pytest
import torch
from cwbr_models import CLASSES, Network, batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from cwbr_fused import CWBR, FeatureCatcher


class Plain(nn.Module):
    """`Network` without the features."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Network()

    def forward(self, x: Tensor) -> Tensor:
        feature_map = self.network.conv(x)
        return self.network.head(self.network.body(feature_map.mean((2, 3)).relu()).relu())


def parameter_gradients(mode: str) -> list[Tensor]:
    """After four training steps with tensor hooks, with taps, or with taps in a compiled model."""
    torch.manual_seed(0)
    model = Plain()
    cwbr = CWBR(CLASSES)
    names = ["network.conv", "network.body"]
    catcher = FeatureCatcher(model, names) if mode == "hooks" else cwbr.catch(model, names)
    called = torch.compile(model, fullgraph=True) if mode == "compiled" else model
    for seed in range(4):
        images, targets = batch(seed)
        logits = called(images)
        cwbr(catcher.feats, logits, targets)
        model.zero_grad()
        cross_entropy(logits, targets).backward()
    assert min(h["reg_norm"] for h in cwbr.health().values()) > 0
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("mode", ["taps", "compiled"])
def test_taps_do_what_tensor_hooks_do(mode: str) -> None:
    for ours, theirs in zip(parameter_gradients(mode), parameter_gradients("hooks"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_tap_adds_once_and_not_without_the_regularizer() -> None:
    torch.manual_seed(0)
    model, cwbr = Plain(), CWBR(CLASSES)
    catcher = cwbr.catch(model, ["network.conv"])
    images, targets = batch()
    gradients = []
    for regularized in (True, True, True, False):
        logits = model(images)
        if regularized:
            cwbr(catcher.feats, logits, targets)
        model.zero_grad()
        cross_entropy(logits, targets).backward()
        gradients.append(model.network.conv.weight.grad)
    (plain,) = torch.autograd.grad(cross_entropy(model(images), targets), model.network.conv.weight)
    torch.testing.assert_close(gradients[-1], plain)
    assert not torch.allclose(gradients[-2], plain, rtol=1e-3)


def test_a_bad_name_leaves_the_model_as_it_was() -> None:
    model, cwbr = Plain(), CWBR(CLASSES)
    with pytest.raises(ValueError, match=r"no layer 'network\.cnov'; did you"):
        cwbr.catch(model, ["network.conv", "network.cnov"])
    assert not any(module._forward_hooks for module in model.modules())


def test_copies_of_the_module_have_taps_of_their_own() -> None:
    model, cwbr = Plain(), CWBR(CLASSES)
    cwbr.catch(model, ["network.conv"])
    copied = copy.deepcopy(cwbr)
    assert copied._taps["network.conv"] is not cwbr._taps["network.conv"]
