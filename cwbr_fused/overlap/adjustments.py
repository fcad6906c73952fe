"""Class statistics that few samples can bear: shrunk variances, distances without their noise.

A class of n samples in D dimensions gives D variances from n - 1 degrees of freedom each, and two
means that are off by `v/n`: with n = 4 two *identical* classes already read a distance of 0.22 per
dimension. Two remedies, elementwise on (K, D) or smaller, so the same on every backend:

`shrink_variance` moves the unbiased variance `s2_k` of class k, of `f_k = n_k - 1` degrees of
freedom, towards the pooled within-class variance `p = sum_k f_k s2_k / F`, `F = sum_k f_k`:

    v_k = (1 - l_k) s2_k + l_k p,    clamped to at least eps

with the intensity `l_k = q/(f_k + q)` for a number q of pseudo-counts, 1 for "pooled", or
estimated ("analytic", see `analytic_intensity`). A class of one sample has l = 1. A biased variance
at the clamp counts as 0.

`noise_floor` gives what sampling alone adds to the two terms of the distance, for Gaussian samples
of classes that share their variance v. Mean and variance of a sample are independent; with
`a_k = 1 - l_k`, the variances of a pair and their average are weighted sums of independent
chi-squares, here in units of v:

    v_k = (a_k/f_k + r) chi2(f_k) + r chi2(F - f_k),    r = (1 - a_k)/F
    s = (v_i + v_j)/2 = (a_i/(2 f_i) + q) chi2(f_i) + (a_j/(2 f_j) + q) chi2(f_j)
                        + q chi2(F - f_i - f_j),        q = (1 - (a_i + a_j)/2)/F

`E[1/s]` and `E[log s]` follow from their Laplace transforms (see `log_and_inverse_mean`), and

    E[mean term] = E[1/s] (true mean term + (1/n_i + 1/n_j)/8)
    E[log term] = E[log s]/2 - (E[log v_i] + E[log v_j])/4

per dimension. So the corrected distance, whose mean is that of the true Gaussians, is the mean term
over `E[1/s]`, less `(1/n_i + 1/n_j)/8` per dimension, plus the log term less its expectation. This
is exact for given intensities and an approximation for the "analytic" ones, which depend on the
sample. Where `E[1/s]` is infinite there is nothing to correct with, and the mean term is left out:
two classes of two samples without shrinkage, or at most two degrees of freedom in all. Dimensions
whose variance sits at the clamp add no noise and are not counted.

The noise depends on counts and intensities alone, neither of which carries gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from cwbr_fused.overlap.options import Shrinkage, Temperature

# The samples of each class and the intensity with which its variance was shrunk, (K,) each.
Noise: TypeAlias = tuple[Tensor, Tensor]

EULER = 0.5772156649015329
LOG_STEP = 0.6
PAIR_BLOCK = 2**13  # Pairs integrated at a time: 95 nodes of each are 3 MB in float32.


class Pairs(NamedTuple):
    """M pairs of classes: rows i and j, and `distance(mean, var)`, their D (M,)."""

    i: Tensor
    j: Tensor
    distance: Callable[[Tensor, Tensor], Tensor]


def analytic_intensity(var: Tensor, pooled: Tensor, dof: Tensor) -> Tensor:
    """The intensity of least expected squared error, estimated for each class, (K,).

    For an unbiased `s2` shrunk to a target p, Ledoit and Wolf's optimum is
    `l = sum_d (Var(s2_d) - Cov(s2_d, p_d)) / sum_d E[(s2_d - p_d)^2]` (Schaefer and Strimmer 2005;
    Opgen-Rhein and Strimmer 2007 for variances). Here, with r = s2/p, so that like D it does not
    depend on the scale of single dimensions,

        l_k = min(1, (1 - f_k/F) sum_d 2 r_kd^2/(f_k + 2) / sum_d (r_kd - 1)^2)

    `2 s2^2/(f + 2)` is the unbiased estimate of `Var(s2) = 2 v^2/f` for Gaussian samples. (The
    distribution-free one of that paper needs fourth moments, and is always 0 for two samples.)
    `Cov(s2_k, p) = Var(s2_k) f_k/F`, since p holds s2_k in that proportion. 1 where f = 0.

    Args:
        var: (K, D) unbiased variances.
        pooled: (D,).
        dof: (K,) degrees of freedom f.
    """
    varies = pooled > 0
    ratio = torch.where(varies, var / torch.where(varies, pooled, 1), 0)
    share = dof / dof.sum().clamp(min=1)
    noise = (1 - share) * 2 / (dof + 2) * ratio.square().sum(1)
    spread = torch.where(varies, ratio - 1, 0).square().sum(1)
    return torch.where((dof > 0) & (spread > noise), noise / spread, 1)


def shrink_variance(
    var: Tensor, counts: Tensor, shrinkage: Shrinkage = None, eps: float = 1e-6
) -> Noise:
    """See `cwbr_fused.functional.shrink_variance`."""
    counts = counts.to(var.dtype)
    dof = (counts - 1).clamp(min=0)
    several = dof > 0
    squares = torch.where(several[:, None] & (var > eps), var * counts[:, None], 0)
    total = dof.sum()
    pooled = squares.sum(0) / torch.where(total > 0, total, 1)
    unbiased = squares / torch.where(several, dof, 1)[:, None]
    if shrinkage is None:
        intensity = torch.zeros_like(dof)
    elif shrinkage == "pooled":
        intensity = torch.ones_like(dof)
    elif shrinkage == "analytic":
        intensity = analytic_intensity(unbiased.detach(), pooled.detach(), dof)
    else:
        intensity = shrinkage / (dof + shrinkage)
    mix = intensity[:, None]
    return ((1 - mix) * unbiased + mix * pooled).clamp(min=eps), intensity


def log_and_inverse_mean(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`E[log s]` and `E[1/s]` of `s = sum_m w_m chi2(f_m)`, a sum of independent chi-squares.

    With the Laplace transform `L(t) = E[exp(-t s)] = prod_m (1 + 2 w_m t)^(-f_m/2)`

        E[1/s] = int_0^inf L(t) dt
        E[log s] = -gamma + int_0^inf (1/(1 + t) - L(t)) dt/t

    (the second against an exponential variable, whose mean logarithm is minus Euler's constant).
    With t = exp(x) both integrands are smooth and vanish at both ends, so that the trapezoidal rule
    converges exponentially: at this step both are right to 2e-6, with 1 to 1e6 degrees of freedom
    and in float32 as well.

    Args:
        parts: weights w_m and degrees of freedom f_m, of one shape and dtype. Where the degrees of
            freedom with a weight sum to 2 or less, E[1/s] is infinite, and what is returned is not.
    """
    like = parts[0][0]
    t = torch.arange(-16.0, 40.5, LOG_STEP, dtype=like.dtype, device=like.device).exp()
    logs = torch.stack([dof[..., None] * torch.log1p(2 * w[..., None] * t) for w, dof in parts])
    laplace = torch.exp(-logs.sum(0) / 2)
    log = (1 / (1 + t) - laplace).sum(-1) * LOG_STEP - EULER
    return log, (laplace * t).sum(-1) * LOG_STEP


