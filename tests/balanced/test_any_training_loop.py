"""Whatever the loop, a pull is added to the gradient of the call that it was measured on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training_loops import Loop

CHUNKS, SEQUENCES, STEPS = 10, 200, 14
COMPILED_SEQUENCES = 60


def run(loop: Loop, steps: int, seed: int) -> None:
    try:
        loop.run(steps)
    except BaseException as error:
        error.add_note(f"seed {seed}: {', '.join(loop.history)}")
        raise


@pytest.mark.parametrize("chunk", range(CHUNKS))
@pytest.mark.usefixtures("one_thread")
def test_each_backward_pass_adds_what_its_own_calls_measured(chunk: int) -> None:
    for seed in range(chunk * SEQUENCES, (chunk + 1) * SEQUENCES):
        run(Loop(seed), STEPS, seed)


@pytest.mark.usefixtures("one_thread")
def test_each_backward_pass_of_a_compiled_model_adds_what_its_own_calls_measured() -> None:
    torch._dynamo.reset()

    def compiled(model: torch.nn.Module) -> Any:
        return torch.compile(model, backend="aot_eager", fullgraph=True)

    with torch._functorch.config.patch(donated_buffer=False):  # graphs may be kept
        for seed in range(COMPILED_SEQUENCES):
            run(Loop(seed, compiled), STEPS, seed)
