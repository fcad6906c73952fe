"""What a trained model is worth: accuracies, confusing pairs, distances, linear probes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from cwbr_fused.diagnostics import linear_probe, top_confusing_pairs
from fgvc.data import Batch, Images
from fgvc.distances import confused_distances
from fgvc.models import Backbone

PAIRS = 20
SCORES = {"top-1": "top-1 accuracy", "top-5": "top-5 accuracy", "class": "mean class accuracy"}


class Outputs(NamedTuple):
    """Of N images: logits (N, C), pooled features (N, D) by layer, targets and indices (N,); on
    the CPU."""

    logits: Tensor
    features: dict[str, Tensor]
    targets: Tensor
    indices: Tensor


class Evaluation(NamedTuple):
    """One trained model; everything but the pairs is measured on the test part."""

    scores: dict[str, float]
    predictions: Tensor
    targets: Tensor
    indices: Tensor
    pairs: Tensor
    confusion: Tensor
    distances: dict[str, float]
    probes: dict[str, float]

    @property
    def correct(self) -> Tensor:
        """(N,) bool."""
        return self.predictions == self.targets


class Scores:
    """Top-1, top-5 and mean class accuracy in [0, 1], of batches, over all processes.

    The mean class accuracy is over the classes that occur.
    """

    def __init__(self, classes: int, present: Tensor, device: torch.device, together: bool) -> None:
        def accuracy(top_k: int, average: Literal["micro", "none"]) -> MulticlassAccuracy:
            return MulticlassAccuracy(
                classes, top_k, average, validate_args=False, sync_on_compute=together
            )

        self._present = present
        self._metrics = MetricCollection(
            {
                "top-1": accuracy(1, "micro"),
                "top-5": accuracy(min(5, classes), "micro"),
                "class": accuracy(1, "none"),
            },
            compute_groups=False,
        ).to(device)

    def update(self, logits: Tensor, targets: Tensor) -> None:
        self._metrics.update(logits, targets)

    def compute(self) -> dict[str, float]:
        scores = self._metrics.compute()
        scores["class"] = scores["class"].cpu()[self._present].mean()
        return {name: float(score) for name, score in scores.items()}


@torch.no_grad()
def validate(
    backbone: Backbone,
    batches: Iterable[Batch],
    scores: Scores,
    device: torch.device,
    check: Callable[[], None],
) -> dict[str, float]:
    """The scores of the model in evaluation mode; each process passes its own batches."""
    backbone.model.eval()
    for batch in batches:
        check()
        logits, _ = backbone(_on(device, batch.images))
        scores.update(logits.float(), batch.targets.to(device))
    return scores.compute()


@torch.no_grad()
def predict(
    backbone: Backbone, batches: Iterable[Batch], device: torch.device, check: Callable[[], None]
) -> Outputs:
    """The outputs of the model in evaluation mode; `check` is called before every batch."""
    backbone.model.eval()
    logits, targets, indices = [], [], []
    features: dict[str, list[Tensor]] = {name: [] for name in backbone.layers}
    for batch in batches:
        check()
        output, raw = backbone(_on(device, batch.images))
        logits.append(output.float().cpu())
        targets.append(batch.targets)
        indices.append(batch.indices)
        for name, vector in backbone.pool(raw).items():
            features[name].append(vector.float().cpu())
    return Outputs(
        torch.cat(logits),
        {n: torch.cat(v) for n, v in features.items()},
        torch.cat(targets),
        torch.cat(indices),
    )


def _on(device: torch.device, images: Tensor) -> Tensor:
    return images.to(device, memory_format=torch.channels_last, non_blocking=True)


def evaluate(
    backbone: Backbone,
    images: Images,
    device: torch.device,
    check: Callable[[], None],
    top_m: int,
    probe_images: int,
) -> Evaluation:
    """The confusing pairs are picked on the validation part, everything else is of the test part.

    The distances are those of the model's own `top_m` most confused pairs, with the class
    statistics of the whole test part.
    """
    train = predict(backbone, images.plain("train", probe_images), device, check)
    val = predict(backbone, images.plain("val"), device, check)
    test = predict(backbone, images.plain("test"), device, check)
    classes = len(images.class_names)
    scores = Scores(classes, test.targets.unique(), torch.device("cpu"), together=False)
    scores.update(test.logits, test.targets)
    pairs, confusion = top_confusing_pairs(val.logits, val.targets, PAIRS)
    return Evaluation(
        scores.compute(),
        test.logits.argmax(1),
        test.targets,
        test.indices,
        pairs,
        confusion,
        confused_distances(test.features, test.logits, test.targets, top_m),
        {
            name: linear_probe(vectors, train.targets, test.features[name], test.targets)
            for name, vectors in train.features.items()
        },
    )
