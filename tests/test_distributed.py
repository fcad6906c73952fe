"""N processes with B/N samples each equal one process with B samples.

Starting a process costs seconds, so one start per number of processes runs every check; each
check is still a test of its own. A check runs in every process and asserts there.
"""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import distributed_bank
import distributed_training
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode

import cwbr_fused
from cwbr_fused import backends, reference
from cwbr_fused.operations import autograd

BACKENDS = [name for name in backends.NAMES if backends.rejection(name, "cpu") is None]
CLASSES = 9
# Samples of each process: unequal, and none.
SIZES = {2: (20, 13), 4: (11, 0, 17, 5)}

if not dist.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)


@dataclass
class Batch:
    features: list[Tensor]
    logits: Tensor
    targets: Tensor

    def part(self, rank: int, sizes: Sequence[int]) -> Batch:
        """The samples of process `rank`; its features are leaves of their own."""
        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        features = [z[own].detach().clone().requires_grad_() for z in self.features]
        return Batch(features, self.logits[own], self.targets[own])

    def to(self, dtype: torch.dtype) -> Batch:
        features = [z.detach().to(dtype).requires_grad_() for z in self.features]
        return Batch(features, self.logits.to(dtype), self.targets)

    def loss(self, **options: Any) -> Tensor:
        return cwbr_fused.loss(self.features, self.logits, self.targets, **options)


def batch(size: int, seed: int = 0, classes: int = CLASSES) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (size,), generator=generator)
    logits = 2 * torch.randn(size, CLASSES, generator=generator)
    features = [torch.randn(size, dims, generator=generator) for dims in (5, 3)]
    return Batch([z.requires_grad_() for z in features], logits, targets)


def assert_equals_one_process(
    whole: Batch, rank: int, sizes: Sequence[int], rounding: float, **options: Any
) -> None:
    """Value and gradient over all processes are those of one process with all samples."""
    own = whole.part(rank, sizes)
    value = own.loss(group="world", **options)
    expected = whole.loss(**options)
    torch.testing.assert_close(value, expected, rtol=rounding, atol=rounding)
    wanted = torch.autograd.grad(expected, whole.features)
    value.backward()
    for z, gradient in zip(own.features, wanted, strict=True):
        assert z.grad is not None
        # The sum over processes of equal losses; DDP divides by their number.
        torch.testing.assert_close(
            z.grad / len(sizes),
            gradient[sum(sizes[:rank]) :][: sizes[rank]],
            rtol=0,
            atol=10 * rounding * float(gradient.abs().max()),
        )


def check_loss_and_gradient_equal_one_process(rank: int, world: int) -> None:
    sizes = SIZES[world]
    for backend, top_m, objective in itertools.product(
        BACKENDS, (1, 8, None), ("overlap", "log_overlap")
    ):
        if backend == "triton" and (world > 2 or top_m == 1 or objective == "overlap"):
            continue  # Interpreted on the CPU it takes seconds.
        options = {"top_m": top_m, "objective": objective, "backend": backend}
        whole = batch(sum(sizes))
        assert_equals_one_process(whole, rank, sizes, 1e-6, **options)
        assert_equals_one_process(whole.to(torch.float64), rank, sizes, 1e-13, **options)


def check_shrunk_variances_and_noise_floors_equal_one_process(rank: int, world: int) -> None:
    sizes = SIZES[world]
    whole = batch(sum(sizes)).to(torch.float64)
    for shrinkage, top_m in itertools.product((3, "analytic", "pooled"), (8, None)):
        options = {"shrinkage": shrinkage, "top_m": top_m, "min_count": 1, "temperature": "dims"}
        assert_equals_one_process(whole, rank, sizes, 1e-12, noise_floor=True, **options)


def check_soft_targets_equal_one_process(rank: int, world: int) -> None:
    sizes = SIZES[world]
    whole = batch(sum(sizes))
    rows = one_hot(whole.targets, CLASSES)
    whole.targets = 0.54 * rows + 0.36 * rows.roll(1, 0) + 0.1 / CLASSES
    for top_m, options in itertools.product((8, None), ({}, {"shrinkage": 3, "min_count": 1})):
        assert_equals_one_process(whole, rank, sizes, 1e-6, top_m=top_m, **options)
        precise = whole.to(torch.float64)
        assert_equals_one_process(precise, rank, sizes, 1e-12, top_m=top_m, **options)
    whole.targets = whole.targets * torch.linspace(0.5, 2.5, sum(sizes))[:, None]
    assert_equals_one_process(whole.to(torch.float64), rank, sizes, 1e-12, min_count=1)