def noise_floor(noise: Noise, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
    """What corrects the distance of the pairs (i, j): see the equations above.

    Args:
        noise: counts and intensity, (K,) each.
        i, j: (M,) rows.

    Returns:
        scale: (M,) factor `1/E[1/s]` of the mean term, 0 where that is left out.
        floor: (M,) noise of one dimension; 0 for a class and itself.
    """
    counts, keep = noise[0].to(noise[1].dtype), 1 - noise[1]
    dof = (counts - 1).clamp(min=0)
    total = dof.sum()
    share = 1 / torch.where(total > 0, total, 1)
    own = torch.where(dof > 0, keep / dof, 0)
    inverse = torch.where(counts > 0, 1 / counts, 0)
    rest = (1 - keep) * share
    of_class, _ = log_and_inverse_mean((own + rest, dof), (rest, total - dof))

    def of_pairs(i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        rest = (1 - (keep[i] + keep[j]) / 2) * share
        others = (total - dof[i] - dof[j]).clamp(min=0)
        log, inverse_mean = log_and_inverse_mean(
            (own[i] / 2 + rest, dof[i]), (own[j] / 2 + rest, dof[j]), (rest, others)
        )
        finite = dof[i] + dof[j] + torch.where(rest > 0, others, 0) > 2
        scale = torch.where(finite, 1 / inverse_mean, 0)
        of_mean = torch.where(finite, (inverse[i] + inverse[j]) / 8, 0)
        of_log = log / 2 - (of_class[i] + of_class[j]) / 4
        return scale, torch.where(i == j, 0, of_mean + of_log)

    blocks = zip(i.split(PAIR_BLOCK), j.split(PAIR_BLOCK), strict=True)
    scale, floor = zip(*(of_pairs(*block) for block in blocks), strict=True)
    return torch.cat(scale), torch.cat(floor)


def adjusted_distance(
    pairs: Pairs,
    mean: Tensor,
    var: Tensor,
    noise: Noise | None,
    eps: float,
    temperature: Temperature,
) -> Tensor:
    """The distance of the pairs, less its noise floor, over the temperature.

    The log term alone is the distance of Gaussians with equal means; so the mean term scaled by c
    is `c D + (1 - c) D(0, var)`.

    Args:
        mean, var: (K, D).
        noise: counts and intensity of the classes; None to leave the noise in.
        eps: the clamp of the variances.
    """
    distance = pairs.distance(mean, var)
    if noise is not None:
        scale, floor = noise_floor(noise, pairs.i, pairs.j)
        dims = (var > eps).sum(1)
        floor = (floor * (dims[pairs.i] + dims[pairs.j]) / 2).to(mean.dtype)
        scale = scale.to(mean.dtype)
        log_term = pairs.distance(torch.zeros_like(mean), var)
        distance = scale * distance + (1 - scale) * log_term - floor
    if temperature is None:
        return distance
    return distance / (mean.shape[1] if temperature == "dims" else temperature)


def overlap_distance(distance: Tensor) -> Tensor:
    """The distance whose `exp(-D)` is the overlap: itself, or `-log(1 - D)` where D < 0.

    A corrected distance may fall below 0, by its own spread, or far where features are copies of
    each other; exp(-D) would overflow there. The overlap goes on as the straight line 1 - D, of the
    same value and slope at 0: no gradient is lost, none explodes.
    """
    return torch.where(distance < 0, -torch.log1p(-distance.clamp(max=0)), distance)
