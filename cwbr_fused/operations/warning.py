"""The class of every warning of the package."""

from __future__ import annotations


class CWBRWarning(UserWarning):
    """Something has no effect, an unintended one, or is slow; the text says what to do."""
