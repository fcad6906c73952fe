"""Peak extra memory of one provider on one workload; started in a fresh process for each.

python -m benchmarks.memory WORKLOAD PROVIDER DEVICE THREADS    prints the bytes
"""

from __future__ import annotations

import json
import sys
from functools import partial

import torch

from benchmarks import measure, providers
from benchmarks.workloads import BY_NAME, make


def peak_extra_bytes(workload: str, provider: str, device: str) -> int:
    """Of one forward+backward, above the inputs; gradients count.

    Code is loaded first by a tiny problem. torch.compile specializes to the shapes and so must
    have run at full size before: what it keeps of that is then not seen.
    """
    chosen = providers.table(device)[provider]
    providers.step(chosen, make(BY_NAME[workload].shrunk(), device))
    inputs = make(BY_NAME[workload], device)
    if chosen.compiled:
        providers.step(chosen, inputs)
    return measure.peak_extra_bytes(partial(providers.step, chosen, inputs), device)


if __name__ == "__main__":
    name, by, where, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    print(json.dumps(peak_extra_bytes(name, by, where)))
