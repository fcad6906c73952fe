"""How strong the pull is: by hand, and nothing where nothing is known."""

from __future__ import annotations

import pytest
import torch
from cwbr_models import CLASSES, Network, batch, warmed_up
from torch import Tensor

from cwbr_fused import CWBR
from cwbr_fused.balanced import trust
from cwbr_fused.balanced.bank import ClassBank
from cwbr_fused.operations import reference_bank

INF = float("inf")


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def nearest(z: Tensor, mean: Tensor, var: Tensor, index: Tensor, own: int) -> Tensor:
    """Whether each sample's own mean is nearer than those of its rivals, by the operation."""
    labels, rivals = index[:, :own], index[:, own:]
    weight, seen = torch.zeros(rivals.shape), torch.ones(len(mean), dtype=torch.bool)
    acting = labels, weight[:, :0], torch.zeros(len(z)), rivals, weight, seen
    _, numbers = reference_bank.class_attraction(z, [mean], var, torch.ones(1), *acting, 1.0)
    return numbers[1, 0]


def test_nearest_by_hand_with_the_variance_as_the_metric() -> None:
    mean = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    z = torch.tensor([[0.9, 0.0], [1.1, 0.0], [0.9, 0.0]])
    index = torch.tensor([[0, 1, 2], [0, 1, 2], [2, 0, -1]])
    var = torch.ones(2)
    assert nearest(z, mean, var, index, 1).tolist() == [1, 0, 0]
    # Where the second dimension varies most, the third class is as near as the first.
    var = torch.tensor([1.0, 1e6])
    assert nearest(z[:1], mean, var, torch.tensor([[2, 1, -1]]), 1).tolist() == [1]


def test_nobody_is_nearest_without_a_class_or_a_rival_or_with_a_feature_that_is_no_number() -> None:
    mean, var = torch.zeros(3, 2), torch.ones(2)
    z = torch.tensor([[0.0, 0.0], [0.0, 0.0], [float("nan"), 0.0], [INF, 0.0]])
    mean[1] = 5
    index = torch.tensor([[-1, 1], [0, -1], [0, 1], [0, 1]])
    assert nearest(z, mean, var, index, 1).tolist() == [0, 0, 0, 0]
    assert nearest(z, mean, var, index[:, :1], 1).tolist() == [0, 0, 0, 0]


def test_the_second_class_of_a_soft_target_is_no_rival() -> None:
    mean = torch.tensor([[0.0], [1.0], [5.0]])
    z, var = torch.tensor([[0.9]]), torch.ones(1)
    assert nearest(z, mean, var, torch.tensor([[0, 1, 2]]), 2).tolist() == [1]
    assert nearest(z, mean, var, torch.tensor([[0, 1, 2]]), 1).tolist() == [0]


def test_strength_by_hand_and_its_limits() -> None:
    accuracy = torch.tensor([1.0, 0.5, 0.0])
    full = trust.strength(accuracy, torch.tensor(0.5))
    assert full.tolist() == [1, 0.5**trust.SHARPNESS, 0]
    for finished in (0.0, 1.0):
        assert trust.strength(accuracy, torch.tensor(finished)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("soft", [False, True])
def test_a_bank_that_knows_nothing_adds_nothing(network: Network, soft: bool) -> None:
    cwbr = CWBR(CLASSES)
    images, targets = batch()
    logits, features = network(images)
    labels = torch.nn.functional.one_hot(targets, CLASSES).float() if soft else targets
    cwbr(features, logits, labels)
    logits.sum().backward()
    assert {(h["trust"], h["reg_norm"]) for h in cwbr.health().values()} == {(0, 0)}


def test_health_shows_the_accuracy_of_each_layer_before_its_means_moved(network: Network) -> None:
    cwbr = warmed_up(network)
    images, targets = batch()
    logits, features = network(images)
    expected = {}
    for name, layer in features.items():
        bank = cwbr.banks[name]
        assert isinstance(bank, ClassBank)
        fresh = {key: value.clone() for key, value in bank.state_dict().items()}
        expected[name] = (layer.detach(), fresh)
    cwbr(features, logits, targets)
    logits.sum().backward()
    fitted = (logits.argmax(1) == targets).float().mean()
    for name, (layer, state) in expected.items():
        z = layer if layer.dim() == 2 else layer.mean((2, 3))
        var = cwbr.banks[name].metric()
        rivals = logits.detach().scatter(1, targets[:, None], -INF)
        rivals = torch.where(state["count"] > 0, rivals, -INF).topk(5).indices
        index = torch.cat([targets[:, None], rivals], 1)
        distance = ((z[:, None] - state["mean"][index]).square() / var).sum(2)
        accuracy = (distance.argmin(1) == 0).float().mean()
        health = cwbr.health()[name]
        assert health["accuracy"] == pytest.approx(float(accuracy))
        full = 4 * fitted * (1 - fitted) * accuracy**trust.SHARPNESS
        assert health["trust"] == pytest.approx(float(full), rel=1e-4)


def test_samples_without_a_label_count_neither_as_right_nor_as_wrong(network: Network) -> None:
    state = warmed_up(network).state_dict()
    images, targets = batch()
    soft = torch.nn.functional.one_hot(targets, CLASSES).float()
    healths = []
    for labels in (targets, soft, torch.cat([soft, torch.zeros_like(soft)])):
        cwbr = CWBR(CLASSES)
        cwbr.load_state_dict(state)
        logits, features = network(torch.cat([images, images])[: len(labels)])
        cwbr(features, logits, labels)
        logits.sum().backward()
        healths.append(cwbr.health()["body"])
    assert healths[0]["trust"] > 0
    for health in healths[1:]:
        assert health["trust"] == pytest.approx(healths[0]["trust"])
        assert health["accuracy"] == pytest.approx(healths[0]["accuracy"])
