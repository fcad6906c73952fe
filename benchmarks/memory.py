"""Peak extra memory of one provider on one workload, to be measured in a fresh process."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import measure, providers
from benchmarks.workloads import BY_NAME, make


def peak_extra_bytes(workload: str, provider: str, device: str, threads: int) -> int:
    """Of one forward+backward, above the inputs; gradients count.

    Code is loaded first by a tiny problem. What compiles for the shapes must have run at full size
    instead: what it keeps of that is then not seen.
    """
    torch.set_num_threads(threads)
    chosen = providers.table(device)[provider]
    if not chosen.compiled:
        providers.step(chosen, make(BY_NAME[workload].shrunk(), device))
    inputs = make(BY_NAME[workload], device)
    if chosen.compiled:
        providers.step(chosen, inputs)
    return measure.peak_extra_bytes(partial(providers.step, chosen, inputs), device)
