"""Adding a regularizer's gradient to the loss's own at a feature, as a share of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cwbr_fused.inputs.pooling import Spread
from cwbr_fused.operations.distributed import all_reduce
from cwbr_fused.operations.reference import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# The cosine takes a pass over the gradient for itself, so it is measured at a layer's first two
# balances (at the very first no class mean is known) of every so many.
COSINE_EVERY = 16


class Balance:
    """Adds `ratio * |g| / |r| * r` to a gradient g.

    Args:
        pull: r; its length does not matter.
        ratio: scalar tensor.
        group: processes whose samples are measured together; their backward passes then wait for
            one another, three numbers per feature.
        previous: the layer's balance of the step before, whose cosine this one may keep.
    """

    def __init__(
        self,
        pull: Spread,
        ratio: Tensor,
        group: ProcessGroup | None = None,
        previous: Balance | None = None,
    ) -> None:
        self.pull, self.ratio, self.group = pull, ratio, group
        self.norms: Tensor | None = None
        self.cosine: Tensor | None = None
        self.number = 0
        if previous is not None:
            self.number = previous.number + 1
            due = self.number % COSINE_EVERY < 2
            self.cosine = None if due else previous.cosine

    def __call__(self, incoming: Tensor | None) -> Tensor | None:
        """The gradient to go on with; keeps the lengths of both parts and their cosine."""
        if incoming is None:  # an output of a compiled graph that the loss does not use
            return None
        r, part = self.pull
        g = incoming[:, part]
        dtype = accumulation_dtype(incoming.dtype)
        copies = g.numel() / max(r.numel(), 1)
        g_norm = torch.linalg.vector_norm(incoming, dtype=dtype)
        r_norm = torch.linalg.vector_norm(r, dtype=dtype) * copies**0.5
        dot = _dot(g, r, dtype) if self.cosine is None else torch.zeros_like(g_norm)
        if self.group is not None:
            squares = all_reduce(torch.stack([g_norm.square(), r_norm.square(), dot]), self.group)
            (g_norm, r_norm), dot = squares[:2].sqrt(), squares[2]
        tiny = torch.finfo(dtype).tiny
        scale = torch.where(r_norm > 0, self.ratio * g_norm / r_norm.clamp(min=tiny), 0)
        self.norms = torch.stack([g_norm, scale * r_norm])
        if self.cosine is None:
            self.cosine = dot / (g_norm * r_norm).clamp(min=tiny)
        added = (r * scale).to(incoming.dtype)
        if part == slice(None):
            return incoming + added
        result = incoming.clone()
        result[:, part] += added
        return result

    def numbers(self) -> dict[str, float]:
        """See `CWBR.health`."""
        assert self.norms is not None
        assert self.cosine is not None
        numbers = torch.cat([self.norms, self.cosine[None]]).tolist()
        return dict(zip(("ce_norm", "reg_norm", "cosine"), numbers, strict=True))


def _dot(g: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """The inner product of g and r, which is expanded to the shape of g."""
    expanded = [d for d in range(g.dim()) if r.shape[d] != g.shape[d]]
    summed = g.sum(expanded, keepdim=True, dtype=dtype) if expanded else g.to(dtype)
    return (summed * r).sum()
