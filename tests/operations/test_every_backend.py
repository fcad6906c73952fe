"""Every operation on every backend is its definition in float64, at every size of `SETTINGS`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from arguments import SETTINGS, operation_arguments
from emulation.checks import assert_close, doubles
from kernel_backends import kernels_of
from kernel_inputs import outcome, regularizer_with_moments

from cwbr_fused.operations import reference, schema


def regularizer_on_the_cpu(features: Any, order: Any, offsets: Any, *plan: Any) -> Any:
    """No moments, and no distance for pairs of weight zero."""
    value, *_, distance = reference.regularizer(features, order, offsets, *plan)
    return value, [], [], torch.where(plan[1] != 0, distance, 0)


def definition(name: str, backend: str) -> Any:
    if name != "regularizer":
        return schema.pure_pytorch(name)
    return regularizer_on_the_cpu if backend == "cpu" else regularizer_with_moments


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_operation_is_its_definition(backend: str, setting: str) -> None:
    kernels = kernels_of(backend)
    for name, arguments in operation_arguments(torch.float32, backend, SETTINGS[setting]).items():
        operation = getattr(kernels.operations, name)
        ours = outcome(operation, name, arguments)
        truth = outcome(definition(name, backend), name, doubles(arguments))
        assert_close(ours, truth, factor=20)
