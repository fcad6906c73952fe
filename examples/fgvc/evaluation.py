"""What a trained model is worth: accuracy, confusing pairs, overlaps, linear probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cwbr_fused.diagnostics import layer_overlaps, linear_probe, top_confusing_pairs
from fgvc.data import Batches, Images
from fgvc.models import Backbone

PAIRS = 20


class Outputs(NamedTuple):
    """Of N images: logits (N, C), pooled features (N, D) by layer, targets (N,); on the CPU."""

    logits: Tensor
    features: dict[str, Tensor]
    targets: Tensor


class Evaluation(NamedTuple):
    """One trained model; everything but the pairs is measured on the test part."""

    predictions: Tensor
    targets: Tensor
    pairs: Tensor
    confusion: Tensor
    overlaps: dict[str, float]
    probes: dict[str, float]

    @property
    def correct(self) -> Tensor:
        """(N,) bool."""
        return self.predictions == self.targets


@torch.no_grad()
def predict(
    backbone: Backbone, batches: Batches, device: torch.device, check: Callable[[], None]
) -> Outputs:
    """The outputs of the model in evaluation mode; `check` is called before every batch."""
    backbone.model.eval()
    logits, targets = [], []
    features: dict[str, list[Tensor]] = {name: [] for name in backbone.layers}
    for images, labels in batches:
        check()
        output, raw = backbone(images.to(device, memory_format=torch.channels_last))
        logits.append(output.float().cpu())
        targets.append(labels)
        for name, vector in backbone.pool(raw).items():
            features[name].append(vector.float().cpu())
    return Outputs(
        torch.cat(logits), {n: torch.cat(v) for n, v in features.items()}, torch.cat(targets)
    )


def evaluate(
    backbone: Backbone,
    images: Images,
    device: torch.device,
    check: Callable[[], None],
    top_m: int,
    probe_images: int,
) -> Evaluation:
    """The confusing pairs are picked on the validation part, everything else is of the test part.

    The overlaps are those of the model's own `top_m` most confused pairs, with the class
    statistics of the whole test part.
    """
    train = predict(backbone, images.plain("train", probe_images), device, check)
    val = predict(backbone, images.plain("val"), device, check)
    test = predict(backbone, images.plain("test"), device, check)
    pairs, confusion = top_confusing_pairs(val.logits, val.targets, PAIRS)
    overlaps = layer_overlaps(test.features, test.logits, test.targets, top_m=top_m)
    return Evaluation(
        test.logits.argmax(1),
        test.targets,
        pairs,
        confusion,
        {name: float(rho) for name, rho in overlaps.items()},
        {
            name: linear_probe(vectors, train.targets, test.features[name], test.targets)
            for name, vectors in train.features.items()
        },
    )
