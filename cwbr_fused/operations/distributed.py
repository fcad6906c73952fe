"""Sums over the processes of a `torch.distributed` group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from cwbr_fused.operations.autograd import first_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# The processes whose samples a call takes together: this one alone, all, or some.
Group: TypeAlias = "ProcessGroup | Literal['world'] | None"


def process_group(group: Group) -> ProcessGroup | None:
    """The group over which a checked `group` asks for statistics; None for this process's own."""
    if group == "world":
        if not dist.is_initialized():
            raise ValueError(
                "group: expected a default group of torch.distributed for 'world', got none; "
                "call torch.distributed.init_process_group() first"
            )
        group = dist.group.WORLD
    return None if group is None or group.size() == 1 else group


def all_reduce(local: Tensor, group: ProcessGroup) -> Tensor:
    """The sum of `local`, which it replaces, over all processes."""
    dist.all_reduce(local, group=group)
    return local


def total(local: Tensor, group: ProcessGroup | None) -> Tensor:
    """The differentiable sum of `local` over all processes; `local` itself without a group.

    Each process has a loss of its own, so the gradient is the sum of theirs.
    """
    return local if group is None else _Total.apply(local, group)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return all_reduce(local.contiguous().clone(), group)

    @staticmethod
    @first_order
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return all_reduce(grad.contiguous().clone(), ctx.group), None
