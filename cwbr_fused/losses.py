"""The regularizer on the outputs of a network's layers, and its weight against cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from cwbr_fused import backends, validation
from cwbr_fused.ops import OPERATIONS, ClassMoments, Regularizer, WeightedOverlap
from cwbr_fused.reference import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def loss(
    features: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    *,
    top_m: int | None = 64,
    min_count: int = 2,
    eps: float = 1e-6,
    objective: str = "overlap",
    backend: str = "auto",
    group: ProcessGroup | Literal["world"] | None = None,
) -> Tensor:
    """Confusion-weighted Bhattacharyya regularizer of a batch: the mean over the given layers.

    Per layer: diagonal Gaussians of the classes with at least `min_count` samples; for the `top_m`
    pairs of them that the softmax confuses most, `sum(alpha rho) / max(sum(alpha), eps)`, with the
    overlap `rho = exp(-D)` of the pair and its confusion `alpha`, which carries no gradient.
    Equivalent to `cwbr_fused.reference.loss`, in a few kernels.

    Args:
        features: raw layer outputs: a tensor, a sequence or a mapping of tensors. (B, D) is used
            as it is, (B, C, H, W) is averaged over H and W, (B, N, D) gives its first token; call
            `to_vec` yourself for anything else. Gradients flow to these.
        logits: (B, C). No gradient.
        targets: (B,) integer classes in [0, C).
        top_m: how many pairs; None for all.
        min_count: classes with fewer samples in the batch are left out.
        eps: smallest variance, and what is added to it, in squared feature units.
        objective: "overlap", or "log_overlap" for its logarithm, `log(sum(alpha rho)/sum(alpha))`
            by log-sum-exp, which keeps its gradient where rho underflows.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `cwbr_fused.backends.explain`.
        group: None takes the statistics of this process's batch. A `torch.distributed.ProcessGroup`
            takes those of its processes' batches together, "world" of the default group's (looked
            up at each call, so it may be given before `init_process_group`). Every process of the
            group must then call `loss` and `backward`; see `cwbr_fused.distributed`.

    Returns:
        A scalar, float32 (float64 for float64 features). With fewer than two usable classes it is
        0 with zero gradients. A non-finite feature of a used class makes it, and the gradients,
        non-finite.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel starts. Out-of-range targets
            on a GPU are a device-side assertion instead.
    """
    validation.check_options(top_m, eps, objective, min_count)
    validation.check_group(group)
    validation.check_batch(logits, targets)
    vectors = validation.feature_vectors(features, logits)
    name = backends.resolve(backend, logits.device.type)
    dtype = _common_dtype(vectors)
    vectors = [v if accumulation_dtype(v.dtype) == dtype else v.to(dtype) for v in vectors]
    log, operations = objective == "log_overlap", OPERATIONS[name]

    value: Tensor
    if group is not None:
        # Not at the top: it loads torch._dynamo, a second that most programs need not wait.
        from cwbr_fused import distributed

        processes = distributed.process_group(group)
        if processes is not None:
            value = distributed.regularizer(
                vectors, logits, targets, top_m, min_count, eps, log, name, processes
            )
            return value

    if top_m is None:
        order, offsets, classes = operations.group_by_class(targets, min_count)
        alpha = operations.confusion_weights(logits.detach(), order, offsets, classes).to(dtype)
        values = []
        for z in vectors:
            mean, var = ClassMoments.apply(z, order, offsets, eps, name)
            values.append(WeightedOverlap.apply(mean, var, alpha, eps, log, name))
        return torch.stack(values).mean()

    order, offsets, _, pairs, weights = operations.plan(logits.detach(), targets, top_m, min_count)
    value = Regularizer.apply(order, offsets, pairs, weights.to(dtype), eps, log, name, *vectors)
    return value


def _common_dtype(vectors: Sequence[Tensor]) -> torch.dtype:
    """float64 if any layer is, else float32: one accumulation dtype for all layers."""
    double = any(v.dtype == torch.float64 for v in vectors)
    return torch.float64 if double else torch.float32


def scale_match(
    ce: Tensor, reg: Tensor, eps: float = 1e-6, *, objective: str = "overlap"
) -> Tensor:
    """The total loss `ce + stopgrad(ce / (reg + eps)) * reg`: both terms of equal value.

    For `objective="log_overlap"`, where `reg` is a logarithm, the same weighting in its limit:
    the gradient is `grad ce + ce grad reg`, and the value is `ce`.

    Args:
        ce: scalar cross-entropy.
        reg: scalar regularizer, from `loss`.
        eps: keeps the scale finite where the regularizer is 0.
        objective: the one `reg` was computed with.

    Returns:
        A scalar in the accumulation dtype: half-precision terms are weighted in float32, where
        neither `eps` nor the scale leaves the range.
    """
    validation.check_float_tensor("ce", ce, "()")
    validation.check_float_tensor("reg", reg, "()")
    validation.check_same_device("reg", reg, "ce", ce)
    validation.check_options(None, eps, objective)
    ce, reg = ce.to(accumulation_dtype(ce.dtype)), reg.to(accumulation_dtype(reg.dtype))
    if objective == "log_overlap":
        return ce + ce.detach() * (reg - reg.detach())
    return ce + (ce / (reg + eps)).detach() * reg
