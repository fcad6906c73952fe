"""Where there is no GPU, Triton's kernels run on the CPU: set before anything imports Triton."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from emulation.harness import Emulator

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton"):
        import fast_interpreter

        fast_interpreter.install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests whose parameter `backend` is Triton, before a marker selects any."""
    for item in items:
        call = getattr(item, "callspec", None)
        if call is not None and call.params.get("backend") == "triton":
            item.add_marker("triton")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> None:
    torch.compiler.reset()


@pytest.fixture(params=[0, 1], ids=["order0", "order1"])
def gpu(request: pytest.FixtureRequest) -> Emulator:
    """An emulated GPU that runs its threads and blocks in one of two orders."""
    from emulation.harness import Emulator, emulated_library

    emulator = Emulator(emulated_library())
    emulator.seed = request.param
    return emulator
