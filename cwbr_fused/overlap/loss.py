"""The published form as a loss on the outputs of a network's layers, and its weight.

With `group` the class statistics are those of the samples of all processes together. N processes
with B/N samples each then get the loss of one process with B samples. Under
DistributedDataParallel or `fully_shard`, which average gradients over the processes, they also get
its parameter gradients, to float32 rounding. A process may have any number of samples of any
classes, including none.

Features stay where they are. The processes all-reduce, for the K classes that have `min_count`
samples among them, the sample counts and their squares (2 C + 1 numbers), the mean softmax rows
(K, K), and for all layers at once the means, the variances and the gradients of both (K, D). Each
process then measures the same pairs.

Every process issues the same collectives in the same order, whatever its samples: four in the
forward pass and one in the backward pass. So every process must call `loss` with the same options
and the same layers, and then `backward`, unless all of them skip it. If a process dies or does not
call, the others raise an error when the timeout of the group has passed.

- The number of usable classes is read on the host once per call. On a GPU this waits for the
  forward pass; torch.compile breaks its graph here, and a CUDA graph cannot hold the call.
- With gradient accumulation the statistics are those of one micro-batch over all processes. The
  collectives here are issued under `no_sync()` as well.
- `scale_match(ce, reg)` weights by the `ce` of the process. Its average over the processes is the
  weight of the mean `ce`, which DDP minimises.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cwbr_fused.inputs import validation
from cwbr_fused.inputs.targets import read_targets
from cwbr_fused.operations import backends
from cwbr_fused.operations.backends import Backend
from cwbr_fused.operations.distributed import Group, process_group
from cwbr_fused.operations.reference import accumulation_dtype
from cwbr_fused.overlap import steps
from cwbr_fused.overlap.options import Objective, OverlapOptions, Shrinkage, Temperature


def loss(
    features: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    *,
    top_m: int | None = 64,
    min_count: int = 2,
    eps: float = 1e-6,
    objective: Objective = "overlap",
    backend: Backend = "auto",
    group: Group = None,
    temperature: Temperature = None,
    shrinkage: Shrinkage = None,
    noise_floor: bool = False,
) -> Tensor:
    """The published regularizer: faithful to its formula, not recommended for training; use `CWBR`.

    It is here for study and comparison. Training with it lowered accuracy in every setting that was
    measured: on wide layers its value underflows to 0 and it does nothing, and on narrow ones
    `scale_match` amplifies the gradient of a few pairs. `cwbr_fused.CWBR` is the form to train
    with.

    At each layer the classes with at least `min_count` samples are diagonal Gaussians. For the
    `top_m` pairs of them that the softmax confuses most, the loss of the layer is
    `sum(alpha rho) / max(sum(alpha), eps)`, with the overlap `rho = exp(-D)` of the pair and its
    confusion `alpha`, which carries no gradient. The value is the mean over the layers. It is that
    of `cwbr_fused.reference.loss`, in a few kernels. Soft targets and the last three keywords take
    some more; these keywords change nothing unless they are given.

    Args:
        features: raw layer outputs: a tensor, a sequence or a mapping of tensors. (B, D) is used
            as it is, (B, C, H, W) is averaged over H and W, (B, N, D) gives its first token; call
            `to_vec` yourself for anything else. Gradients flow to these.
        logits: (B, C). No gradient.
        targets: (B,) integer classes in [0, C); or soft targets (B, C) of any floating dtype,
            finite and >= 0, as from label smoothing, mixup or CutMix. Moments and mean softmax rows
            are then weighted by membership above the uniform floor of each row, and a class has as
            many samples as its weights sum to. Rows need not sum to 1; a row of zeros is an
            unlabelled sample. No gradient. See `cwbr_fused.inputs.targets`.
        top_m: how many pairs; None for all.
        min_count: classes with fewer samples in the batch are left out. A value of 1 is useful
            with `shrinkage` only, where a class of one sample takes the pooled variance.
        eps: the smallest variance, and what is added to every variance, in squared feature units.
        objective: "overlap", or "log_overlap" for its logarithm, `log(sum(alpha rho)/sum(alpha))`
            by log-sum-exp, which keeps its gradient where rho underflows.
        backend: "auto", "reference", "cpu", "triton" or "cuda"; see `cwbr_fused.backends.explain`.
        group: None takes the statistics of this process's batch. A `torch.distributed.ProcessGroup`
            takes those of the batches of all its processes together, and "world" those of the
            default group, which is looked up at each call and so may be made later. Every process
            of the group must then call `loss` and `backward`; see `cwbr_fused.overlap.loss`.
        temperature: a number T > 0 puts D/T in the place of D; "dims" divides each layer's D by its
            number of dimensions, so that the overlap neither underflows in wide layers nor is left
            to the narrowest one.
        shrinkage: takes unbiased class variances and shrinks them to the pooled within-class
            variance: by a number of pseudo-counts > 0, by the "analytic" intensity, which is
            estimated for each class and carries no gradient, or fully ("pooled"). See
            `cwbr_fused.overlap.adjustments`.
        noise_floor: takes unbiased variances and subtracts from D what few samples add to it. The
            distance of identical classes is then 0 on average, and that of others their true
            distance. A corrected D may be negative; the overlap is then `1 - D`, which continues
            exp(-D) with the same slope. Without shrinkage this needs classes of at least 3 samples:
            for two classes of 2 the means are left out. See `cwbr_fused.overlap.adjustments`.

    Returns:
        A scalar, float32 (float64 for float64 features). With fewer than two usable classes it is
        0 with zero gradients. A non-finite feature of a used class makes the value and the
        gradients non-finite.

    Raises:
        TypeError, ValueError: naming the argument, before any kernel starts. On a GPU, targets out
            of range are a device-side assertion instead.
    """
    options = OverlapOptions(
        top_m, min_count, eps, objective, backend, group, temperature, shrinkage, noise_floor
    )
    return loss_with(features, logits, targets, options.check())


def loss_with(
    features: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    options: OverlapOptions,
) -> Tensor:
    """`loss` with options that were checked."""
    given = read_targets(logits, targets)
    vectors = common_vectors(features, logits)
    backend = backends.resolve(options.backend, logits.device.type)
    processes = process_group(options.group)
    if processes is None:
        return steps.regularizer(vectors, logits, given, options, backend)
    if torch.compiler.is_compiling():
        # A literal, which the error of fullgraph=True shows.
        torch._dynamo.graph_break("the number of usable classes is read on the host")
    # At the call, since it loads torch._dynamo, a second that most programs need not wait.
    regularizer = torch.compiler.disable(steps.regularizer)
    value: Tensor = regularizer(vectors, logits, given, options, backend, processes)
    return value


def common_vectors(
    features: Tensor | Sequence[Tensor] | Mapping[str, Tensor], logits: Tensor
) -> list[Tensor]:
    """One (B, D) tensor per layer, of one accumulation dtype: float64 if any layer's is."""
    vectors = validation.feature_vectors(features, logits)
    double = any(v.dtype == torch.float64 for v in vectors)
    dtype = torch.float64 if double else torch.float32
    return [v if accumulation_dtype(v.dtype) == dtype else v.to(dtype) for v in vectors]


def scale_match(
    ce: Tensor, reg: Tensor, eps: float = 1e-6, *, objective: Objective = "overlap"
) -> Tensor:
    """The published weight: faithful to its formula, not recommended for training; use `CWBR`.

    The total loss `ce + stopgrad(ce / (reg + eps)) * reg` has two terms of equal value, but not of
    equal gradient: a small `reg` is multiplied by a large number, which harms training. `CWBR`
    needs no weight.

    For `objective="log_overlap"`, where `reg` is a logarithm, the weighting is the limit of this
    one: the gradient is `grad ce + ce grad reg`, and the value is `ce`.

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
    OverlapOptions(eps=eps, objective=objective).check()
    ce, reg = ce.to(accumulation_dtype(ce.dtype)), reg.to(accumulation_dtype(reg.dtype))
    if objective == "log_overlap":
        return ce + ce.detach() * (reg - reg.detach())
    return ce + (ce / (reg + eps)).detach() * reg
