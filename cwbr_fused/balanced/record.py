"""What became of the gradients that `CWBR` laid ready at one layer."""

from __future__ import annotations

import weakref
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

Reason = Literal["no graph", "too late", "no gradient"]

NUMBERS = ("ce_norm", "reg_norm", "cosine", "accuracy", "trust")

# Calls in a row whose gradient nobody fetched before the warning; one may be skipped on purpose.
MISSES_BEFORE_WARNING = 3
# How far to look behind a feature for an operation that saves tensors for its backward.
DEPTH = 16

EXPLANATIONS: dict[Reason, str] = {
    "no graph": (
        "it has no graph, so no gradient can reach it. Its layers are frozen (requires_grad=False) "
        "or ran under no_grad, inference_mode or reentrant checkpointing, or it was detached. "
        "Catch a layer that is trained; checkpoint with use_reentrant=False; leave CWBR out, or in "
        "eval(), while the layers are frozen."
    ),
    "too late": (
        "a backward pass has already run through it and freed its graph. Call CWBR after each "
        "forward and before its backward(), with the features of that very forward."
    ),
    "no gradient": (
        f"no gradient of the loss reached it in {MISSES_BEFORE_WARNING} calls. Pass the very "
        "tensor that the model goes on with (CWBR.catch does), not a copy or a pooled view of it, "
        "and call CWBR before backward(). If the model is compiled, catch its features by "
        "CWBR.catch() before its first call."
    ),
}


class Record:
    """The numbers of the latest backward pass at a layer, and the calls that had no effect.

    A call waits from the moment it lays a gradient ready until a backward pass fetches it, or until
    its graph dies, which makes it a miss. So neither calls whose losses are summed before one
    backward pass, nor a step that is skipped, count as misses too early.

    met: the length of the loss's gradient; of the call that the backward pass belonged to, the
        accuracy of the nearest class mean, the strength that follows, and the ratio.
    cosine: between that gradient and what was added to it.
    calls: how many gradients were laid ready.
    """

    def __init__(self) -> None:
        self.met: tuple[Tensor, Tensor, Tensor, float] | None = None
        self.cosine: Tensor | None = None
        self.calls = 0
        self._waiting: set[weakref.ref[Any]] = set()
        self._misses = 0
        self._said: set[Reason] = set()

    def laid_ready(self, balance: object) -> None:
        """A call has laid a gradient ready."""
        self.calls += 1
        self._waiting.add(weakref.ref(balance))

    def fetched(self, balance: object) -> None:
        """A backward pass has fetched it."""
        self._waiting.discard(weakref.ref(balance))
        self._misses = 0

    def reason(self, layer: Tensor) -> Reason | None:
        """Why a call with this feature has no effect, or the latest ones had none."""
        if not layer.requires_grad:
            return "no graph"
        if backward_is_over(layer):
            return "too late"
        dead = {reference for reference in self._waiting if reference() is None}
        self._waiting -= dead
        self._misses += len(dead)
        return "no gradient" if self._misses >= MISSES_BEFORE_WARNING else None

    def is_news(self, reason: Reason) -> bool:
        """Whether it has not been said before."""
        news = reason not in self._said
        self._said.add(reason)
        return news

    def __reduce__(self) -> tuple[type[Record], tuple[()]]:
        return Record, ()  # the graphs of the original have no copies

    def numbers(self) -> dict[str, float]:
        """See `CWBR.health`; empty as long as no backward pass has come by."""
        if self.met is None or self.cosine is None:
            return {}
        length, accuracy, strength, ratio = self.met
        added = length * strength * ratio
        numbers = torch.stack([length, added, self.cosine, accuracy, strength]).tolist()
        return dict(zip(NUMBERS, numbers, strict=True))


def backward_is_over(tensor: Tensor) -> bool:
    """Whether a backward pass has freed the graph behind `tensor`; False where it cannot be told.

    Nothing is unpacked, so hooks on saved tensors, as checkpointing has them, do not run.
    """
    node = tensor.grad_fn
    for _ in range(DEPTH):
        if node is None:
            return False
        freed = _is_freed(node)
        if freed is not None:
            return freed
        node = next((n for n, _ in node.next_functions if n is not None), None)
    return False


def _is_freed(node: Any) -> bool | None:
    """Whether the tensors that a node had saved are freed; None if it saves none."""
    try:
        for name in _saved_tensors(node.__class__):
            saved = getattr(node, name)
            for one in saved if isinstance(saved, tuple) else (saved,):
                if getattr(one, "data", None) is not None:
                    return False
            getattr(node, name.removeprefix("_raw"), None)  # raises if freed; None if never there
    except RuntimeError:
        return True
    return None


@cache
def _saved_tensors(node: Any) -> tuple[str, ...]:
    if not hasattr(torch._C._autograd.SavedTensor, "data"):
        return ()
    return tuple(name for name in dir(node) if name.startswith("_raw_saved_"))
