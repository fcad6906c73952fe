"""What one step needs for all its layers, in four launches."""

from __future__ import annotations

from torch import Tensor

from .confusion_weights import launch_mean_probs
from .group_by_class import launch_group_by_class
from .top_pairs import launch_top_pairs, require_few_groups


def plan(
    logits: Tensor, targets: Tensor, top_m: int, min_count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Order, offsets, classes, pairs and weights; alpha itself is never written."""
    require_few_groups("targets", targets.shape[0] // min_count)
    order, offsets, classes = launch_group_by_class(targets, min_count, logits.shape[1])
    mean_probs = launch_mean_probs(logits, order, offsets, classes)
    pairs, weights = launch_top_pairs(mean_probs, classes, top_m)
    return order, offsets, classes, pairs, weights
