"""What the fused path never allocates: K x K x D, B x C, and K x K where a scalar is wanted.

Two views. What operations hand to each other is seen by a dispatch mode. What a compiled kernel
takes for itself is not: for that, a fresh process measures how far its resident set rises.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cwbr_fused
from benchmarks.measure import CallCounter, in_fresh_process, peak_extra_bytes
from cwbr_fused import backends

# What a kernel may take beyond its outputs, whatever the sizes: tiles, packed rows, thread stacks.
SCRATCH = 16 * 2**20
REJECTION = backends.rejection("cpu", "cpu")
needs_cpu = pytest.mark.skipif(REJECTION is not None, reason=f"cpu: {REJECTION}")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="only Linux resets peak memory")


def loss_step(batch: int, classes: int, groups: int, dims: int) -> Callable[[], object]:
    """Forward and backward of the whole loss on one layer."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(batch, dims, generator=generator).requires_grad_()
    logits = torch.randn(batch, classes, generator=generator)
    targets = torch.arange(batch) % groups

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(cwbr_fused.loss(z, logits, targets, backend="cpu"), z)

    return step


def overlap_step(groups: int, dims: int) -> Callable[[], object]:
    """Forward and backward of the overlap of all pairs."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(groups, dims, generator=generator).requires_grad_()
    var = (torch.rand(groups, dims, generator=generator) + 1).requires_grad_()
    alpha = torch.rand(groups, groups, generator=generator)

    def step() -> tuple[Tensor, ...]:
        value = cwbr_fused.functional.bhat_confusion_loss(mean, var, alpha, None, backend="cpu")
        return torch.autograd.grad(value, (mean, var))

    return step


STEPS = {"loss": loss_step, "overlap": overlap_step}


def extra_bytes(step: str, *sizes: int) -> int:
    """Peak extra memory of a step of these sizes, in a process that runs nothing else."""
    extra = in_fresh_process("tests.overlap.test_memory", step, *map(str, sizes), timeout=120)
    assert isinstance(extra, int)
    return extra


def largest_made(call: Callable[[], object]) -> int:
    """Elements of the largest storage that an operation makes during `call`."""
    counter = CallCounter()
    with counter:
        call()
    return counter.largest_elements


def test_the_counter_sees_a_large_temporary() -> None:
    x = torch.ones(10, 30)
    assert largest_made(lambda: (x[:, None] - x[None]).sum()) == 10 * 10 * 30


@linux_only
def test_the_process_sees_memory_that_torch_does_not() -> None:
    assert extra_bytes("hidden", 50 * 10**6) == pytest.approx(50e6, rel=0.05)


def test_the_reference_measures_all_pairs_in_blocks() -> None:
    groups, dims = 256, 256
    mean, var = torch.randn(groups, dims), torch.rand(groups, dims)
    largest = largest_made(lambda: cwbr_fused.reference.bhattacharyya_diag(mean, var))
    assert groups**2 <= largest <= 2**22 < groups**2 * dims


@needs_cpu
def test_operations_of_a_step_hand_on_nothing_larger_than_the_features() -> None:
    batch, classes, groups, dims = 256, 1000, 128, 48
    assert batch * dims < groups**2 < batch * classes < groups**2 * dims
    assert largest_made(loss_step(batch, classes, groups, dims)) <= batch * dims


@needs_cpu
def test_operations_of_an_overlap_hand_on_nothing_larger_than_the_moments() -> None:
    groups, dims = 128, 48
    assert largest_made(overlap_step(groups, dims)) <= groups * dims


@needs_cpu
@linux_only
def test_overlap_of_all_pairs_takes_no_matrix_of_pairs() -> None:
    groups, dims = 4096, 16
    outputs = 2 * 4 * groups * dims
    assert outputs + SCRATCH < 4 * groups**2 / 2
    assert extra_bytes("overlap", groups, dims) <= outputs + SCRATCH


@needs_cpu
@linux_only
def test_overlap_of_wide_moments_takes_no_tensor_of_pairs_and_dimensions() -> None:
    groups, dims = 256, 1024
    outputs = 2 * 4 * groups * dims
    assert extra_bytes("overlap", groups, dims) <= outputs + SCRATCH < 4 * groups**2 * dims / 10


@needs_cpu
@linux_only
def test_loss_takes_no_softmax_of_the_batch() -> None:
    batch, classes, groups, dims = 2048, 10_000, 512, 64
    outputs = 4 * batch * dims
    assert extra_bytes("loss", batch, classes, groups, dims) <= outputs + SCRATCH
    assert outputs + SCRATCH < 4 * batch * classes / 4


if __name__ == "__main__":
    torch.set_num_threads(2)
    name, *given = sys.argv[1:]
    numbers = [int(size) for size in given]
    if name == "hidden":
        print(json.dumps(peak_extra_bytes(lambda: bytearray(numbers[0]))))
    else:
        STEPS[name](*(min(size, 8) for size in numbers))()
        print(json.dumps(peak_extra_bytes(STEPS[name](*numbers))))
