"""The gradients of `reference.py` in closed form: what every backward kernel must compute.

Each `<name>_backward` is the vector-Jacobian product of `reference.<name>`. It recomputes what it
needs and stores nothing of size K x K x D.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cwbr_fused.operations.reference import (
    all_pair_distance,
    class_moments,
    row_blocks,
    sample_groups,
    upper_pairs,
    weighted_overlap,
)


def class_moments_backward(
    grad_mean: Tensor,
    grad_var: Tensor,
    z: Tensor,
    mean: Tensor,
    var: Tensor,
    order: Tensor,
    offsets: Tensor,
    eps: float,
) -> Tensor:
    """`dL/dz_b = (g_mean + 2 g_var (z_b - mean)) / n` of the sample's group; 0 for no group.

    The clamp passes no gradient: where var == eps the variance term is dropped.
    Returns (B, D) in the dtype of z.
    """
    group = sample_groups(order, offsets)
    used = (group < mean.shape[0])[:, None]
    row = torch.where(used[:, 0], group, 0)
    if mean.shape[0] == 0:
        return torch.zeros_like(z)
    size = offsets.diff()[row].clamp(min=1)[:, None]
    through_var = torch.where(var > eps, 2 * grad_var, 0)
    grad = (grad_mean[row] + through_var[row] * (z.to(mean.dtype) - mean[row])) / size
    return torch.where(used, grad, 0).to(z.dtype)


def _distance_gradients(
    mean_i: Tensor, u_i: Tensor, mean_j: Tensor, u_j: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dD/dmean_i, dD/du_i and dD/du_j per dimension; dD/dmean_j is the negative of the first.

    With S = u_i + u_j and t = (mean_i - mean_j)/S: `t/2` and `((u_i - u_j)/(S u_i) - t^2)/4`.
    """
    s = u_i + u_j
    t = (mean_i - mean_j) / s
    excess = (u_i - u_j) / s
    return t / 2, (excess / u_i - t.square()) / 4, (-excess / u_j - t.square()) / 4


def pair_distance_backward(
    grad: Tensor, mean: Tensor, var: Tensor, pairs: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients (K, D) of `pair_distance` with respect to mean and var, for grad (M,)."""
    i, j = pairs.unbind(1)
    u = var + eps
    by_mean, by_u_i, by_u_j = _distance_gradients(mean[i], u[i], mean[j], u[j])
    g = grad[:, None]
    grad_mean = torch.zeros_like(mean).index_add(0, i, g * by_mean).index_add(0, j, -g * by_mean)
    grad_var = torch.zeros_like(var).index_add(0, i, g * by_u_i).index_add(0, j, g * by_u_j)
    return grad_mean, grad_var


def all_pair_distance_backward(
    grad: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients (K, D) of `all_pair_distance` for grad (K, K), which need not be symmetric."""
    u = var + eps
    sizes = row_blocks(mean)
    rows: list[tuple[Tensor, Tensor]] = []
    both = (grad + grad.T).fill_diagonal_(0)
    for g, mean_i, u_i in zip(both.split(sizes), mean.split(sizes), u.split(sizes), strict=True):
        by_mean, by_u, _ = _distance_gradients(mean_i[:, None], u_i[:, None], mean[None], u[None])
        rows.append(((g[:, :, None] * by_mean).sum(1), (g[:, :, None] * by_u).sum(1)))
    if not rows:
        return torch.zeros_like(mean), torch.zeros_like(var)
    return torch.cat([m for m, _ in rows]), torch.cat([v for _, v in rows])


def overlap_backward(
    grad: Tensor, distance: Tensor, weights: Tensor, eps: float, log: bool
) -> Tensor:
    """Gradient of `overlap` with respect to distance (..., M), for grad (...)."""
    total = weights.sum()
    if not log:
        return -grad[..., None] * weights * torch.exp(-distance) / total.clamp(min=eps)
    nothing = total == 0
    log_weights = torch.where(nothing, 1.0, weights).log()
    share = torch.softmax(log_weights - distance, dim=-1)
    return torch.where(nothing, 0.0, -grad[..., None] * share)


def weighted_overlap_backward(
    grad: Tensor, value: Tensor, mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool
) -> tuple[Tensor, Tensor]:
    """Gradients (K, D) of `weighted_overlap` for a scalar grad; `value` is its forward result.

    A streaming kernel needs `value`: with `log` a pair's share is `w exp(-D - value) / sum(w)`.
    """
    i, j = upper_pairs(alpha)
    distance = all_pair_distance(mean, var, eps)
    grad_distance = torch.zeros_like(distance)
    grad_distance[i, j] = overlap_backward(grad, distance[i, j], alpha[i, j], eps, log)
    return all_pair_distance_backward(grad_distance, mean, var, eps)


def weighted_overlap_with_gradient(
    grad: Tensor, mean: Tensor, var: Tensor, alpha: Tensor, eps: float, log: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`weighted_overlap` and its gradients for a scalar grad: a kernel measures distances once."""
    value = weighted_overlap(mean, var, alpha, eps, log)
    return value, *weighted_overlap_backward(grad, value, mean, var, alpha, eps, log)


def regularizer_backward(
    grad: Tensor,
    features: Sequence[Tensor],
    mean: Sequence[Tensor],
    var: Sequence[Tensor],
    distance: Tensor,
    order: Tensor,
    offsets: Tensor,
    pairs: Tensor,
    weights: Tensor,
    eps: float,
    log: bool,
) -> list[Tensor]:
    """Gradients of `regularizer` with respect to each layer's features, for a scalar grad.

    `mean` and `var` are what `regularizer` returned: of every layer, or none.
    """
    if not mean:
        moments = [class_moments(z, order, offsets, eps) for z in features]
        mean, var = [m for m, _ in moments], [v for _, v in moments]
    per_layer = (grad / len(features)).expand(len(features))
    grad_distance = overlap_backward(per_layer, distance, weights, eps, log)
    gradients = []
    for z, mean_l, var_l, grad_l in zip(features, mean, var, grad_distance, strict=True):
        grad_mean, grad_var = pair_distance_backward(grad_l, mean_l, var_l, pairs, eps)
        gradients.append(
            class_moments_backward(grad_mean, grad_var, z, mean_l, var_l, order, offsets, eps)
        )
    return gradients
