"""Adding a regularizer's gradient to the loss's own at a feature, as a share of it.

Either by a tensor hook, or through a `Tap`: an identity behind a layer whose backward adds what has
been laid ready by then. Taps are part of the graph that `torch.compile` makes of a model, which
tensor hooks on its outputs cannot reach.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cwbr_fused.features import Spread
from cwbr_fused.reference import accumulation_dtype

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
            from cwbr_fused.distributed import all_reduce

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


class Tap:
    """A forward hook that replaces a layer's output by itself, and adds to its gradient.

    What `balance` holds when the backward pass comes by is added, once.
    """

    def __init__(self) -> None:
        self.balance: Balance | None = None
        self.key = next(_KEYS)
        _TAPS[self.key] = self

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> Tensor:
        if not isinstance(output, Tensor):
            raise TypeError(
                f"{type(module).__name__}: expected a layer whose output is one tensor, "
                f"got {type(output).__name__}"
            )
        tapped: Tensor = _Tapped.apply(output, self.key)
        return tapped

    def __deepcopy__(self, memo: Any) -> Tap:
        return Tap()

    def __reduce__(self) -> Any:
        return Tap, ()


_KEYS = itertools.count()
_TAPS: weakref.WeakValueDictionary[int, Tap] = weakref.WeakValueDictionary()


class _Tapped(torch.autograd.Function):
    """Identity; the gradient goes through the tap of that key."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, key: int) -> Tensor:
        ctx.key = key
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return torch.ops.cwbr_fused_tap.pass_through(grad, ctx.key), None


def _pass_through(grad: Tensor, key: int) -> Tensor:
    """`grad` with what the tap of that key has ready; a tensor of its own in any case.

    An operation, so that a compiled backward pass runs it as it is. What it adds is not among its
    arguments: it changes from step to step, and a compiled graph has no place for it.
    """
    tap = _TAPS.get(key)
    balance = None if tap is None else tap.balance
    if tap is None or balance is None:
        return grad.clone()
    tap.balance = None
    result = balance(grad)
    assert result is not None
    return result


def _declare() -> torch.library.Library:
    library = torch.library.Library("cwbr_fused_tap", "DEF")
    # A captured CUDA graph would replay the addition of one step's tensors for ever.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    library.define("pass_through(Tensor grad, int key) -> Tensor", tags=tags)
    library.impl("pass_through", _pass_through, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "cwbr_fused_tap::pass_through", lambda grad, key: torch.empty_like(grad), lib=library
    )
    return library


# A library's declarations live as long as the Library object does.
_LIBRARY = _declare()
