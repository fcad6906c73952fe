"""What the tests of the adapters share."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cwbr_fused import CWBR


def library(name: str) -> Any:
    """The library, without which the test is skipped; one that does not go with torch is none."""
    return pytest.importorskip(name, exc_type=Exception)


def same_banks(one: CWBR, other: CWBR) -> bool:
    """Whether both remember the same class means, and at least one of them."""
    first, second = one.state_dict(), other.state_dict()
    return (
        first.keys() == second.keys()
        and any(name.endswith("mean") for name in first)
        and all(torch.equal(first[name], second[name]) for name in first)
    )
