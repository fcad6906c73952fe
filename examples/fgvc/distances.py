"""How far apart a layer holds the classes that the model confuses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cwbr_fused.diagnostics import top_confusing_pairs

VARIANCE_FLOOR = 1e-3  # of the layer's mean variance: what `CWBR` takes, too


@torch.no_grad()
def confused_distances(
    features: Mapping[str, Tensor], logits: Tensor, targets: Tensor, top_m: int
) -> dict[str, float]:
    """Per layer the Bhattacharyya distance of the most confused pairs of classes, per dimension.

    For a pair (i, j) it is that of two Gaussians at the class means with the shared within-class
    variance V, `sum_d (m_i - m_j)_d^2 / (8 V_d)`, over D, so that layers of every width compare. It
    is corrected for the finite samples: of Gaussian classes with equal means it is 0 on average,
    however few samples there are, and then negative half of the time.

    Args:
        features: (N, D) by layer.
        logits: (N, C).
        targets: (N,).
        top_m: how many pairs; their mean counts.

    Returns:
        NaN with fewer than two classes, or with less than three samples more than classes.
    """
    classes, own, counts = targets.unique(return_inverse=True, return_counts=True)
    freedom = len(targets) - len(classes)
    if len(classes) < 2 or freedom < 3:
        return dict.fromkeys(features, float("nan"))
    pairs, _ = top_confusing_pairs(logits, targets, top_m)
    i, j = torch.searchsorted(classes, pairs).unbind(1)
    noise = (1 / counts[i] + 1 / counts[j]) / 8
    distances = {}
    for name, z in features.items():
        z = z.float()
        mean = z.new_zeros(len(classes), z.shape[1]).index_add(0, own, z) / counts[:, None]
        var = (z - mean[own]).square().sum(0) / freedom
        var = var.clamp(min=VARIANCE_FLOOR * float(var.mean()) + torch.finfo(var.dtype).tiny)
        # The mean of 1 / V over samples is freedom / (freedom - 2) times that of the population.
        raw = ((mean[i] - mean[j]).square() / var).mean(1) / 8 * (freedom - 2) / freedom
        distances[name] = float((raw - noise).mean())
    return distances
