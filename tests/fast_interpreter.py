"""Triton's interpreter without its repeats: two thirds of the time of tests that run kernels in it.

It patches `triton.language` at each launch, and again at each call of a device function, for good.
That is needed once per device function; the search for what to patch takes a millisecond a call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton.runtime.interpreter import InterpretedFunction

_patched: set[Callable[..., Any]] = set()
_patch_and_call = InterpretedFunction.__call__


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    if self.fn in _patched:
        return self.rewrite()(*args, **kwargs)
    result = _patch_and_call(self, *args, **kwargs)
    _patched.add(self.fn)
    return result


def install() -> None:
    InterpretedFunction.__call__ = _call
