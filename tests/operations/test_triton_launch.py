"""Where and how Triton's kernels are launched, which needs no device to see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from arguments import operation_arguments
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from triton_inputs import DEVICE, EPS, TRITON, randn

from cwbr_fused.operations import schema

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The devices entered now, innermost last."""
    devices: list[Any] = []

    @contextmanager
    def enter(device: Any) -> Iterator[None]:
        devices.append(device)
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device", enter)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: enter(x.device))
    return devices


@pytest.mark.parametrize("name", schema.SCHEMAS)
def test_every_kernel_starts_on_the_device_of_its_tensors(
    name: str, entered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With products and sums fused, and without checks of overflow, on any Triton."""
    launches: list[tuple[list[Any], Any, Any]] = []

    def run(kernel: Any, *args: Any, **options: Any) -> None:
        fusion, checks = options["enable_fp_fusion"], options["sanitize_overflow"]
        launches.append((list(entered), fusion, checks))

    monkeypatch.setattr(type(TRITON.common.last_to_arrive), "run", run)
    arguments = operation_arguments(backend="triton")[name]
    elsewhere = torch.device("meta")
    moved = torch.utils._pytree.tree_map_only(Tensor, lambda x: x.to(elsewhere), arguments)
    getattr(TRITON, name)(*moved)
    assert launches
    assert all(launch == ([elsewhere], True, False) for launch in launches)


def test_the_architecture_is_that_of_the_tensors_device(
    entered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An H100 beside an A100."""
    first, second = torch.device("cuda:0"), torch.device("cuda:1")

    def target() -> Any:
        return SimpleNamespace(backend="cuda", arch={first: 90, second: 80}[entered[-1]])

    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=target))
    monkeypatch.setattr(triton.runtime, "driver", driver)
    driver.active = type("Driver", (), {"get_current_target": staticmethod(target)})()
    assert TRITON.tuning.architecture(first) == "cuda 90"
    assert TRITON.tuning.architecture(second) == "cuda 80"


def test_gradients_of_no_groups_are_contiguous_whatever_the_features() -> None:
    z = randn(4, 3).T[:1]
    order, offsets = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    moments = z.new_empty(0, 4)
    empty = (order.to(DEVICE), offsets.to(DEVICE))
    gradient = TRITON.class_moments_backward(moments, moments, z, moments, moments, *empty, EPS)
    pairs, weights = order.new_empty(0, 2).to(DEVICE), z.new_empty(0)
    (through_all,) = TRITON.regularizer_backward(
        z.new_ones(()),
        [z],
        [moments],
        [moments],
        z.new_empty(1, 0),
        *empty,
        pairs,
        weights,
        EPS,
        True,
    )
    for g in (gradient, through_all):
        assert g.stride() == torch.empty(z.shape).stride()
        assert not g.any()


def test_more_class_groups_than_indices_hold_are_an_error_before_any_launch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(*args: Any, **options: Any) -> None:
        raise AssertionError("a kernel was launched")

    monkeypatch.setattr(type(TRITON.common.last_to_arrive), "run", run)
    with FakeTensorMode():
        alpha = torch.empty(40_000, 40_000, device=DEVICE)
        with pytest.raises(
            ValueError, match="alpha: expected at most 32768 class groups, got 4000"
        ):
            TRITON.top_pairs(alpha, 64)
        logits, targets = alpha[:, :10], torch.empty(40_000, dtype=torch.int64, device=DEVICE)
        with pytest.raises(ValueError, match="targets: expected at most 32768 class groups, got"):
            TRITON.plan(logits, targets, 64, 1)
