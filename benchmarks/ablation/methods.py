"""What is compared: the recommended form, what it is made of, its rivals, and the controls.

A method is called between forward and backward with the raw features, and returns the loss to
differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cwbr_fused
from cwbr_fused.balanced.balance import Balance
from cwbr_fused.balanced.bank import ClassBank
from cwbr_fused.balanced.module import CWBR
from cwbr_fused.inputs.pooling import Spread

Features = Mapping[str, Tensor]
Step = Callable[[Features, Tensor, Tensor, Tensor], Tensor]

# The share of the cross-entropy's gradient where a method has no rule for it.
FIXED_RATIO = 0.2


class Method(NamedTuple):
    """How to start it for a number of classes, how its batches are drawn, and what it is for."""

    make: Callable[[int], Step]
    what: str
    sampler: str = "shuffle"
    init_offset: int = 0


def cross_entropy_alone(classes: int) -> Step:
    return lambda features, logits, targets, ce: ce


def published(objective: str) -> Step:
    """Overlap of the batch's classes, weighted to the value of the cross-entropy."""

    def step(features: Features, logits: Tensor, targets: Tensor, ce: Tensor) -> Tensor:
        reg = cwbr_fused.loss(features, logits, targets, objective=objective)
        return cwbr_fused.scale_match(ce, reg, objective=objective)

    return step


def balanced(regularizer: CWBR) -> Step:
    def step(features: Features, logits: Tensor, targets: Tensor, ce: Tensor) -> Tensor:
        regularizer(features, logits, targets)
        return ce

    return step


def repaired(classes: int) -> Step:
    """The published pairs of a batch with every mend, and a gradient of a fixed share."""

    def step(features: Features, logits: Tensor, targets: Tensor, ce: Tensor) -> Tensor:
        leaves = {name: layer.detach().requires_grad_() for name, layer in features.items()}
        reg = cwbr_fused.loss(
            leaves,
            logits,
            targets,
            objective="log_overlap",
            min_count=1,
            shrinkage="analytic",
            noise_floor=True,
            temperature="dims",
        )
        pulls = torch.autograd.grad(reg, list(leaves.values()))
        for layer, pull in zip(features.values(), pulls, strict=True):
            hook_on(layer, pull)
        return ce

    return step


def hook_on(layer: Tensor, pull: Tensor) -> None:
    layer.register_hook(Balance(Spread(pull, slice(None)), torch.tensor(FIXED_RATIO)))


class RandomPartners(CWBR):
    """Pushes from random classes, as strongly as from confused ones: does the confusion matter?"""

    def _coefficients(
        self, backend: str, logits: Tensor, targets: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        index, coefficient, own = super()._coefficients(backend, logits, targets, seen)
        others, _, _ = super()._coefficients(backend, torch.rand_like(logits), targets, seen)
        return torch.where(index >= 0, others, -1), coefficient, own


class FixedRatio(CWBR):
    """The same share of the gradient from the first step to the last."""

    def _mean(self, own: Tensor, processes: Any) -> Tensor:
        return own.new_ones(())


class PairBank:
    """Pairs of classes instead of samples: batch means against the bank's, by log-sum-exp.

    `logsumexp(log w_kj - D_kj / T)` over the 64 most confused pairs of a class k of the batch and
    any class j, with `D_kj = sum_d (mean_k - bank_j)^2 / (8 var)`, T the mean of D, and a variance
    whose gradient is that of this batch's scatter.
    """

    PAIRS = 64

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self.banks: dict[str, ClassBank] = {}

    def __call__(self, features: Features, logits: Tensor, targets: Tensor, ce: Tensor) -> Tensor:
        classes, inverse, size = targets.unique(return_inverse=True, return_counts=True)
        groups = len(classes)

        def class_means(x: Tensor) -> Tensor:
            return x.new_zeros(groups, x.shape[1]).index_add(0, inverse, x) / size[:, None]

        confusion = class_means(logits.detach().softmax(1))
        confusion[torch.arange(groups), classes] = 0
        for name, layer in features.items():
            leaf = layer.detach().requires_grad_()
            z = cwbr_fused.to_vec(leaf)
            bank = self.banks.setdefault(name, ClassBank(self.classes, z.shape[1]))
            seen, mean = bank.count > 0, class_means(z)
            scatter = class_means((z.detach() - mean.detach()[inverse]).square())
            weight_of_move, _ = bank.observe(classes, size, mean.detach(), scatter)
            known = seen[targets]
            if known.any():
                now = (z - bank.mean[targets])[known].square().mean(0)
                var = bank.metric() + now - now.detach()
                weight, pair = torch.where(seen, confusion, 0).flatten().topk(self.PAIRS)
                k, j = pair // self.classes, pair % self.classes
                distance = ((mean[k] - bank.mean[j]).square() / (8 * var)).sum(1)
                scaled = distance / distance.mean().detach().clamp(min=1e-12)
                objective = torch.logsumexp((weight + 1e-12).log() - scaled, 0)
                (pull,) = torch.autograd.grad(objective, leaf)
                hook_on(layer, pull)
            bank.follow(classes, weight_of_move, mean.detach(), momentum=0.7)
        return ce


METHODS = {
    "ce": Method(cross_entropy_alone, "cross-entropy, shuffled batches"),
    "ce again": Method(cross_entropy_alone, "the same from another start", init_offset=500),
    "ce pk": Method(cross_entropy_alone, "cross-entropy, 32 classes x 4 images", sampler="pk"),
    "published": Method(lambda classes: published("overlap"), "cwbr_fused.loss, scale_match"),
    "log overlap": Method(lambda classes: published("log_overlap"), "its logarithm, scale_match"),
    "repaired": Method(
        repaired, "log overlap, shrunk variances, noise floor, D / dims, a gradient of 0.2"
    ),
    "pair bank": Method(PairBank, "confused pairs of class means, by log-sum-exp"),
    "pull": Method(
        lambda classes: balanced(CWBR(classes, push=0)), "CWBR(push=0): a balanced center loss"
    ),
    "random push": Method(
        lambda classes: balanced(RandomPartners(classes)), "CWBR, random partners"
    ),
    "fixed ratio": Method(
        lambda classes: balanced(FixedRatio(classes, ratio=FIXED_RATIO)), "CWBR, constant share 0.2"
    ),
    "CWBR": Method(lambda classes: balanced(CWBR(classes)), "the recommended form, as it comes"),
}
