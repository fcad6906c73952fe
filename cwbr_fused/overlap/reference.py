"""The published form in pure PyTorch: the functions of `cwbr_fused.functional`, and `loss`.

They take the same arguments, of which `backend` and `group` change nothing, and run under ordinary
autograd, which can differentiate them twice.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from cwbr_fused.operations.backends import PLAIN
from cwbr_fused.overlap import functional
from cwbr_fused.overlap import loss as published
from cwbr_fused.overlap.functional import shrink_variance
from cwbr_fused.overlap.loss import scale_match

__all__ = [
    "bhat_confusion_loss",
    "bhattacharyya_diag",
    "class_stats_diag",
    "confusion_alpha",
    "loss",
    "scale_match",
    "shrink_variance",
]

Result = TypeVar("Result")


def _plain(function: Callable[..., Result]) -> Callable[..., Result]:
    @wraps(function)
    def plain(*args: Any, **options: Any) -> Result:
        options.pop("group", None)
        return function(*args, **{**options, "backend": PLAIN})

    return plain


class_stats_diag = _plain(functional.class_stats_diag)
confusion_alpha = _plain(functional.confusion_alpha)
bhattacharyya_diag = _plain(functional.bhattacharyya_diag)
bhat_confusion_loss = _plain(functional.bhat_confusion_loss)
loss = _plain(published.loss)
