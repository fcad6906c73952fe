"""Triton's selection of the top pairs where it starts from a sample of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from triton_inputs import DEVICE, TRITON, rand

from cwbr_fused import reference

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

GROUPS = 120
N_PAIRS = GROUPS * (GROUPS - 1) // 2
SAMPLE = 4096  # of the 7140 pairs, at equal distances


def matrix(weights: Tensor) -> Tensor:
    """The matrix with these weights (N_PAIRS,) above the diagonal, row by row."""
    i, j = torch.triu_indices(GROUPS, GROUPS, offset=1)
    alpha = torch.zeros(GROUPS, GROUPS)
    alpha[i, j] = weights
    return (alpha + alpha.T).to(DEVICE)


def sampled() -> Tensor:
    """Which pairs are in the sample."""
    chosen = torch.zeros(N_PAIRS, dtype=torch.bool)
    chosen[torch.arange(SAMPLE) * N_PAIRS // SAMPLE] = True
    return chosen


@pytest.mark.parametrize("top_m", [1, 300, 4500])
@pytest.mark.parametrize("kind", ["sample too high", "sample too low", "sorted", "two values"])
def test_a_sample_that_misleads_costs_time_but_changes_nothing(kind: str, top_m: int) -> None:
    noise = rand(N_PAIRS).cpu()
    weights = {
        "sample too high": noise + 10 * sampled(),
        "sample too low": noise + 10 * ~sampled(),
        "sorted": noise.sort().values,
        "two values": (noise < 0.02) + 1.0,
    }[kind]
    alpha = matrix(weights.float())
    pairs, chosen = TRITON.top_pairs(alpha, top_m)
    expected_pairs, expected = reference.top_pairs(alpha, top_m)
    assert torch.equal(pairs, expected_pairs)
    assert torch.equal(chosen, expected)
