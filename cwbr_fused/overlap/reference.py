"""The published form in pure PyTorch, with the signatures of `cwbr_fused.functional`.

`backend` and `group` are accepted so that calls can be swapped; they change nothing. Every function
is differentiable by ordinary autograd, also twice. Arguments are not checked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cwbr_fused.inputs.targets import read_targets
from cwbr_fused.operations.autograd import PLAIN
from cwbr_fused.operations.backends import Backend
from cwbr_fused.operations.reference import confusion_weights, groups_of_inverse
from cwbr_fused.overlap import steps
from cwbr_fused.overlap.adjustments import Noise, shrink_variance
from cwbr_fused.overlap.loss import common_vectors, scale_match
from cwbr_fused.overlap.options import Objective, OverlapOptions, Temperature

__all__ = [
    "bhat_confusion_loss",
    "bhattacharyya_diag",
    "class_stats_diag",
    "confusion_alpha",
    "loss",
    "scale_match",
    "shrink_variance",
]


def class_stats_diag(
    z: Tensor, y: Tensor, eps: float = 1e-6, *, min_count: int = 2, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `cwbr_fused.functional.class_stats_diag`."""
    return steps.class_statistics(z, y, eps, min_count, PLAIN)


def confusion_alpha(
    logits: Tensor, y: Tensor, classes: Tensor, inv: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """See `cwbr_fused.functional.confusion_alpha`."""
    order, offsets = groups_of_inverse(inv, classes.shape[0])
    return confusion_weights(logits.detach(), order, offsets, classes)


def bhattacharyya_diag(
    mu: Tensor,
    var: Tensor,
    eps: float = 1e-6,
    *,
    backend: Backend = "auto",
    temperature: Temperature = None,
    noise_floor: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """See `cwbr_fused.functional.bhattacharyya_diag`."""
    return steps.distance_matrix(steps.Layer(mu, var, noise_floor), eps, temperature, PLAIN)


def bhat_confusion_loss(
    mu: Tensor,
    var: Tensor,
    alpha: Tensor,
    top_m: int | None = 64,
    eps: float = 1e-6,
    *,
    objective: Objective = "overlap",
    backend: Backend = "auto",
    temperature: Temperature = None,
    noise_floor: Noise | None = None,
) -> Tensor:
    """See `cwbr_fused.functional.bhat_confusion_loss`."""
    options = OverlapOptions(top_m, eps=eps, objective=objective, temperature=temperature)
    return steps.overlap(alpha.detach(), [steps.Layer(mu, var, noise_floor)], options, PLAIN)


def loss(
    features: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    **options: Any,
) -> Tensor:
    """See `cwbr_fused.loss`, whose keywords it takes."""
    given = read_targets(logits, targets)
    vectors = common_vectors(features, logits)
    return steps.regularizer(vectors, logits, given, OverlapOptions(**options), PLAIN)
