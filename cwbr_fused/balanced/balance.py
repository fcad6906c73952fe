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
    """Adds `scale * |g| * r` to a gradient g; a hook of the tensor that g belongs to.

    What is added is a constant to whoever differentiates the backward pass.

    Args:
        pull: r. Its length over all samples, copies of a pooled position counted once, times
            `scale`, is that of what is added relative to g.
        scale: number.
        trusted: the accuracy of the layer's nearest class mean, the strength that follows from it,
            and what `CWBR` multiplies that with; to be recorded.
        record: of the layer.
        group: processes whose samples are measured together; their backward passes then wait for
            one another, one number per feature.
    """

    def __init__(
        self,
        pull: Spread,
        scale: float,
        trusted: tuple[Tensor, Tensor, float],
        record: Record,
        group: ProcessGroup | None = None,
    ) -> None:
        self.pull, self.scale, self.trusted, self.group = pull, scale, trusted, group
        self.record = record
        self.measures_cosine = record.cosine is None or record.calls % COSINE_EVERY < 2
        record.laid_ready(self)

    def __call__(self, incoming: Tensor | None) -> Tensor | None:
        """The gradient to go on with; records its length, and the cosine of both parts."""
        if incoming is None:  # an output of a compiled graph that the loss does not use
            return None
        self.record.fetched(self)
        r, part = self.pull
        # What is not written is copied; so is what somebody differentiates.
        is_written = part == slice(None) and not incoming.requires_grad
        result = torch.empty_like(incoming) if is_written else incoming.clone()
        with torch.no_grad():
            length = self._measured(incoming)
            g, into = incoming[:, part], result[:, part]
            scale = self.scale * max(_copies(r, g), 1) ** -0.5
            torch.addcmul(g, r, length, value=scale, out=into)
        return result

    def _measured(self, incoming: Tensor) -> Tensor:
        """The length of the gradient over all processes."""
        r, part = self.pull
        dtype = accumulation_dtype(incoming.dtype)
        length: Tensor = torch.linalg.vector_norm(incoming, dtype=dtype)
        if not self.measures_cosine:
            if self.group is not None:
                length = all_reduce(length.square(), self.group).sqrt()
        else:
            g = incoming[:, part]
            r = r.to(dtype)
            parts = length.square(), r.square().sum() * _copies(r, g), _dot(g, r, dtype)
            sums = torch.stack(parts)
            if self.group is not None:
                sums = all_reduce(sums, self.group)
            length, r_length = sums[:2].sqrt()
            tiny = torch.finfo(dtype).tiny
            self.record.cosine = sums[2] / (length * r_length).clamp(min=tiny)
        self.record.met = length, *self.trusted
        return length


def of_length(length: Tensor, pull: Spread, group: ProcessGroup | None) -> Spread:
    """A pull of this length over all processes; one that is 0 stays so."""
    gradient = pull.gradient.to(accumulation_dtype(pull.gradient.dtype))
    squares = gradient.square().sum()
    if group is not None:
        squares = all_reduce(squares, group)
    factor = length * squares.clamp(min=torch.finfo(squares.dtype).tiny).rsqrt()
    return Spread(gradient * factor, pull.part)


def _copies(r: Tensor, g: Tensor) -> float:
    """How many positions of g each number of r is spread over."""
    return g.numel() / max(r.numel(), 1)


def _dot(g: Tensor, r: Tensor, dtype: torch.dtype) -> Tensor:
    """The inner product of g and r, which is expanded to the shape of g."""
    expanded = [d for d in range(g.dim()) if r.shape[d] != g.shape[d]]
    summed = g.sum(expanded, keepdim=True, dtype=dtype) if expanded else g.to(dtype)
    return (summed * r).sum()
