"""Class statistics of samples that are spread over the processes of a `torch.distributed` group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from cwbr_fused.operations import reference
from cwbr_fused.operations.autograd import OPERATIONS, first_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def process_group(group: ProcessGroup | Literal["world"] | None) -> ProcessGroup | None:
    """The group over which a checked `group` asks for statistics; None for this process's own."""
    if group == "world":
        if not dist.is_initialized():
            raise ValueError(
                "group: 'world' is the default group of torch.distributed, got no default group; "
                "call torch.distributed.init_process_group() first"
            )
        group = dist.group.WORLD
    return None if group is None or group.size() == 1 else group


def all_reduce(local: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of `local`, which it replaces, over all processes."""
    dist.all_reduce(local, group=group)
    return local


class GlobalClassMoments(torch.autograd.Function):
    """(order, offsets, share, eps, backend, group, *features) -> mean, var (K, D_1 + ... + D_L).

    The class moments of all processes' samples, merged exactly (Chan, Golub, LeVeque 1983): with
    `share` (K, 1) this process's part of each class's samples,

        mean = sum over processes of share mean_local
        var = sum over processes of share (var_local + (mean_local - mean)^2)

    The second sum is taken about the finished mean, so an error d in it costs only d^2.
    The gradient to a sample needs the global moments only: `class_moments_backward` at these, with
    the gradients summed over processes, as each of them has its own loss.
    """

    @staticmethod
    def forward(
        ctx: Any,
        order: Tensor,
        offsets: Tensor,
        share: Tensor,
        eps: float,
        backend: str,
        group: ProcessGroup,
        *features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        class_moments = OPERATIONS[backend].class_moments
        local = [class_moments(z, order, offsets, 0.0) for z in features]
        local_mean, local_var = (torch.cat(moment, dim=1) for moment in zip(*local, strict=True))
        mean = all_reduce(share * local_mean, group)
        var = all_reduce(share * (local_var + (local_mean - mean).square()), group).clamp_(min=eps)
        ctx.save_for_backward(mean, var, share, order, offsets, *features)
        ctx.eps, ctx.backend, ctx.group = eps, backend, group
        return mean, var

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_mean: Tensor, grad_var: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, share, order, offsets, *features = ctx.saved_tensors
        grads = all_reduce(torch.stack([grad_mean, grad_var]), ctx.group) * share
        widths = [z.shape[1] for z in features]
        per_layer = (moment.split(widths, dim=1) for moment in (*grads, mean, var))
        class_moments_backward = OPERATIONS[ctx.backend].class_moments_backward
        results = [
            class_moments_backward(g_mean, g_var, z, m, v, order, offsets, ctx.eps)
            for z, g_mean, g_var, m, v in zip(features, *per_layer, strict=True)
        ]
        needed = ctx.needs_input_grad[6:]
        return *(None,) * 6, *(r if n else None for r, n in zip(results, needed, strict=True))


class GlobalGroups(NamedTuple):
    """The classes of all processes' samples, and this process's samples of them.

    classes, counts: (K,) int64, and how many samples each has in all processes together.
    order, offsets: (B,) and (K + 1,), of this process.
    share: (K, 1) float64, this process's part of the counts.
    """

    classes: Tensor
    counts: Tensor
    order: Tensor
    offsets: Tensor
    share: Tensor


def global_groups(
    targets: Tensor, num_classes: int, min_count: int, group: ProcessGroup
) -> GlobalGroups:
    """Reads the number of classes with `min_count` samples on the host."""
    targets = targets.long()
    own_counts = targets.new_zeros(num_classes)
    own_counts.scatter_add_(0, targets, torch.ones_like(targets))
    counts = all_reduce(own_counts.clone(), group)
    classes = torch.nonzero(counts >= min_count).squeeze(1)
    group_of_class = torch.full_like(counts, -1)
    group_of_class[classes] = torch.arange(classes.shape[0], device=classes.device)
    order, offsets = reference.groups_of_inverse(group_of_class[targets], classes.shape[0])
    share = (own_counts[classes].double() / counts[classes])[:, None]
    return GlobalGroups(classes, counts[classes], order, offsets, share)


@torch.no_grad()
def class_moments(
    features: Sequence[Tensor],
    targets: Tensor,
    num_classes: int,
    backend: str,
    group: ProcessGroup,
) -> tuple[Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Moments of the classes of all processes' samples, the same in every process.

    Args:
        features: L tensors (B, D_l) of one accumulation dtype: this process's samples.
        targets: (B,).

    Returns:
        classes, counts: (K,) int64.
        moments: for each layer mean and variance, (K, D_l) each.
    """
    groups = global_groups(targets, num_classes, 1, group)
    moments = layer_moments(groups, features, 0.0, backend, group)
    return groups.classes, groups.counts, moments


def layer_moments(
    groups: GlobalGroups,
    features: Sequence[Tensor],
    eps: float,
    backend: str,
    group: ProcessGroup,
) -> list[tuple[Tensor, Tensor]]:
    """Mean and variance (K, D_l) at each layer, of all processes' samples."""
    share = groups.share.to(reference.accumulation_dtype(features[0].dtype))
    mean, var = GlobalClassMoments.apply(
        groups.order, groups.offsets, share, eps, backend, group, *features
    )
    widths = [z.shape[1] for z in features]
    return list(zip(mean.split(widths, dim=1), var.split(widths, dim=1), strict=True))


def mean_over_samples(values: Tensor, group: ProcessGroup) -> Tensor:
    """The mean of all processes' (B,) values; the same in every process."""
    total = all_reduce(torch.stack([values.sum(), values.new_tensor(len(values))]), group)
    return total[0] / total[1]
