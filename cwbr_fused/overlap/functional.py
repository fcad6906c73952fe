"""The steps of the published regularizer one by one, on any backend, to build others from.

    classes, mu, var, counts, inv = class_stats_diag(z, y)
    alpha = confusion_alpha(logits, y, classes, inv)
    loss = bhat_confusion_loss(mu, var, alpha, top_m=64)

computes what `cwbr_fused.loss(z, logits, y)` computes in fewer kernels, and

    classes, mu, var, counts, inv = class_stats_diag(z, y, min_count=1)
    var, intensity = shrink_variance(var, counts, "analytic")
    alpha = confusion_alpha(logits, y, classes, inv)
    loss = bhat_confusion_loss(mu, var, alpha, temperature="dims", noise_floor=(counts, intensity))

computes it with `min_count=1, shrinkage="analytic", temperature="dims", noise_floor=True`. The
number of classes in the batch is a shape here, so on a GPU `class_stats_diag` waits for the device,
as `cwbr_fused.loss` does not.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from cwbr_fused.inputs import validation
from cwbr_fused.operations import backends, reference
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.operations.backends import Backend
from cwbr_fused.overlap import adjustments, steps
from cwbr_fused.overlap.adjustments import Noise
from cwbr_fused.overlap.options import Objective, OverlapOptions, Shrinkage, Temperature

__all__ = [
    "bhat_confusion_loss",
    "bhattacharyya_diag",
    "class_stats_diag",
    "confusion_alpha",
    "shrink_variance",
]


def class_stats_diag(
    z: Tensor, y: Tensor, eps: float = 1e-6, *, min_count: int = 2, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Mean and biased diagonal variance of each class of a batch.

    Args:
        z: (B, D) features; gradients of mu and var flow to it.
        y: (B,) integer classes.
        eps: variances are at least this.
        min_count: classes with fewer samples are left out.
        backend: see `cwbr_fused.loss`.

    Returns:
        classes: (K,) int64, ascending.
        mu, var: (K, D) each, float32 (float64 for float64 features).
        counts: (K,) int64 samples of each class.
        inv: (B,) int64 with `classes[inv] == y`; -1 for samples of classes left out.
    """
    validation.check_float_tensor("z", z, "(B, D)")
    validation.check_index_tensor("y", y, z.shape[0], "(B,) = ({n},), as z has B = {n}")
    validation.check_same_device("y", y, "z", z)
    OverlapOptions(min_count=min_count, eps=eps).check()
    name = backends.resolve(backend, z.device.type)
    return steps.class_statistics(z, y, eps, min_count, name)


def confusion_alpha(
    logits: Tensor, y: Tensor, classes: Tensor, inv: Tensor, *, backend: Backend = "auto"
) -> Tensor:
    """How much softmax mass the classes of a batch lend each other; no gradient.

    `alpha = (P + P^T)/2` with a zero diagonal, for the classes of the batch. `P[k, j]` is the mean
    of `softmax(logits)[:, j]` over the samples of class k.

    Args:
        logits: (B, C).
        y: (B,) integer classes.
        classes, inv: (K,) and (B,), from `class_stats_diag`.
        backend: see `cwbr_fused.loss`.

    Returns:
        alpha: (K, K), float32 (float64 for float64 logits).
    """
    validation.check_batch(logits, y)
    validation.check_index_tensor("classes", classes, None, "(K,)")
    validation.check_index_tensor("inv", inv, logits.shape[0], "(B,) = ({n},), as logits has")
    for label, value in (("classes", classes), ("inv", inv)):
        validation.check_same_device(label, value, "logits", logits)
    columns, groups = logits.shape[1], classes.shape[0]
    validation.check_range("classes", classes, 0, columns, "as logits has C = {high} columns")
    validation.check_range("inv", inv, -1, groups, "as classes has K = {high}")
    name = backends.resolve(backend, logits.device.type)
    order, offsets = reference.groups_of_inverse(inv, groups)
    alpha: Tensor = OPERATIONS[name].confusion_weights(logits.detach(), order, offsets, classes)
    return alpha


def shrink_variance(
    var: Tensor, counts: Tensor, shrinkage: Shrinkage = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Unbiased class variances, shrunk to the pooled within-class variance.

    With `f_k = n_k - 1`, `s2_k = n_k var_k / f_k`, and `p = sum_k f_k s2_k / sum_k f_k`

        v_k = (1 - l_k) s2_k + l_k p,    clamped to at least eps

    `cwbr_fused.overlap.adjustments` has the intensity l, and its sources.

    Args:
        var: (K, D) biased variances, from `class_stats_diag`; gradients flow to it.
        counts: (K,) samples of each class.
        shrinkage: None for l = 0, a number q > 0 of pseudo-counts for `l_k = q/(f_k + q)`,
            "analytic" for the intensity of least estimated squared error, "pooled" for l = 1. A
            class of one sample takes the pooled variance, or eps if shrinkage is None.
        eps: the smallest variance, that of `class_stats_diag`. A var that is not above it counts as
            0. No gradient passes where the clamp is active.

    Returns:
        var: (K, D).
        intensity: (K,), no gradient.
    """
    validation.check_float_tensor("var", var, "(K, D)")
    _check_of_classes("counts", counts, var)
    OverlapOptions(shrinkage=shrinkage, eps=eps).check()
    return adjustments.shrink_variance(var, counts, shrinkage, eps)


def _check_of_classes(name: str, value: object, moments: Tensor) -> None:
    """One number for each of the K classes that `moments` (K, D) has."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor (K,), got {validation.describe(value)}")
    if value.shape != moments.shape[:1]:
        raise ValueError(
            f"{name}: expected shape (K,) = ({moments.shape[0]},), as var has, "
            f"got {validation.describe(value)}"
        )
    validation.check_same_device(name, value, "var", moments)


