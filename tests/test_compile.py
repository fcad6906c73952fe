"""torch.compile, torch.export, and what a CUDA graph needs: static shapes, no wait for the GPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import cwbr_fused
from cwbr_fused import functional
from cwbr_fused.operations import backends

# Triton's operations have the CPU's schemas, hence its graphs; interpreted they take a minute.
BACKENDS = [n for n in ("cpu", "reference") if backends.rejection(n, "cpu") is None]
# The reference cuts K x K x D into blocks by size: with top_m=None it compiles per batch size.
CASES = [(b, m) for b in BACKENDS for m in (8, None) if (b, m) != ("reference", None)]
needs_cpu_kernels = pytest.mark.skipif(
    "cpu" not in BACKENDS, reason="the reference is traced through, not called as an operation"
)


class Step(nn.Module):
    """A network and its total loss, with the features passed on explicitly."""

    def __init__(self, backend: str = "auto", top_m: int | None = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.neck, self.head = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(4, 7)
        self.backend, self.top_m = backend, top_m

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden = self.body(x).relu()
        neck = self.neck(hidden)
        logits = self.head(neck.relu())
        options: dict[str, Any] = {"top_m": self.top_m, "backend": self.backend}
        reg = cwbr_fused.loss({"hidden": hidden, "neck": neck}, logits, y, **options)
        return cwbr_fused.scale_match(cross_entropy(logits, y), reg)


def batch(seed: int, size: int) -> tuple[Tensor, Tensor]:
    """Class make-up varies with the seed: from one class to as many as samples allow."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, 6, generator=generator)
    return x, torch.randint(1 + seed % 7, (size,), generator=generator)


def assert_same_step(compiled: Callable[..., Tensor], step: Step, x: Tensor, y: Tensor) -> None:
    gradients, values = [], []
    for function in (compiled, step):
        step.zero_grad()
        values.append(function(x, y))
        values[-1].backward()
        gradients.append([p.grad.clone() for p in step.parameters() if p.grad is not None])
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backend", "top_m"), CASES)
def test_one_graph_serves_every_batch_size_and_class_make_up(
    backend: str, top_m: int | None
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = Step(backend, top_m)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for seed in range(20):
        x, y = batch(seed, 12 + seed)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(y, 0)
        assert_same_step(compiled, step, x, y)
    assert counter.frame_count == 1


def test_a_second_batch_size_compiles_once_more_and_a_third_does_not() -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    step = Step()
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    frames = []
    for seed, size in enumerate([16, 16, 21, 34, 16, 27]):
        assert_same_step(compiled, step, *batch(seed, size))
        frames.append(counter.frame_count)
    assert frames == [1, 1, 2, 2, 2, 2]


def train(step: Step, function: Callable[..., Tensor], wrap: Callable[..., Any]) -> list[Tensor]:
    optimizer = torch.optim.AdamW(step.parameters(), lr=1e-2)
    update = wrap(optimizer.step)
    for seed in range(3):
        optimizer.zero_grad()
        function(*batch(seed + 3, 24)).backward()
        update()
    return [p.detach() for p in step.parameters()]


needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="Inductor needs a C++ compiler"
)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])
def test_compiled_training_equals_eager_training(backend: str) -> None:
    torch._dynamo.reset()
    eager, compiled = Step(), Step()
    # Compiling the optimizer through Inductor costs ten seconds of C++ and calls nothing of ours.
    wrap = torch.compile(backend=backend) if backend == "aot_eager" else lambda update: update
    expected = train(eager, eager, lambda update: update)
    actual = train(compiled, torch.compile(compiled, fullgraph=True, backend=backend), wrap)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@needs_cpu_kernels