def check_classes_split_over_processes_count_together(rank: int, world: int) -> None:
    """No process alone has two samples of a class, or all classes are of one process each."""
    one_of_each = Batch(*vars(batch(CLASSES * world)).values())
    one_of_each.targets = torch.arange(CLASSES).repeat(world)
    assert one_of_each.part(rank, [CLASSES] * world).loss().item() == 0
    apart = batch(6 * world)
    apart.targets = torch.arange(2 * world).repeat_interleave(3)
    for whole, sizes in ((one_of_each, [CLASSES] * world), (apart, [6] * world)):
        assert whole.loss().item() > 0
        assert_equals_one_process(whole, rank, sizes, 1e-6)
        assert_equals_one_process(whole, rank, sizes, 1e-6, min_count=3, top_m=None)


def check_a_large_common_mean_survives_the_merge(rank: int, world: int) -> None:
    sizes = SIZES[world]
    whole = batch(sum(sizes), 1)
    whole.features = [(z.detach() + 1000).requires_grad_() for z in whole.features]
    truth = reference.loss([z.double() for z in whole.features], whole.logits, whole.targets)
    value = whole.part(rank, sizes).loss(group="world")
    torch.testing.assert_close(value.double(), truth, rtol=1e-4, atol=0)


def check_every_process_weights_the_loss_by_itself(rank: int, world: int) -> None:
    sizes = SIZES[world]
    whole = batch(sum(sizes), 2)
    own = whole.part(rank, sizes)
    (own.loss(group="world") * (rank + 1)).backward()
    (wanted,) = torch.autograd.grad(whole.loss(), whole.features[:1])
    expected = wanted[sum(sizes[:rank]) :][: sizes[rank]] * sum(range(1, world + 1))
    torch.testing.assert_close(own.features[0].grad, expected, rtol=1e-4, atol=1e-7)


def check_fewer_than_two_usable_classes_give_a_connected_zero(rank: int, world: int) -> None:
    for targets in ([0] * 3, [rank] * 1, []):
        own = batch(len(targets))
        own.targets = torch.tensor(targets, dtype=torch.int64)
        for top_m in (8, None):
            value = own.loss(group="world", top_m=top_m)
            gradients = torch.autograd.grad(value, own.features)
            assert value.item() == 0
            assert not any(g.any() for g in gradients)


