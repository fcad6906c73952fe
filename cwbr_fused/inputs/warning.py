"""The class of every warning of the package."""

from __future__ import annotations


class CWBRWarning(UserWarning):
    """The regularizer has no effect, or an unintended one; the text says what to do."""