@pytest.mark.parametrize("top_m", [8, None])
def test_forward_and_backward_graphs_call_the_fused_operations(top_m: int | None) -> None:
    torch._dynamo.reset()
    graphs: dict[str, set[str]] = {}

    def record(stage: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
            targets = (str(node.target) for node in graph.graph.nodes)
            graphs[stage] = {t.split(".")[1] for t in targets if t.startswith("cwbr_fused.")}
            return make_boxed_func(graph)

        return compiler

    aot = aot_autograd(fw_compiler=record("forward"), bw_compiler=record("backward"))
    step = Step("cpu", top_m)
    assert_same_step(torch.compile(step, fullgraph=True, backend=aot), step, *batch(4, 20))
    if top_m is None:
        plan = {"group_by_class", "confusion_weights"}
        assert graphs["forward"] == plan | {"class_moments", "weighted_overlap_with_gradient"}
        assert graphs["backward"] == {"class_moments_backward"}
    else:
        assert graphs["forward"] == {"plan", "regularizer"}
        assert graphs["backward"] == {"regularizer_backward"}


@needs_cpu_kernels
def test_exported_program_holds_the_operations_and_serves_other_batch_sizes(tmp_path: Path) -> None:
    step = Step("cpu")
    sizes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    program = torch.export.export(step, batch(4, 24), dynamic_shapes=sizes)
    targets = [str(node.target) for node in program.graph.nodes]
    assert "cwbr_fused.plan.default" in targets
    assert "cwbr_fused.regularizer.default" in targets
    torch.export.save(program, tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2").module()
    for size in (24, 31, 12):
        x, y = batch(5, size)
        expected = step(x, y)
        torch.testing.assert_close(program.module()(x, y), expected)
        torch.testing.assert_close(loaded(x, y), expected)


class WaitError(Exception):
    """An operation that needs the values of a tensor on the host."""


class NoWait(TorchDispatchMode):
    """Refuses what stops a CUDA graph: values or sizes read from data, and copies over devices."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.seen = device, set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        by_number = func._opname == "index" and all(
            index is None or index.dtype == torch.int64 for index in args[1]
        )
        if tags & set(func.tags) and not by_number:
            raise WaitError(func)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor) and leaf.device.type != self.device:
                raise WaitError(f"{func} touches a tensor on {leaf.device}")
        self.seen.add(func._opname)
        return result


def on(device: str) -> tuple[Tensor, Tensor, Tensor]:
    z, logits = torch.empty(32, 16, device=device), torch.empty(32, 10, device=device)
    return z, logits, torch.empty(32, device=device, dtype=torch.int64)


@pytest.mark.parametrize("objective", ["overlap", "log_overlap"])
@pytest.mark.parametrize("top_m", [8, None])
@pytest.mark.parametrize("backend", ["reference", "cuda", "triton"])
def test_a_step_waits_for_no_value(
    monkeypatch: pytest.MonkeyPatch, backend: str, top_m: int | None, objective: str
) -> None:
    """On "meta", the one device without values whose autograd runs in a CPU build of torch."""
    monkeypatch.setattr(backends, "resolve", lambda name, device_type: backend)
    mode = NoWait("meta")
    with FakeTensorMode():
        z, logits, y = on("meta")
        maps = torch.empty(32, 3, 4, 4, device="meta").requires_grad_()
        z.requires_grad_()
        with mode:
            reg = cwbr_fused.loss([z, maps], logits, y, top_m=top_m, objective=objective)
            total = cwbr_fused.scale_match(cross_entropy(logits, y), reg, objective=objective)
            total.backward()
        assert z.grad is not None
        assert z.grad.shape == z.shape
        assert maps.grad is not None
    if backend != "reference":
        expected = {"class_moments", "class_moments_backward", "weighted_overlap_with_gradient"}
        if top_m is not None:
            expected = {"regularizer", "regularizer_backward"}
        assert mode.seen >= expected


@pytest.mark.parametrize("backend", ["reference", "cuda", "triton"])
def test_a_step_of_cwbr_waits_for_no_value(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    monkeypatch.setattr(backends, "resolve", lambda name, device_type: backend)
    with FakeTensorMode():
        z, logits, y = on("meta")
        maps = torch.empty(32, 3, 4, 4, device="meta")
        cwbr = cwbr_fused.CWBR(10)
        for _ in range(2):
            leaves = [z.clone().requires_grad_(), maps.clone().requires_grad_()]
            with NoWait("meta") as mode:
                cwbr(leaves, logits, y)
                torch.stack([leaf.sum() for leaf in leaves]).sum().backward()
        assert all(leaf.grad is not None for leaf in leaves)
    assert backend == "reference" or mode.seen >= {"top_confusions", "class_attraction"}


@pytest.mark.parametrize("top_m", [8, None])
def test_the_forward_pass_on_cuda_tensors_waits_for_no_value(top_m: int | None) -> None:
    with FakeTensorMode():
        z, logits, y = on("cuda")
        backend = next(n for n in backends.NAMES if backends.rejection(n, "cuda") is None)
        if backend == "reference":
            pytest.skip("a CPU build of torch cannot slice fake CUDA tensors; Triton is missing")
        with NoWait("cuda"):
            value = cwbr_fused.loss(z, logits, y, top_m=top_m)
        assert (value.device.type, value.shape) == ("cuda", ())


def test_what_does_wait_is_noticed() -> None:
    """`class_stats_diag` returns as many rows as there are classes; its docstring says so."""
    z, logits, y = on("cpu")
    y.copy_(torch.arange(32) % 4)
    with NoWait("cpu"), pytest.raises(WaitError, match="_local_scalar_dense"):
        functional.class_stats_diag(z, y, backend="reference")
    with NoWait("meta"), pytest.raises(WaitError, match="on cpu"):
        logits.to("meta")
