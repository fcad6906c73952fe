"""The regularizer on the outputs of a network's layers, and its weight against cross-entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from cwbr_fused.inputs import soft_targets, validation
from cwbr_fused.operations import backends
from cwbr_fused.operations.autograd import OPERATIONS, ClassMoments, Regularizer, weighted_overlap
from cwbr_fused.operations.distributed import process_group
from cwbr_fused.operations.reference import accumulation_dtype, overlap
from cwbr_fused.overlap import distributed
from cwbr_fused.overlap.adjustments import Adjustment, Shrinkage, Temperature, layer_distances
from cwbr_fused.overlap.functional import select_pairs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Steps(NamedTuple):
    """What the loss of a batch is made of.

    counts: (K,) samples of each class; 0 for the unused.
    var: L tensors (K, D_l), the biased variances.
    distance: (L, M), as adjusted.
    weights: (M,), 0 for pairs of unused classes.
    """

    counts: Tensor
    var: list[Tensor]
    distance: Tensor
    weights: Tensor


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
    temperature: Temperature = None,
    shrinkage: Shrinkage = None,
    noise_floor: bool = False,
) -> Tensor:
    """Confusion-weighted Bhattacharyya regularizer of a batch: the mean over the given layers.

    Per layer: diagonal Gaussians of the classes with at least `min_count` samples; for the `top_m`
    pairs of them that the softmax confuses most, `sum(alpha rho) / max(sum(alpha), eps)`, with the
    overlap `rho = exp(-D)` of the pair and its confusion `alpha`, which carries no gradient.
    Equivalent to `cwbr_fused.reference.loss`, in a few kernels; in some more with soft targets or
    one of the last three keywords, which change nothing unless given.

    Args:
        features: raw layer outputs: a tensor, a sequence or a mapping of tensors. (B, D) is used
            as it is, (B, C, H, W) is averaged over H and W, (B, N, D) gives its first token; call
            `to_vec` yourself for anything else. Gradients flow to these.
        logits: (B, C). No gradient.
        targets: (B,) integer classes in [0, C); or soft targets (B, C) of any floating dtype,
            finite and >= 0, as from label smoothing, mixup or CutMix: moments and mean softmax rows
            are then weighted by class membership, and a class counts as many samples as its weights
            sum to. Rows need not sum to 1. No gradient. See `cwbr_fused.inputs.soft_targets`.
        top_m: how many pairs; None for all.
        min_count: classes with fewer samples in the batch are left out. 1 is of use with
            `shrinkage` only: a class of one sample then takes the pooled variance.
        eps: smallest variance, and what is added to it, in squared feature units.
        objective: "overlap", or "log_overlap" for its logarithm, `log(sum(alpha rho)/sum(alpha))`
            by log-sum-exp, which keeps its gradient where rho underflows.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `cwbr_fused.backends.explain`.
        group: None takes the statistics of this process's batch. A `torch.distributed.ProcessGroup`
            takes those of its processes' batches together, "world" of the default group's (looked
            up at each call, so it may be given before `init_process_group`). Every process of the
            group must then call `loss` and `backward`; see `cwbr_fused.overlap.distributed`.
        temperature: a number T > 0 puts D/T in the place of D; "dims" divides each layer's D by its
            number of dimensions, so that the overlap neither underflows in wide layers nor is left
            to the narrowest one.
        shrinkage: takes unbiased class variances, shrunk to the pooled within-class variance: by a
            number of pseudo-counts > 0, by the "analytic" intensity, which is estimated for each
            class and carries no gradient, or fully, "pooled". See `cwbr_fused.overlap.adjustments`.
        noise_floor: takes unbiased variances and corrects D by what the sampling of few samples
            adds to it: identical classes read 0 on average, and separated ones their true distance.
            A corrected D may be negative; the overlap is then `1 - D`, which goes on where exp(-D)
            left off with the same slope. Without shrinkage it wants classes of at least 3 samples:
            of the means of two classes of 2 it makes nothing. See `cwbr_fused.overlap.adjustments`.

    Returns:
        A scalar, float32 (float64 for float64 features). With fewer than two usable classes it is
        0 with zero gradients. A non-finite feature of a used class makes it, and the gradients,
        non-finite.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel starts. Out-of-range targets
            on a GPU are a device-side assertion instead.
    """
    validation.check_options(top_m, eps, objective, min_count)
    validation.check_adjustment(temperature, shrinkage, noise_floor, min_count)
    validation.check_group(group)
    soft = validation.check_any_targets(logits, targets)
    vectors = common_vectors(features, logits)
    dtype = accumulation_dtype(vectors[0].dtype)
    name = backends.resolve(backend, logits.device.type)
    log, operations = objective == "log_overlap", OPERATIONS[name]
    adjustment = Adjustment(temperature, shrinkage, noise_floor)

    value: Tensor
    if group is not None:
        if soft:
            raise ValueError(
                "targets: soft targets are not supported with group, got "
                f"{validation.describe(targets)}; pass class indices"
            )
        processes = process_group(group)
        if processes is not None:
            if torch.compiler.is_compiling():
                # A literal, which the error of fullgraph=True shows.
                torch._dynamo.graph_break("the number of usable classes is read on the host")
            # At the call, since it loads torch._dynamo, a second that most programs need not wait.
            regularizer = torch.compiler.disable(distributed.regularizer)
            value = regularizer(
                vectors, logits, targets, top_m, min_count, eps, log, name, processes, adjustment
            )
            return value

    if soft or adjustment != Adjustment():
        steps = single_steps(vectors, logits, targets, top_m, min_count, eps, name, adjustment)
        return overlap(steps.distance, steps.weights, eps, log).mean()

    if top_m is None:
        order, offsets, classes = operations.group_by_class(targets, min_count)
        alpha = operations.confusion_weights(logits.detach(), order, offsets, classes).to(dtype)
        values = []
        for z in vectors:
            mean, var = ClassMoments.apply(z, order, offsets, eps, name)
            values.append(weighted_overlap(mean, var, alpha, eps, log, name))
        return torch.stack(values).mean()

    order, offsets, _, pairs, weights = operations.plan(logits.detach(), targets, top_m, min_count)
    value = Regularizer.apply(order, offsets, pairs, weights.to(dtype), eps, log, name, *vectors)
    return value


def single_steps(
    vectors: Sequence[Tensor],
    logits: Tensor,
    targets: Tensor,
    top_m: int | None,
    min_count: int,
    eps: float,
    backend: str,
    adjustment: Adjustment,
) -> Steps:
    """What the loss is made of, one operation after the other.

    Args:
        vectors: L tensors (B, D_l) of one accumulation dtype.
        backend: the resolved name.
    """
    dtype = accumulation_dtype(vectors[0].dtype)
    if validation.is_soft(targets):
        members = soft_targets.membership(targets, min_count)
        counts = members.counts
        alpha = soft_targets.confusion_weights(logits, members, dtype)
        moments = [soft_targets.class_moments(z, members.shares, eps, dtype) for z in vectors]
    else:
        operations = OPERATIONS[backend]
        order, offsets, classes = operations.group_by_class(targets, min_count)
        counts = offsets.diff()
        alpha = operations.confusion_weights(logits.detach(), order, offsets, classes).to(dtype)
        moments = [ClassMoments.apply(z, order, offsets, eps, backend) for z in vectors]
    pairs = select_pairs(alpha, top_m, eps, backend)
    distance, weights = layer_distances(pairs, moments, counts, eps, adjustment)
    return Steps(counts, [var for _, var in moments], distance, weights)


def common_vectors(
    features: Tensor | Sequence[Tensor] | Mapping[str, Tensor], logits: Tensor
) -> list[Tensor]:
    """One (B, D) tensor per layer, of one accumulation dtype: float64 if any layer's is."""
    vectors = validation.feature_vectors(features, logits)
    double = any(v.dtype == torch.float64 for v in vectors)
    dtype = torch.float64 if double else torch.float32
    return [v if accumulation_dtype(v.dtype) == dtype else v.to(dtype) for v in vectors]


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
