"""Times under pytest-benchmark: `make bench-quick`. Asserts that results are right, never times.

Compare two runs of your own with --benchmark-save and --benchmark-compare; run with -k to choose.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch

from benchmarks.providers import RUN, Checker, table
from benchmarks.workloads import BY_NAME, make

QUICK = (
    "8x4",
    "CUB ResNet-50",
    "iNat-18 ViT-B",
    "CWBR bank",
    "pairs K=64 D=256",
    "pairs K=64 D=2048",
)
PROVIDERS = {
    name: provider
    for name, provider in table("cpu").items()
    if provider.missing is None and not provider.compiled
}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def checker(workload: str) -> Checker:
    return Checker(make(BY_NAME[workload]))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("mode", RUN)
@pytest.mark.parametrize("workload", QUICK)
def test_time(workload: str, mode: str, provider: str, benchmark: Callable[..., object]) -> None:
    chosen = PROVIDERS[provider]
    if not chosen.takes(BY_NAME[workload]):
        pytest.skip(f"{provider} is for other kinds of problems")
    assert checker(workload).complaint(chosen, mode) is None
    benchmark.group = f"{workload}, {mode}"  # type: ignore[attr-defined]
    benchmark(partial(RUN[mode], chosen, make(BY_NAME[workload])))
