"""Soft targets: one-hot rows are class indices, mixed samples have two classes."""

from __future__ import annotations

import copy

import pytest
import torch
from cwbr_models import CLASSES, Network, batch, warmed_up
from torch import nn
from torch.nn.functional import cross_entropy

from cwbr_fused import CWBR
from cwbr_fused.balanced.bank import ClassBank


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def test_one_hot_soft_targets_are_class_indices() -> None:
    results = []
    for soft in (False, True):
        torch.manual_seed(0)
        network, cwbr = Network(), CWBR(CLASSES)
        for seed in range(4):
            images, targets = batch(seed)
            logits, features = network(images)
            features["body"].retain_grad()
            given = nn.functional.one_hot(targets, CLASSES).float() if soft else targets
            energy = cwbr(features, logits, given)
            cross_entropy(logits, targets).backward()
        results.append((energy, features["body"].grad, cwbr.banks["conv"].mean))
    for hard, soft_result in zip(*results, strict=True):
        torch.testing.assert_close(soft_result, hard, rtol=1e-4, atol=1e-6)


def test_a_mixed_sample_is_pulled_to_both_of_its_classes(network: Network) -> None:
    cwbr = warmed_up(network, push=0, ratio=100)
    images, _ = batch()
    # The pull needs samples that are classified right, and others that are not.
    with torch.no_grad():
        logits = network(images)[0]
        network.head.bias[1] -= (logits[:, 1] - logits[:, [0, 3, 4, 5]].amax(1)).median()
    logits, features = network(images)
    share = torch.tensor([0.7, 0.3])
    mixed = torch.zeros(len(images), CLASSES)
    mixed[:, 1:3] = share
    body = features["body"]
    (incoming,) = torch.autograd.grad(cross_entropy(logits, mixed), body, retain_graph=True)
    bank = copy.deepcopy(cwbr.banks["body"])
    assert isinstance(bank, ClassBank)
    body.retain_grad()
    cwbr(features, logits, mixed)
    cross_entropy(logits, mixed).backward()
    assert body.grad is not None
    added = body.grad - incoming
    direction = (body.detach() - share @ bank.mean[1:3]) / cwbr.banks["body"].metric()
    torch.testing.assert_close(
        added / added.norm(), direction / direction.norm(), rtol=1e-3, atol=1e-5
    )


def test_mixed_targets_of_far_apart_logits_keep_the_gradient_finite(network: Network) -> None:
    cwbr = warmed_up(network)
    images, _ = batch()
    _, features = network(images)
    logits = torch.zeros(len(images), CLASSES)
    logits[:, 2] = 300  # the probability of class 1 underflows, and the ratio of the two overflows
    mixed = torch.zeros(len(images), CLASSES)
    mixed[:, 1], mixed[:, 2] = 0.7, 0.3
    body = features["body"]
    body.retain_grad()
    cwbr(features, logits, mixed)
    body.sum().backward()
    assert body.grad is not None
    assert body.grad.isfinite().all()


def test_bad_soft_targets_are_named(network: Network) -> None:
    images, _ = batch()
    logits, features = network(images)
    with pytest.raises(ValueError, match="targets"):
        CWBR(CLASSES)(features, logits, torch.full((len(images), CLASSES), -1.0))
