"""Adding a gradient inside a compiled model.

A `Tap` is an identity behind a layer whose backward adds what has been laid ready by then. Taps are
part of the graph that `torch.compile` makes of a model, which tensor hooks on its outputs cannot
reach.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from cwbr_fused.balanced.balance import Balance


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
