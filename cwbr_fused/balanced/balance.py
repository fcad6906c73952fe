"""Adding a regularizer's gradient to the loss's own at a feature, as a share of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cwbr_fused.balanced.record import Record
from cwbr_fused.inputs.pooling import Spread
from cwbr_fused.operations.distributed import all_reduce
from cwbr_fused.operations.reference import accumulation_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


# The cosine takes a pass over the gradient for itself, so it is measured at a layer's first two
# calls (at the very first no class mean is known) of every so many.
COSINE_EVERY = 16


class Balance:
    """Adds `ratio * |g| / |r| * r` to a gradient g; a hook of the tensor that g belongs to.

    What is added is a constant to whoever differentiates the backward pass.

    Args:
        pull: r; its length does not matter.
        ratio: scalar tensor.
        record: of the layer.
        group: processes whose samples are measured together; their backward passes then wait for
            one another, three numbers per feature.
    """

    def __init__(
        self, pull: Spread, ratio: Tensor, record: Record, group: ProcessGroup | None = None
    ) -> None:
        self.pull, self.ratio, self.group = pull, ratio, group
        self.record = record
        self.measures_cosine = record.cosine is None or record.calls % COSINE_EVERY < 2
        record.laid_ready(self)

    def __call__(self, incoming: Tensor | None) -> Tensor | None:
        """The gradient to go on with; records the lengths of both parts and their cosine."""
        if incoming is None:  # an output of a compiled graph that the loss does not use
            return None
        self.record.fetched(self)
        with torch.no_grad():
            added = self._added(incoming.detach())
        part = self.pull.part
        if part == slice(None):
            return incoming + added
        result = incoming.clone()
        result[:, part] += added
        return result

    def _added(self, incoming: Tensor) -> Tensor:
        r, part = self.pull
        g = incoming[:, part]
        dtype = accumulation_dtype(incoming.dtype)
        r = r.to(dtype)
        copies = g.numel() / max(r.numel(), 1)
        g_norm = torch.linalg.vector_norm(incoming, dtype=dtype)
        r_norm = torch.linalg.vector_norm(r) * copies**0.5
        dot = _dot(g, r, dtype) if self.measures_cosine else torch.zeros_like(g_norm)
        if self.group is not None:
            squares = all_reduce(torch.stack([g_norm.square(), r_norm.square(), dot]), self.group)
            (g_norm, r_norm), dot = squares[:2].sqrt(), squares[2]
        tiny = torch.finfo(dtype).tiny
        scale = torch.where(r_norm > 0, self.ratio * g_norm / r_norm.clamp(min=tiny), 0)
        self.record.norms = torch.stack([g_norm, scale * r_norm])
        if self.measures_cosine:
            self.record.cosine = dot / (g_norm * r_norm).clamp(min=tiny)
        return (r * scale).to(incoming.dtype)


def _dot(g: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """The inner product of g and r, which is expanded to the shape of g."""
    expanded = [d for d in range(g.dim()) if r.shape[d] != g.shape[d]]
    summed = g.sum(expanded, keepdim=True, dtype=dtype) if expanded else g.to(dtype)
    return (summed * r).sum()
