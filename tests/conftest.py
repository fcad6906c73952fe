"""Where there is no GPU, Triton's kernels run on the CPU: set before anything imports Triton."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
