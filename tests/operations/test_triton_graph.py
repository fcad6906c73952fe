"""Triton's step waits for nothing: no host sync, no shape from data, few launches, no breaks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from arguments import operation_arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton_inputs import DEVICE, EPS, TRITON, classes, planned, randn

from cwbr_fused.operations import autograd, schema

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# These wait for the device, or have a shape that depends on what is on it.
SYNCS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "bincount",
    "repeat_interleave",
    "equal",
    "is_nonzero",
}


class NoSync(TorchDispatchMode):
    """Fails on operations that wait for the device or copy between it and the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        indexed_by_mask = name == "index" and any(
            i is not None and i.dtype == torch.bool for i in args[1]
        )
        if name in SYNCS or indexed_by_mask or ("device" in (kwargs or {}) and name == "_to_copy"):
            raise AssertionError(f"{func} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_launches(run: bool) -> Iterator[list[str]]:
    """The names of the kernels launched meanwhile; they do nothing unless `run`."""
    names: list[str] = []
    kind = type(TRITON.common.last_to_arrive)
    original = kind.run

    def counting(kernel: Any, *args: Any, **options: Any) -> Any:
        names.append(kernel.fn.__name__)
        return original(kernel, *args, **options) if run else None

    kind.run = counting
    try:
        yield names
    finally:
        kind.run = original


def step(logits: Tensor, targets: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
    """One training step's regularizer, forward and backward, by the operations themselves."""
    order, offsets, _, pairs, weights = TRITON.plan(logits, targets, 64, 2)
    planned = (order, offsets, pairs, weights, EPS, True)
    value, *saved = TRITON.regularizer(features, *planned)
    gradients = TRITON.regularizer_backward(value, features, *saved, *planned)
    return value, *gradients


def all_pairs(mean: Tensor, var: Tensor, alpha: Tensor) -> tuple[Tensor, ...]:
    value = TRITON.weighted_overlap(mean, var, alpha, EPS, False)
    gradients = TRITON.weighted_overlap_backward(value, value, mean, var, alpha, EPS, False)
    both = TRITON.weighted_overlap_with_gradient(value, mean, var, alpha, EPS, True)
    distance = TRITON.all_pair_distance(mean, var, EPS)
    return value, *gradients, *both, distance


def test_the_mode_notices_a_sync() -> None:
    with NoSync():
        for sync in (Tensor.item, Tensor.nonzero, Tensor.unique, lambda x: x[x > 0]):
            with pytest.raises(AssertionError, match="waits for the device"):
                sync(torch.ones((), device=DEVICE))


def test_the_mode_notices_a_copy_to_the_host() -> None:
    with FakeTensorMode(), NoSync():
        on_device = torch.empty(3, device="cuda")
        for copy in (Tensor.cpu, lambda x: x.to("cpu"), lambda x: x.to("cpu", non_blocking=True)):
            with pytest.raises(AssertionError, match="waits for the device"):
                copy(on_device)


def test_a_step_waits_for_nothing_and_has_no_shape_from_data() -> None:
    with FakeTensorMode() as mode, NoSync(), counted_launches(run=False) as names:
        targets = torch.empty(64, dtype=torch.int64, device=DEVICE)
        results = step(
            torch.empty(64, 100, device=DEVICE),
            targets,
            torch.empty(64, 256, device=DEVICE),
            torch.empty(64, 512, device=DEVICE, dtype=torch.bfloat16),
        )
        moments = torch.empty(2, 50, 100, device=DEVICE)
        results += all_pairs(*moments, torch.empty(50, 50, device=DEVICE))
    assert names
    assert all(r.fake_mode is mode for r in results)


@pytest.mark.parametrize("n_layers", [1, 4])
def test_a_step_is_four_launches_to_plan_and_two_each_way_for_all_layers(n_layers: int) -> None:
    logits, targets = randn(30, 7), classes(30, 7)
    features = [randn(30, 5 + n) for n in range(n_layers)]
    with counted_launches(run=True) as names:
        order, offsets, _, pairs, weights = TRITON.plan(logits, targets, 8, 2)
        assert len(names) == 4
        arguments = (order, offsets, pairs, weights, EPS, False)
        value, *saved = TRITON.regularizer(features, *arguments)
        assert len(names) == 6
        TRITON.regularizer_backward(value, features, *saved, *arguments)
        assert len(names) == 8


def test_launches_of_the_gradients_of_all_pairs_and_of_their_overlap() -> None:
    moments, alpha = torch.rand(2, 40, 70, device=DEVICE), randn(40, 40).abs()
    value = torch.ones((), device=DEVICE)
    with counted_launches(run=True) as names:
        TRITON.all_pair_distance_backward(alpha, *moments, EPS)
        assert len(names) == 3
        TRITON.weighted_overlap_backward(value, value, *moments, alpha, EPS, False)
        assert len(names) == 3 + 6
        TRITON.weighted_overlap_with_gradient(value, *moments, alpha, EPS, False)
        assert len(names) == 3 + 6 + 7


SIZES = [(64, 2048), (200, 2048), (500, 768), (1000, 256), (1000, 768), (1000, 2048), (3000, 8192)]


@pytest.mark.parametrize(("groups", "dims"), SIZES)
def test_gradients_of_all_pairs_fill_a_device_and_take_little_memory(
    groups: int, dims: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 132 processors: 36 MB, for more than 1000 classes 36 kB each, or one copy of both."""
    backward: Any = TRITON.pair_tiles_backward
    sizes: list[int] = []

    def scratch(like: Tensor, *shape: int) -> Tensor:
        sizes.append(like.element_size() * torch.Size(shape).numel())
        return torch.empty(shape, dtype=like.dtype)

    grids: list[int] = []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        grids.append(torch.Size(grid).numel() * options.get("num_warps", 0))

    monkeypatch.setattr(TRITON.tuning, "processors", lambda device: 132)
    monkeypatch.setattr(backward, "scratch", scratch)
    monkeypatch.setattr(backward, "launch", launch)
    with FakeTensorMode():
        mean = torch.empty(groups, dims)
        grad = backward.pair_gradients(mean)
        sizes.clear()
        backward.launch_pairs_backward(grad, mean, mean, EPS)
    padded = 2 * 4 * (groups + 15) * (dims + 31)
    assert sizes[0] <= max(36e6, 36e3 * groups, padded)
    blocks_of_rows = -(-groups // 16)
    assert grids[0] >= min(0.75 * 132 * 8, dims / 32 * blocks_of_rows)


def test_two_runs_give_the_same_bits() -> None:
    logits, targets = randn(40, 9), classes(40, 9)
    features = (randn(40, 33) * 0.5, randn(40, 7, seed=1) * 0.5)
    moments, alpha = torch.rand(2, 20, 50, device=DEVICE), randn(20, 20).abs()
    for function, arguments in (
        (step, (logits, targets, *features)),
        (all_pairs, (*moments, alpha)),
    ):
        torch.testing.assert_close(function(*arguments), function(*arguments), rtol=0, atol=0)


@pytest.mark.parametrize("log", [False, True])
def test_the_regularizer_compiles_without_a_graph_break(log: bool) -> None:
    planning = planned(16, 4, 3, torch.float32)
    features = [randn(16, 5) * 0.5, randn(16, 3, seed=1) * 0.5]

    def function(*z: Tensor) -> Tensor:
        value: Tensor = autograd.Regularizer.apply(*planning, 0.01, log, "triton", *z)
        return value * 2

    results = []
    for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        leaves = [z.clone().requires_grad_() for z in features]
        value = call(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_operation_passes_opcheck(name: str) -> None:
    operation = getattr(torch.ops.cwbr_fused_triton, name).default
    arguments = operation_arguments(backend="triton")[name]
    on_device = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(DEVICE), arguments)
    torch.library.opcheck(operation, on_device)
    torch.testing.assert_close(on_device, arguments, rtol=0, atol=0, check_device=False)
