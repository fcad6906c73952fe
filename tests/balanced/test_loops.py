"""The rows of docs/loops.md that no other test shows: CWBR in the loops that people write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from cwbr_models import CLASSES, batch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from cwbr_fused import CWBR

LAYERS = ["body"]


class Classifier(nn.Module):
    """Its body may be checkpointed."""

    def __init__(self, wrap: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.stem, self.body, self.head = nn.Linear(36, 9), nn.Linear(9, 8), nn.Linear(8, CLASSES)
        self.wrap = wrap

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images.flatten(1)).tanh()
        x = self.body(x) if self.wrap is None else self.wrap(self.body, x)
        logits: Tensor = self.head(x.tanh())
        return logits


def trained(wrap: Callable[[nn.Module, Tensor], Tensor] | None = None) -> tuple[Classifier, CWBR]:
    """A model and banks after some steps: they get some samples right and others not."""
    torch.manual_seed(0)
    model, cwbr = Classifier(), CWBR(CLASSES)
    features = cwbr.catch(model, LAYERS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(30):
        step(model, cwbr, features, *batch(seed))
        optimizer.step()
    features.remove()
    model.wrap = wrap
    return model, cwbr


def step(
    model: nn.Module, cwbr: CWBR | None, features: Any, images: Tensor, targets: Tensor
) -> list[Tensor]:
    """The gradients of a step."""
    model.zero_grad()
    logits = model(images)
    if cwbr is not None:
        cwbr(features, logits, targets)
    cross_entropy(logits, targets).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def differ(ours: list[Tensor], others: list[Tensor]) -> bool:
    return not all(torch.allclose(a, b) for a, b in zip(ours, others, strict=True))


def test_samples_without_a_label_are_left_alone() -> None:
    model, cwbr = trained()
    images, targets = batch(50)
    soft = one_hot(targets, CLASSES).float()
    soft[4:] = 0
    features, gradients = cwbr.catch(model, LAYERS), []
    for regularized in (False, True):
        logits = model(images)
        features.feats["body"].retain_grad()
        if regularized:
            cwbr(features, logits, soft)
        cross_entropy(logits, soft).backward()
        gradients.append(features.feats["body"].grad)
    plain, pulled = gradients
    torch.testing.assert_close(pulled[4:], plain[4:])
    assert not torch.allclose(pulled[:4], plain[:4])


def test_both_passes_of_sharpness_aware_minimization_are_pulled() -> None:
    model, cwbr = trained()
    images, targets = batch(50)
    features = cwbr.catch(model, LAYERS)
    first = step(model, cwbr, features, images, targets)
    with torch.no_grad():
        for parameter, gradient in zip(model.parameters(), first, strict=True):
            parameter += 0.05 * gradient
    moved, bank = copy.deepcopy(model), copy.deepcopy(cwbr)
    second = step(model, cwbr, features, images, targets)
    twin = bank.catch(moved, LAYERS)
    torch.testing.assert_close(second, step(moved, bank, twin, images, targets))
    assert differ(second, step(moved, None, twin, images, targets))


def test_the_closure_of_lbfgs_may_run_as_often_as_it_likes(
    recwarn: pytest.WarningsRecorder,
) -> None:
    model, cwbr = trained()
    images, targets = batch(50)
    features = cwbr.catch(model, LAYERS)
    losses = []

    def closure() -> Tensor:
        step(model, cwbr, features, images, targets)
        losses.append(cross_entropy(model(images), targets))
        return losses[-1]

    torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5).step(closure)
    assert len(losses) > 1
    assert losses[-1] < losses[0]
    assert not recwarn.list


def around(layer: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(layer, x, use_reentrant=False)  # type: ignore[no-any-return]


def test_activation_checkpointing_changes_no_gradient() -> None:
    images, targets = batch(50)
    gradients = []
    for wrap in (None, around):
        model, cwbr = trained(wrap)
        gradients.append(step(model, cwbr, cwbr.catch(model, LAYERS), images, targets))
    torch.testing.assert_close(*gradients)


def test_reentrant_checkpointing_is_said_to_have_no_effect() -> None:
    def reentrant(layer: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(lambda y: 2 * layer(y), x, use_reentrant=True)  # type: ignore[no-any-return]

    model, cwbr = trained(reentrant)
    with pytest.warns(match=r"no effect on body.*use_reentrant=False"):
        step(model, cwbr, cwbr.catch(model, LAYERS), *batch(50))


def test_checkpointing_of_timm_changes_no_gradient() -> None:
    timm = pytest.importorskip("timm", exc_type=Exception)
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(8) % 4
    gradients = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = timm.create_model("test_vit", img_size=32, num_classes=4)
        model.set_grad_checkpointing(checkpointed)
        cwbr = CWBR(4)
        features = cwbr.catch(model)
        gradients += [step(model, cwbr, features, images, targets) for _ in range(3)]
    torch.testing.assert_close(gradients[:3], gradients[3:])


def test_an_averaged_model_is_not_pulled_and_stores_no_features() -> None:
    model, cwbr = trained()
    features = cwbr.catch(model, LAYERS)
    averaged = AveragedModel(model)
    ours = step(model, cwbr, features, *batch(50))
    averaged.update_parameters(model)
    twin, bank = trained()
    torch.testing.assert_close(ours, step(twin, bank, bank.catch(twin, LAYERS), *batch(50)))
    logits = model(batch(51)[0])
    averaged(batch(52)[0])
    cwbr(features, logits, batch(51)[1])
    assert features.feats["body"].shape == (12, 8)


@pytest.mark.filterwarnings("ignore")
def test_a_distributed_checkpoint_goes_into_a_module_that_has_measured_once(tmp_path: Path) -> None:
    model, cwbr = trained()
    dcp.save({"cwbr": cwbr.state_dict()}, checkpoint_id=tmp_path)
    fresh = CWBR(CLASSES).eval()
    features = fresh.catch(model, LAYERS)
    images, targets = batch(50)
    fresh(features, model(images), targets)
    state = {"cwbr": fresh.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path)
    fresh.load_state_dict(state["cwbr"])
    assert fresh.state_dict().keys() == cwbr.state_dict().keys()
    for name, value in cwbr.state_dict().items():
        torch.testing.assert_close(fresh.state_dict()[name], value)