class Collectives(TorchDispatchMode):
    """Records the name and the number of elements of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.seen.append((func._opname, sum(t.numel() for t in args[0])))
        return func(*args, **(kwargs or {}))


def check_only_moments_travel(rank: int, world: int) -> None:
    samples, classes = 50, 3
    own = batch(samples, rank, classes)
    with Collectives() as loss:
        own.loss(group="world").backward()
    moments = classes * sum(z.shape[1] for z in own.features)
    sizes = [2 * CLASSES + 1, classes * classes, moments, 2 * moments, 2 * moments]
    assert loss.seen == [("allreduce_", size) for size in sizes]

    passed_on = [z.tanh() for z in own.features]
    with Collectives() as bank:
        cwbr_fused.CWBR(CLASSES, group="world")(passed_on, own.logits, own.targets)
        torch.stack([z.sum() for z in passed_on]).sum().backward()
    balances = [3] * len(passed_on)
    sizes = [2 * CLASSES + 1, moments, 2 * moments, 4 * len(passed_on) + 1, *balances]
    assert bank.seen == [("allreduce_", size) for size in sizes], (bank.seen, sizes)


def check_a_broken_sample_of_one_process_is_seen_by_all(rank: int, world: int) -> None:
    own = batch(12, 3)
    own.targets = torch.arange(12) % 3
    if rank == world - 1:
        with torch.no_grad():
            own.features[0][0] = float("inf")
    value = own.loss(group="world")
    value.backward()
    assert value.isnan()
    assert own.features[0].grad is not None
    assert own.features[0].grad[own.targets == 0].isnan().all()


def check_half_precision_is_merged_in_float32(rank: int, world: int) -> None:
    sizes = SIZES[world]
    for dtype in (torch.float16, torch.bfloat16):
        whole = batch(sum(sizes), 4).to(dtype)
        own = whole.part(rank, sizes)
        value = own.loss(group="world")
        torch.testing.assert_close(value, whole.loss(), rtol=1e-5, atol=0)
        assert value.dtype == torch.float32
        assert torch.autograd.grad(value, own.features[0])[0].dtype == dtype


def check_a_group_of_some_processes_takes_their_statistics(rank: int, world: int) -> None:
    pair = dist.new_group([0, 1])
    sizes = [15, 15]
    whole = batch(30, 5)
    if rank in (0, 1):
        value = whole.part(rank, sizes).loss(group=pair)
        torch.testing.assert_close(value, whole.loss(), rtol=1e-5, atol=0)
    else:
        with pytest.raises(TypeError, match=r"group: .*belongs to"):
            whole.loss(group=pair)
    alone = [dist.new_group([r]) for r in range(world)][rank]
    own = whole.part(0, sizes)
    assert torch.equal(own.loss(group=alone), own.loss())


def check_the_module_survives_copies(rank: int, world: int) -> None:
    whole = batch(24 * world, 6)
    own = whole.part(rank, [24] * world)
    module = cwbr_fused.ConfusionWeightedBhatReg(["a"], group="world")
    expected = cwbr_fused.loss(whole.features[0], whole.logits, whole.targets)
    for twin in (module, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        value = twin({"a": own.features[0]}, own.logits, own.targets)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)


def check_second_derivative_is_refused(rank: int, world: int) -> None:
    own = batch(20, rank)
    value = own.loss(group="world")
    (gradient,) = torch.autograd.grad(value, own.features[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"no double backward.*cwbr_fused\.reference"):
        torch.autograd.grad(gradient.sum(), own.features[0])


def check_a_process_that_does_not_call_is_an_error(rank: int, world: int) -> None:
    for stage in ("forward", "backward"):
        impatient = dist.new_group(timeout=timedelta(seconds=2))
        own = batch(20)
        if stage == "backward":
            value = own.loss(group=impatient)
        if rank == 0:
            started = time.monotonic()
            with pytest.raises(RuntimeError):
                own.loss(group=impatient) if stage == "forward" else value.backward()
            assert time.monotonic() - started < 30
    dist.barrier()


def check_a_process_that_died_is_an_error(rank: int, world: int) -> None:
    """Must be the last: the other processes are gone afterwards."""
    if rank != 0:
        os._exit(0)
    own, bank = batch(20), cwbr_fused.CWBR(CLASSES, group="world")
    for call in (
        lambda: own.loss(group="world"),
        lambda: bank(own.features, own.logits, own.targets),
    ):
        started = time.monotonic()
        with pytest.raises(RuntimeError):
            call()
        assert time.monotonic() - started < 30


CHECKS: dict[str, Callable[[int, int], None]] = {
    name.removeprefix("check_"): function
    for checks in (vars(distributed_bank), vars(distributed_training), globals())
    for name, function in checks.items()
    if name.startswith("check_")
}


def run_checks(rank: int, world: int, folder: str) -> None:
    """What each process does; its failure goes to a file, which outlives it."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    store.set_timeout(timedelta(seconds=60))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=30)
    )
    with open(f"{folder}/{rank}", "w", buffering=1) as report:
        for name, check in CHECKS.items():
            print(json.dumps([name, "started, did not return"]), file=report)
            try:
                check(rank, world)
            except BaseException:
                # The processes are out of step now, so no later check would mean anything.
                print(json.dumps([name, traceback.format_exc()]), file=report)
                return
            print(json.dumps([name, "passed"]), file=report)


@cache
def outcomes(world: int) -> list[dict[str, str]]:
    """The outcome of every check, by process."""
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        reports = [Path(folder, str(rank)) for rank in range(world)]
        processes = [
            context.Process(target=run_checks, args=(rank, world, folder)) for rank in range(world)
        ]
        for process, report in zip(processes, reports, strict=True):
            report.touch()
            process.start()
        deadline = time.monotonic() + 240
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        lines = [report.read_text().splitlines() for report in reports]
    return [dict(json.loads(line) for line in of_rank) for of_rank in lines]


@pytest.mark.parametrize("backend", BACKENDS)
def test_classes_of_other_processes_only_have_empty_moments(backend: str) -> None:
    z, order, offsets = torch.empty(0, 3), torch.empty(0, dtype=torch.int64), torch.zeros(6).long()
    operations = autograd.OPERATIONS[backend]
    moments = operations.class_moments(z, order, offsets, 0.0)
    for moment in moments:
        assert torch.equal(moment, torch.zeros(5, 3))
    gradient = operations.class_moments_backward(*moments, z, *moments, order, offsets, 1e-6)
    assert gradient.shape == (0, 3)


@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("name", CHECKS)
def test_over_processes(name: str, world: int) -> None:
    by_rank = [outcome.get(name, "never started") for outcome in outcomes(world)]
    if name == "a_process_that_died_is_an_error":
        by_rank = by_rank[:1]
    failures = [f"process {rank}: {o}" for rank, o in enumerate(by_rank) if o != "passed"]
    assert not failures, "\n".join(failures)
