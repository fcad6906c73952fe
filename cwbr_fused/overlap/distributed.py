"""The regularizer of a batch that is spread over the processes of a `torch.distributed` group.

N processes with B/N samples each get the loss of one process with B samples, and under
DistributedDataParallel or `fully_shard`, which average gradients over the processes, its parameter
gradients, to float32 rounding. Every process may have any number of samples, also none, of any
classes.

What travels, by all-reduce, for K classes that have `min_count` samples in all processes together:
the sample counts (C,), the mean softmax rows (K, K), and the mean, the variance and later the
gradients of both (K, D), for all layers at once. Features never do. Each process then measures the
same pairs.

Each process issues the same collectives in the same order, whatever its samples: one forward when
fewer than two classes are usable, else four and one backward. So every process must call `loss`
and, unless all skip it, `backward`, with the same options and the same layers. A process that is
gone, or does not call, is an error in the others once the group's timeout has passed.

- The number of usable classes is read on the host once per call; on a GPU that waits for the
  forward pass. torch.compile breaks its graph here, and a CUDA graph cannot hold it.
- Gradient accumulation: the statistics are those of one micro-batch over all processes. It needs
  no care: the collectives here are issued under `no_sync()` as well.
- `scale_match(ce, reg)` weights by the process's own `ce`; averaged over processes that is the
  weight of the mean `ce`, the one DDP minimises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cwbr_fused.operations import distributed, reference
from cwbr_fused.operations.autograd import OPERATIONS, PairDistance, weighted_overlap
from cwbr_fused.overlap.adjustments import Adjustment, layer_distances
from cwbr_fused.overlap.functional import select_pairs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def regularizer(
    features: Sequence[Tensor],
    logits: Tensor,
    targets: Tensor,
    top_m: int | None,
    min_count: int,
    eps: float,
    log: bool,
    backend: str,
    group: ProcessGroup,
    adjustment: Adjustment,
) -> Tensor:
    """The mean over L layers of the confusion-weighted overlap of all processes' samples.

    Args:
        features: L tensors (B, D_l) of one accumulation dtype: this process's samples.
        logits, targets: (B, C), with the same C in every process, and (B,). No gradient.
        top_m, min_count, eps, log: as in `cwbr_fused.loss`; `min_count` is of the global counts.
        backend: the resolved name.
        group: a ProcessGroup.
        adjustment: of the plain formulas.

    Returns:
        A scalar, the same in every process.
    """
    groups = distributed.global_groups(targets, logits.shape[1], min_count, group)
    counts, classes = groups.counts, groups.classes
    dtype = reference.accumulation_dtype(features[0].dtype)
    if classes.shape[0] < 2:
        return torch.stack([z[:0].sum().to(dtype) for z in features]).sum()

    own_probs = reference.mean_probs(logits.detach(), groups.order, groups.offsets, classes)
    mean_probs = distributed.all_reduce(groups.share.to(dtype) * own_probs.to(dtype), group)
    alpha = ((mean_probs + mean_probs.T) / 2).fill_diagonal_(0)

    moments = distributed.layer_moments(groups, features, eps, backend, group)
    if adjustment != Adjustment():
        chosen = select_pairs(alpha, top_m, eps, backend)
        distance, weights = layer_distances(chosen, moments, counts, eps, adjustment)
        return reference.overlap(distance, weights, eps, log).mean()
    if top_m is None:
        return torch.stack(
            [weighted_overlap(m, v, alpha, eps, log, backend) for m, v in moments]
        ).mean()
    pairs, weights = OPERATIONS[backend].top_pairs(alpha, top_m)
    distance = torch.stack([PairDistance.apply(m, v, pairs, eps, backend) for m, v in moments])
    return reference.overlap(distance, weights, eps, log).mean()