def _layer(mu: Tensor, var: Tensor, noise_floor: Noise | None) -> steps.Layer:
    """The arguments, checked and in the accumulation dtype, which the pair kernels take."""
    validation.check_float_tensor("mu", mu, "(K, D)")
    validation.check_float_tensor("var", var, "(K, D)")
    if mu.shape != var.shape or mu.dtype != var.dtype:
        raise ValueError(
            "var: expected the shape and dtype of mu, a "
            f"{validation.describe(mu)}, got {validation.describe(var)}"
        )
    validation.check_same_device("var", var, "mu", mu)
    dtype = reference.accumulation_dtype(mu.dtype)
    if noise_floor is not None:
        if not isinstance(noise_floor, tuple) or len(noise_floor) != 2:
            raise TypeError(
                "noise_floor: expected None or a pair (counts, intensity), "
                f"got {validation.describe(noise_floor)}"
            )
        for name, value in zip(("counts", "intensity"), noise_floor, strict=True):
            _check_of_classes(f"noise_floor: {name}", value, var)
        noise_floor = (noise_floor[0], noise_floor[1].to(dtype))
    return steps.Layer(mu.to(dtype), var.to(dtype), noise_floor)


def bhattacharyya_diag(
    mu: Tensor,
    var: Tensor,
    eps: float = 1e-6,
    *,
    backend: Backend = "auto",
    temperature: Temperature = None,
    noise_floor: Noise | None = None,
) -> tuple[Tensor, Tensor]:
    """Bhattacharyya distance and overlap of all pairs of diagonal Gaussians.

    `D_ij = sum_d (mu_i - mu_j)^2/(8 s) + log(s)/2 - log(u_i)/4 - log(u_j)/4` with `u = var + eps`
    and `s = (u_i + u_j)/2`; `rho = exp(-D)`. The K x K x D tensor is never made.

    Args:
        mu, var: (K, D) each; gradients flow to both.
        eps: added to the variances.
        backend, temperature: see `cwbr_fused.loss`.
        noise_floor: the `counts` of `class_stats_diag` and the `intensity` of `shrink_variance`,
            from which var must then come. D is corrected by what so few samples add to it. Where
            a corrected D is negative, `rho = 1 - D`.

    Returns:
        D, rho: (K, K) each, symmetric, with diagonals 0 and 1.
    """
    layer = _layer(mu, var, noise_floor)
    OverlapOptions(eps=eps, temperature=temperature).check()
    name = backends.resolve(backend, mu.device.type)
    return steps.distance_matrix(layer, eps, temperature, name)


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
    """Confusion-weighted overlap of one layer: `sum(alpha rho) / max(sum(alpha), eps)`.

    The sums are over the `top_m` pairs i < j of largest alpha, ties to the smaller (i, j). If
    `top_m` is None, or there are no more pairs, they are over all pairs, which are never stored.
    There is no gradient to alpha.

    Args:
        mu, var: (K, D) each; gradients flow to both.
        alpha: (K, K) symmetric; its upper triangle is read.
        top_m: how many pairs; None for all.
        eps: added to the variances, and the smallest normaliser.
        objective, backend, temperature: see `cwbr_fused.loss`. A temperature or a noise floor over
            all pairs stores them.
        noise_floor: see `bhattacharyya_diag`.

    Returns:
        A scalar.
    """
    options = OverlapOptions(top_m, eps=eps, objective=objective, temperature=temperature).check()
    layer = _layer(mu, var, noise_floor)
    groups = mu.shape[0]
    validation.check_float_tensor("alpha", alpha, "(K, K)")
    if alpha.shape != (groups, groups):
        raise ValueError(
            f"alpha: expected shape (K, K) = ({groups}, {groups}), as mu has K = {groups}, "
            f"got {validation.describe(alpha)}"
        )
    validation.check_same_device("alpha", alpha, "mu", mu)
    name = backends.resolve(backend, mu.device.type)
    if top_m is not None and top_m >= groups * (groups - 1) // 2:
        options = replace(options, top_m=None)
    return steps.overlap(alpha.detach().to(layer.mean.dtype), [layer], options, name)
