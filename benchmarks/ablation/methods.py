"""What is compared on every base: the recommended form, its parts, and rivals of its kind.

A method is called between forward and backward with the raw features, and returns the loss to
differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, normalize

import cwbr_fused
from cwbr_fused import CWBR, to_vec

Features = Mapping[str, Tensor]


class Method(nn.Module):
    """The base alone. Parameters are trained with those of the network."""

    def __init__(self, classes: int, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.classes, self.widths = classes, widths

    def forward(self, features: Features, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        return loss


class Balanced(Method):
    """The recommended form, as it comes."""

    push = 1.0

    def __init__(self, classes: int, widths: Mapping[str, int]) -> None:
        super().__init__(classes, widths)
        self.regularizer = CWBR(classes, push=self.push)

    def forward(self, features: Features, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        self.regularizer(features, logits, targets)
        return loss


class Pull(Balanced):
    """`CWBR(push=0)`: what the confusion adds is the difference to it."""

    push = 0.0


class Published(Method):
    """`cwbr_fused.loss` with `scale_match`."""

    def forward(self, features: Features, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        return cwbr_fused.scale_match(loss, cwbr_fused.loss(features, logits, targets))


class Rival(Method):
    """Another regularizer, of which `weight` times is added to the loss."""

    def __init__(self, classes: int, widths: Mapping[str, int], weight: float) -> None:
        super().__init__(classes, widths)
        self.weight = weight


class Centers(Rival):
    """Center loss (Wen 2016) at the last layer, or at all: half the squared distance to the mean.

    The means move at the pace of the paper.
    """

    everywhere = False
    pace = 0.5

    def __init__(self, classes: int, widths: Mapping[str, int], weight: float) -> None:
        super().__init__(classes, widths, weight)
        self.centers = {name: torch.zeros(classes, width) for name, width in widths.items()}

    def forward(self, features: Features, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        names = list(features) if self.everywhere else list(features)[-1:]
        for name in names:
            z = to_vec(features[name])
            difference = z - self.centers[name][targets]
            loss = loss + self.weight / len(names) * difference.square().sum(1).mean() / 2
            size = torch.bincount(targets, minlength=self.classes)[targets]
            move = self.pace * difference.detach() / (1 + size[:, None])
            self.centers[name].index_add_(0, targets, move)
        return loss


class CentersEverywhere(Centers):
    """The same at every layer, as SVSL (arXiv 2201.08924) simplifies intermediate layers."""

    everywhere = True


class SupCon(Rival):
    """Supervised contrast (Khosla 2020) of the batch's embeddings beside the loss."""

    temperature = 0.1

    def forward(self, features: Features, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        z = normalize(to_vec(list(features.values())[-1]))
        itself = torch.eye(len(z), dtype=torch.bool)
        similarity = (z @ z.T / self.temperature).masked_fill(itself, -torch.inf)
        positive = (targets[:, None] == targets) & ~itself
        log_p = log_softmax(similarity, 1).masked_fill(~positive, 0)
        have = positive.any(1)
        each = -log_p.sum(1)[have] / positive.sum(1)[have]
        return loss + self.weight * each.sum() / len(z)


class DeepSupervision(Rival):
    """A linear classifier with cross-entropy at every layer but the last (Lee 2015)."""

    def __init__(self, classes: int, widths: Mapping[str, int], weight: float) -> None:
        super().__init__(classes, widths, weight)
        self.heads = nn.ModuleList(nn.Linear(w, classes) for w in list(widths.values())[:-1])

    def forward(self, features: Features, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        for head, layer in zip(self.heads, features.values(), strict=False):
            loss = loss + self.weight * cross_entropy(head(to_vec(layer)), targets)
        return loss


class PairwiseConfusion(Rival):
    """The squared distance between predictions of pairs of other classes (Dubey 2018)."""

    def forward(self, features: Features, logits: Tensor, targets: Tensor, loss: Tensor) -> Tensor:
        half = len(logits) // 2
        p, q = logits[: 2 * half].softmax(1).chunk(2)
        a, b = targets[: 2 * half].chunk(2)
        distance = (p - q).square().sum(1) * (a != b)
        return loss + self.weight * distance.mean()


class Entry(NamedTuple):
    """A method and whether it is one of the rivals, of whose weights validation chooses one."""

    make: Callable[[int, Mapping[str, int]], Method]
    what: str
    rival: bool = False


def _entries() -> Iterator[tuple[str, Entry]]:
    yield "alone", Entry(Method, "the base alone")
    yield "CWBR", Entry(Balanced, "the recommended form, as it comes")
    yield "pull", Entry(Pull, "CWBR(push=0)")
    yield "published", Entry(Published, "cwbr_fused.loss with scale_match")
    rivals: tuple[tuple[str, type[Rival], str, tuple[float, ...]], ...] = (
        ("center loss", Centers, "at the last layer", (0.001, 0.003, 0.01, 0.03)),
        ("centers everywhere", CentersEverywhere, "at every layer", (0.001, 0.003, 0.01, 0.03)),
        ("SupCon", SupCon, "supervised contrast beside the loss", (0.1, 0.3, 1.0)),
        ("deep supervision", DeepSupervision, "a classifier at every layer", (0.1, 0.3)),
        ("pairwise confusion", PairwiseConfusion, "between predictions", (0.1, 0.5, 2.0)),
    )
    for name, make, what, weights in rivals:
        for weight in weights:
            yield f"{name}, {weight}", Entry(partial(make, weight=weight), what, rival=True)


METHODS = dict(_entries())
