"""The operations of the class bank in plain PyTorch: what every backend must compute.

A bank holds a mean for each of all C classes, and variances that they share. For a sample z of
class y the squared Mahalanobis distance to class c is 8 times the Bhattacharyya distance of
N(z, var) and N(mean_c, var). `CWBR` pulls z to its own class and pushes it from those that the
model confuses with it, by the probabilities p that the model itself gives them:

    E(z) = |z - mean_y|^2 / (2 var) - sum_j p_j |z - mean_j|^2 / (2 var)

`top_confusions` names the classes j and their probabilities, `class_attraction` is E, for any
coefficients, and its gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cwbr_fused.reference import accumulation_dtype


def top_confusions(
    logits: Tensor, targets: Tensor, seen: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """For each sample the seen classes, other than its own, of largest probability.

    Args:
        logits: (B, C).
        targets: (B,) classes.
        seen: (C,) bool; only these classes are candidates.
        top: how many classes at most.

    Returns:
        index: (B, J) int64 with J = min(top, C - 1), by falling logit, ties to the smaller class;
            -1 where there is no candidate left, and in rows that hold a NaN or an infinity
            other than -inf.
        weight: (B, J), their probabilities, of the softmax over all C; 0 where index is -1.
        own: (B,), the probability of the sample's own class among all C.
    """
    dtype = accumulation_dtype(logits.dtype)
    classes = logits.shape[1]
    scores = logits.to(dtype)
    # Beside large logits a logarithm rounds away: the sum is taken beside their largest.
    level = scores.logsumexp(1, keepdim=True)
    level = torch.where(level.isfinite(), level, 0)
    log_mass = (scores - level).logsumexp(1, keepdim=True)
    own = (scores.gather(1, targets[:, None].long()) - level - log_mass).exp()[:, 0]
    finite = (scores < torch.inf).all(1)[:, None]
    candidate = seen & (torch.arange(classes, device=logits.device) != targets[:, None])
    scores = torch.where(candidate & finite, scores, -torch.inf)
    value, index = scores.sort(dim=1, descending=True, stable=True)
    width = max(0, min(top, classes - 1))
    value, index = value[:, :width], index[:, :width]
    usable = value > -torch.inf
    weight = torch.where(usable, (value - level - log_mass).exp(), 0)
    return torch.where(usable, index, -1), weight, own


def class_attraction(
    z: Tensor, mean: Tensor, var: Tensor, index: Tensor, coefficient: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted squared Mahalanobis distances of each sample to some classes, and their gradient.

    Differences are taken before they are weighted: means may be large beside the spread.

    Args:
        z: (B, D) features, any floating dtype.
        mean: (C, D) class means, in the accumulation dtype.
        var: (D,) variances > 0.
        index: (B, J) int64 classes; -1 for none.
        coefficient: (B, J), positive to attract, negative to repel; not read where index is -1.

    Returns:
        energy: (B,), `sum_j c_j |z - mean_j|^2 / (2 var)`, in the accumulation dtype.
        gradient: (B, D) of the energy's sum, `sum_j c_j (z - mean_j) / var`.
    """
    used = (index >= 0)[:, :, None]
    c = torch.where(used, coefficient[:, :, None], 0)
    difference = z.to(mean.dtype)[:, None] - mean[index.clamp(min=0)]
    difference = torch.where(used, difference, 0)
    energy = (c * difference.square() / (2 * var)).sum((1, 2))
    return energy, (c * difference).sum(1) / var
