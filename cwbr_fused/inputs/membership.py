"""Class statistics of weighted samples, for soft targets and for the processes of a group.

Sample b belongs to class k with weight `t_bk >= 0` (see `targets.read_soft`). With the shares
`w_bk = t_bk / sum_b t_bk`, whose sum is over the samples of all processes,

    mean_k = sum_b w_bk z_b
    var_k = sum_b w_bk (z_b - mean_k)^2
    P_kj = sum_b w_bk softmax(logits_b)_j
    n_k = 1 / sum_b w_bk^2

n is the effective sample size (Kish 1965): it is the count for class indices, and with it
`var n/(n - 1)` is unbiased and `v/n` is the variance of the mean. A sample takes one place for each
of its classes. The places of a class are summed as the samples of a class are, in two passes and in
the accumulation dtype, so one-hot rows give the same as class indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cwbr_fused.inputs.targets import Targets
from cwbr_fused.operations import autograd, reference
from cwbr_fused.operations.distributed import all_reduce, total

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Half precision rounds: weights that sum to a hundredth less than required still suffice.
ROUNDING = 1e-2


class Members(NamedTuple):
    """The samples of each class: sample b takes the places b, B + b, 2 B + b, ...

    classes: (K,) int64, ascending, -1 for the unused.
    counts: (K,) effective samples, of all processes; 0 for the unused.
    order, offsets: the places of each class, as of `group_by_class`.
    row: (S B,) the class of each place as a row in [0, K); K for none.
    scale: (S B, 1) what each place is multiplied by, so that the mean over the places of a class
        is its part of the weighted mean over the samples of all processes.
    processes: those that share their samples; None for this process alone.
    """

    classes: Tensor
    counts: Tensor
    order: Tensor
    offsets: Tensor
    row: Tensor
    scale: Tensor
    processes: ProcessGroup | None


def of_targets(
    targets: Targets,
    columns: int,
    min_count: float,
    dtype: torch.dtype,
    processes: ProcessGroup | None = None,
) -> Members:
    """The classes whose weights sum to at least `min_count`, soft ones to within a hundredth.

    There is room for K = min(C, B // min_count) classes, which suffices if no row sums to more than
    1. Otherwise the classes of largest sum take it, ties to the smaller class. Over processes K is
    the number of usable classes, which is read on the host.

    Args:
        columns: C.
        dtype: in which to accumulate.
        processes: every one of them must call, with the same C.
    """
    labels = targets.labels.T.flatten()
    hard = targets.shares is None
    share = torch.ones_like(labels) if targets.shares is None else targets.shares.T.flatten()
    share = share.to(dtype)
    room = min(columns, int(targets.labels.shape[0] / min_count))
    zeros = share.new_zeros(columns)
    sums = zeros.index_put((labels,), share, accumulate=True)
    squares = zeros.index_put((labels,), share.square(), accumulate=True)
    if processes is not None:
        batch = share.new_tensor([targets.labels.shape[0]])
        sums, squares, batch = all_reduce(torch.cat([sums, squares, batch]), processes).split(
            [columns, columns, 1]
        )
    usable = sums >= (min_count if hard else min_count * (1 - ROUNDING))
    if processes is not None:
        room = int(torch.minimum(usable.sum(), batch[0] // min_count))
    ranked = torch.sort(torch.where(usable, sums, -1), descending=True, stable=True).indices
    largest = ranked[:room]
    classes = torch.sort(torch.where(usable[largest], largest, columns)).values
    used = classes < columns
    sums, squares = (
        torch.where(used, x[torch.where(used, classes, 0)], 1) for x in (sums, squares)
    )
    # Rounding must not make a hundredth of a degree of freedom out of a single sample.
    counts = sums.square() / squares
    counts = torch.where(used, torch.where(counts < 1 + ROUNDING, 1, counts), 0)

    row_of_class = labels.new_full((columns + 1,), room)
    row_of_class[classes] = torch.arange(room, device=labels.device)
    row = torch.where(share > 0, row_of_class[labels], room)
    order, offsets = reference.groups_of_inverse(row, room)
    scale = share * torch.cat([offsets.diff() / sums, sums.new_zeros(1)])[row]
    classes = torch.where(used, classes, -1)
    return Members(classes, counts, order, offsets, row, scale[:, None], processes)


def class_moments(
    vectors: Sequence[Tensor], members: Members, eps: float, backend: str
) -> list[tuple[Tensor, Tensor]]:
    """Weighted mean and biased variance, at least eps, of each class (K, D_l) at every layer.

    Args:
        vectors: L tensors (B, D_l), whose accumulation dtype is that of the members.
        backend: a resolved name.
    """
    x = torch.cat([z.to(members.scale.dtype) for z in vectors], dim=1)
    places = _places(x, members)
    # The moments are taken about the mean as it was rounded, so that nothing cancels. They do not
    # depend on this centre, so it needs no gradient.
    with torch.no_grad():
        centre, _ = _moments(members.scale * places, members, backend)
        centre = total(centre, members.processes)
    centred = places - torch.cat([centre, centre.new_zeros(1, centre.shape[1])])[members.row]
    first, _ = _moments(members.scale * centred, members, backend)
    root, spread = _moments(members.scale.sqrt() * centred, members, backend)
    both = total(torch.stack([first, spread + root.square()]), members.processes)
    mean, var = centre + both[0], (both[1] - both[0].square()).clamp(min=eps)
    widths = [z.shape[1] for z in vectors]
    return list(zip(mean.split(widths, dim=1), var.split(widths, dim=1), strict=True))


def confusion_weights(logits: Tensor, members: Members, backend: str) -> Tensor:
    """`reference.confusion_weights` with weighted means of the softmax rows, (K, K)."""
    used = members.classes >= 0
    probs = logits.detach().to(members.scale.dtype).softmax(dim=1)
    probs = _places(probs[:, torch.where(used, members.classes, 0)], members)
    mean_probs = total(_moments(members.scale * probs, members, backend)[0], members.processes)
    alpha = (mean_probs + mean_probs.T) / 2
    pair_used = used[:, None] & used & ~torch.eye(len(used), device=used.device).bool()
    return torch.where(pair_used, alpha, 0)


def _places(x: Tensor, members: Members) -> Tensor:
    """The rows of x (B, N), once for each class that a sample may have."""
    batch = x.shape[0]
    return x.repeat(members.row.shape[0] // batch, 1) if batch > 0 else x


def _moments(x: Tensor, members: Members, backend: str) -> tuple[Tensor, Tensor]:
    return autograd.class_moments(x, members.order, members.offsets, 0.0, backend)
