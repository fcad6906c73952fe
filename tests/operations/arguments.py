"""Valid arguments for every operation of the schema, at any sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_inputs import EPS, regularizer_with_moments
from torch import Tensor

from cwbr_fused.operations import reference, schema


@dataclass(frozen=True)
class Sizes:
    """Of a batch and a model; K = batch // min_count groups, some of them empty."""

    batch: int = 23
    dims: int = 7
    n_classes: int = 9
    pairs: int = 8
    min_count: int = 2
    confusions: int = 3
    layers: int = 2


# Each size equal to 1 in turn, and where other kernels' paths begin or numbers become constants.
SETTINGS = {
    "odd": Sizes(),
    "multiples of 16": Sizes(48, 32, 16, 16),
    "one sample": Sizes(batch=1),
    "one sample, one group": Sizes(batch=1, min_count=1),
    "one group": Sizes(batch=2),
    "two groups": Sizes(batch=4),
    "one dimension": Sizes(dims=1),
    "one class": Sizes(n_classes=1),
    "two classes": Sizes(n_classes=2, confusions=1),
    "one pair": Sizes(pairs=1),
    "one confusion": Sizes(confusions=1),
    "one layer": Sizes(layers=1),
    "groups of one": Sizes(batch=5, min_count=1),
    "all one": Sizes(1, 1, 1, 1, 1, 1, 1),
}


def operation_arguments(
    dtype: torch.dtype = torch.float64, backend: str = "cpu", sizes: Sizes = SETTINGS["odd"]
) -> dict[str, tuple[Any, ...]]:
    """Arguments for every operation; half-precision features and logits where `dtype` is one.

    The gradient of `regularizer` wants the moments on a GPU; on the CPU it computes them.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    wide = reference.accumulation_dtype(dtype)
    batch, n_classes = sizes.batch, sizes.n_classes
    z, logits = randn(batch, sizes.dims), randn(batch, n_classes)
    targets = torch.randint(n_classes, (batch,), generator=generator)
    order, offsets, classes, pairs, weights = reference.plan(
        logits, targets, sizes.pairs, sizes.min_count
    )
    mean, var = reference.class_moments(z, order, offsets, EPS)
    var = var + 0.5
    alpha = reference.confusion_weights(logits, order, offsets, classes)
    distance = reference.pair_distance(mean, var, pairs, EPS)
    features = [z, *(z[:, : (sizes.dims + 1) // 2] * 2 for _ in range(1, sizes.layers))]
    planned = (order, offsets, pairs, weights)
    on_gpu = backend in ("triton", "cuda")
    regularizer = regularizer_with_moments if on_gpu else reference.regularizer
    value, *saved = regularizer(features, *planned, EPS, True)
    overlap = reference.weighted_overlap(mean, var, alpha, EPS, True)
    seen = torch.arange(n_classes) != 4
    rivals, weight, own = schema.pure_pytorch("top_confusions")(
        logits, targets, seen, sizes.confusions
    )
    widths = [sizes.dims, *[(sizes.dims + 1) // 2] * (sizes.layers - 1)]
    joint = torch.cat([z, *(z[:, :d] * 2 for d in widths[1:])], 1)
    joint_mean, joint_var = reference.class_moments(joint, order, offsets, EPS)
    layers = range(sizes.layers)
    counts = [torch.arange(n_classes).to(wide) % 3 + layer for layer in layers]
    bank = [randn(n_classes, d, dtype=wide) for d in widths], counts
    metric = [randn(d, dtype=wide).abs() + 0.5 for d in widths]
    labels = torch.stack([targets, targets.roll(1)], 1)
    acting = labels, (labels % 3).to(wide), own, rivals, weight, seen, 0.7
    updates = [torch.tensor(3 + layer, dtype=wide) for layer in layers]
    moves = (classes >= 0) * torch.tensor(1.5, dtype=wide)
    unit = torch.arange(1, 1 + sizes.layers).to(wide)
    arguments: dict[str, tuple[Any, ...]] = {
        "group_by_class": (targets, sizes.min_count),
        "class_moments": (z, order, offsets, EPS),
        "class_moments_backward": (mean, var, z, mean, var, order, offsets, EPS),
        "confusion_weights": (logits, order, offsets, classes),
        "top_pairs": (alpha, sizes.pairs),
        "plan": (logits, targets, sizes.pairs, sizes.min_count),
        "pair_distance": (mean, var, pairs, EPS),
        "pair_distance_backward": (distance, mean, var, pairs, EPS),
        "all_pair_distance": (mean, var, EPS),
        "all_pair_distance_backward": (alpha, mean, var, EPS),
        "weighted_overlap": (mean, var, alpha, EPS, False),
        "weighted_overlap_backward": (overlap, overlap, mean, var, alpha, EPS, True),
        "weighted_overlap_with_gradient": (overlap, mean, var, alpha, EPS, False),
        "regularizer": (features, *planned, EPS, False),
        "regularizer_backward": (value, features, *saved, *planned, EPS, True),
        "top_confusions": (logits, targets, seen, sizes.confusions),
        "class_attraction": (joint, bank[0], torch.cat(metric), unit, *acting),
        "observe_classes": (
            *(*bank, metric, updates, classes, moves, joint_mean, joint_var),
            *(0.9, 1e-3),
        ),
        "follow_classes": (*bank, classes, moves.expand(sizes.layers, -1), joint_mean, 0.7),
    }
    assert arguments.keys() == schema.SCHEMAS.keys()
    return arguments
