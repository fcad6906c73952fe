"""Adding a gradient inside a compiled model, whose graph tensor hooks cannot reach.

Where `torch.compile` traces the forward hook of a caught layer, the hook puts a *tap* behind the
layer: an identity that makes a ticket in the forward pass, saves it for the backward pass, and
there adds to the gradient what was laid ready for the ticket. Each forward has tickets of its own,
so nothing is ever added to the gradient of another one; a ticket is a tensor, so the graph does not
depend on which model or step it is; and what was laid ready dies with the graph that saved the
ticket.
"""

from __future__ import annotations

import itertools
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cwbr_fused.inputs.features import FeatureCatcher, Slot, first_tensor, with_first_tensor
from cwbr_fused.inputs.layers import listed

Hook = Callable[[Tensor], Tensor | None]

# Where a caught feature of a compiled model bears its ticket.
_ATTRIBUTE = "_cwbr_fused_ticket"


class TappedCatcher(FeatureCatcher):
    """A `FeatureCatcher` whose features take hooks also where the model is compiled."""

    def _slot(self, name: str) -> Slot:
        return _TappedSlot(name)


class Catchers:
    """The catchers that one `CWBR` has made; a copy of it has none."""

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[TappedCatcher] = weakref.WeakSet()

    def add(self, model: nn.Module, layers: Iterable[str | nn.Module]) -> TappedCatcher:
        """A new one.

        Raises:
            TypeError, ValueError: as `FeatureCatcher`; or another model has a layer of that name
                that is being caught.
        """
        catcher = TappedCatcher(model, layers)
        for other in self._alive:
            taken = other.names_shared_with_other_models(catcher)
            if taken:
                catcher.remove()
                raise ValueError(
                    "layers: expected those of the model that this CWBR catches, as its class "
                    f"means are those of one model, got {listed(taken)} of another model. Make a "
                    "CWBR for each model, or call remove() of the first catcher"
                )
        self._alive.add(catcher)
        return catcher

    def __str__(self) -> str:
        """For the representation of the module."""
        names = [name for catcher in self._alive for name in catcher.names]
        return f", layers={names}" if names else ""

    def __reduce__(self) -> tuple[type[Catchers], tuple[()]]:
        return Catchers, ()


def register_hook(feature: Tensor, hook: Hook, logits: Tensor) -> None:
    """`feature.register_hook(hook)`, also where `feature` was caught in a compiled model.

    A leaf outlives the forward; its hook goes with the graph of `logits`.
    """
    ticket = getattr(feature, _ATTRIBUTE, None)
    if ticket is not None:
        _TICKETS[int(ticket)].hooks.append(hook)
        return
    handle = feature.register_hook(hook)
    if feature.is_leaf and logits.grad_fn is not None:
        metadata: Any = logits.grad_fn.metadata
        metadata.setdefault(_ATTRIBUTE, []).append(_Removal(handle))


class _Removal:
    """Removes a hook when it dies."""

    def __init__(self, handle: RemovableHandle) -> None:
        self.handle = handle

    def __del__(self) -> None:
        self.handle.remove()


class _TappedSlot(Slot):
    """A hook that puts a tap behind its layer while that is compiled."""

    def __init__(self, name: str, awake: bool = True) -> None:
        super().__init__(name, awake)
        self.ticket: Tensor | None = None

    def __call__(self, module: Any, args: Any, output: object) -> object:
        traced = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
        if not (self.awake and traced and torch.is_grad_enabled()):
            self.ticket = None
            return super().__call__(module, args, output)
        tensor = first_tensor(output, self.name)
        if not tensor.requires_grad:
            self.ticket = None
            return super().__call__(module, args, output)
        tapped, self.ticket = _Tap.apply(tensor)
        # What the model does to its own tensor in place is no part of the feature. Inductor leaves
        # out the copy.
        self.output = tapped.clone()
        return with_first_tensor(output, tapped)

    def caught(self) -> Tensor | None:
        feature = super().caught()
        if feature is not None and self.ticket is not None:
            setattr(feature, _ATTRIBUTE, self.ticket)
        return feature

    def clear(self) -> None:
        super().clear()
        self.ticket = None


class _Tap(torch.autograd.Function):
    """x -> x, ticket; the gradient of x passes by what is laid ready for the ticket."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ticket = torch.ops.cwbr_fused_tap.ticket(x)
        ctx.save_for_backward(ticket)
        ctx.mark_non_differentiable(ticket)
        return x.detach(), ticket  # not a view, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> Tensor:
        (ticket,) = ctx.saved_tensors
        passed: Tensor = torch.ops.cwbr_fused_tap.pass_through(grad, ticket)
        return passed


class _Ticket(bytearray):
    """The memory of a ticket, which its tensors keep alive, and the hooks to run in its place."""

    def __init__(self, number: int) -> None:
        super().__init__(number.to_bytes(8, sys.byteorder))
        self.hooks: list[Hook] = []


_NUMBERS = itertools.count()
_TICKETS: weakref.WeakValueDictionary[int, _Ticket] = weakref.WeakValueDictionary()


def _new_ticket(x: Tensor) -> Tensor:
    """(1,) int64 on the CPU, another number at every call; x only says which forward it is of."""
    number = next(_NUMBERS)
    ticket = _TICKETS[number] = _Ticket(number)
    return torch.frombuffer(ticket, dtype=torch.int64)


def _pass_through(grad: Tensor, ticket: Tensor) -> Tensor:
    """`grad` with what is laid ready for the ticket; a tensor of its own in any case.

    What it adds is not among its arguments: it is not known when the graph is made.
    """
    kept = _TICKETS.get(int(ticket))
    result = grad
    for hook in [] if kept is None else kept.hooks:
        changed = hook(result)
        result = result if changed is None else changed
    return grad.clone() if result is grad else result


def _declare() -> torch.library.Library:
    library = torch.library.Library("cwbr_fused_tap", "DEF")
    # A captured CUDA graph would replay the ticket and the addition of one step for ever.
    tags = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
    library.define("ticket(Tensor x) -> Tensor", tags=tags)
    library.define("pass_through(Tensor grad, Tensor ticket) -> Tensor", tags=tags)
    library.impl("ticket", _new_ticket, "CompositeExplicitAutograd")
    library.impl("pass_through", _pass_through, "CompositeExplicitAutograd")
    torch.library.register_fake(
        "cwbr_fused_tap::ticket",
        lambda x: torch.empty(1, dtype=torch.int64, device="cpu"),
        lib=library,
    )
    torch.library.register_fake(
        "cwbr_fused_tap::pass_through", lambda grad, ticket: torch.empty_like(grad), lib=library
    )
    return library


# A library's declarations live as long as the Library object does.
_LIBRARY = _declare()
