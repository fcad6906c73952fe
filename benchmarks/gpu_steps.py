"""The steps of `gpu_check.py` that run in torch: `python benchmarks/gpu_steps.py STEP [FROM]`.

Each prints what it does and appends one JSON line per result to $GPU_CHECK_RESULTS. FROM is how
many results an earlier process, which an error of the device ended, has written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

if TYPE_CHECKING:
    from cwbr_fused.operations.backends import Backend

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "operations")]
REHEARSAL = os.environ.get("GPU_CHECK_REHEARSAL") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
BACKENDS: tuple[Backend, ...] = ("triton",) if REHEARSAL else ("triton", "cuda")
POISONED = 75
# Of float32 results, relative to the largest entry of the float64 truth.
TOLERANCE = 1e-4
REPEATS = 3 if REHEARSAL else 100


def report(name: str, ok: bool | None, **details: Any) -> None:
    row = {"step": os.environ.get("GPU_CHECK_STEP", sys.argv[1]), "name": name, "ok": ok, **details}
    line = json.dumps(row, default=str)
    print(line, flush=True)
    if path := os.environ.get("GPU_CHECK_RESULTS"):
        with open(path, "a") as file:
            print(line, file=file)


def each(cases: Iterator[tuple[str, Callable[[], dict[str, Any]]]], start: int) -> int:
    """Runs the cases from `start` on; a device that answers with errors ends the process."""
    status = 0
    for number, (name, case) in enumerate(cases):
        if number < start:
            continue
        begun = time.perf_counter()
        try:
            details = case()
        except Exception as error:
            traceback.print_exc()
            details = {"ok": False, "error": f"{type(error).__name__}: {str(error)[:300]}"}
        ok = details.pop("ok", None)
        report(name, ok, seconds=round(time.perf_counter() - begun, 2), **details)
        status |= ok is False
        if ok is False and not REHEARSAL:
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return POISONED
    return status


# ---- machine


def output_of(*command: str) -> str:
    """The end of what a program prints, or why it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return done.stdout.strip()[-400:]


def machine(start: int) -> int:
    """Versions, the device, and which backends are usable, in words."""
    from cwbr_fused.info import info

    facts: dict[str, Any] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if not REHEARSAL:
        facts["device"] = torch.cuda.get_device_name(0)
        facts["capability"] = torch.cuda.get_device_capability(0)
        facts["devices"] = torch.cuda.device_count()
    for program in (("nvidia-smi",), ("nvcc", "--version")):
        facts[program[0]] = output_of(*program)
    report("versions", REHEARSAL or torch.cuda.is_available(), info=info(), **facts)
    return 0


# ---- operations against float64


def on_device(value: Any) -> Any:
    """The same tensors on the device, wherever they are in nested arguments."""
    if isinstance(value, Tensor):
        return value.to(DEVICE)
    if isinstance(value, list | tuple):
        return type(value)(on_device(part) for part in value)
    return value


def offset(value: Any) -> Any:
    """The same values as views that begin one element into a larger storage."""
    if isinstance(value, Tensor):
        storage = value.new_empty(value.numel() + 1)
        view = storage[1:].view(value.shape)
        return view.copy_(value)
    if isinstance(value, list | tuple):
        return type(value)(offset(part) for part in value)
    return value


def error_of(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest deviation of any result, relative to the largest entry of its truth."""
    worst = 0.0
    for result, wanted in zip(results, truth, strict=True):
        result, wanted = result.double().cpu(), wanted.double()
        if result.shape != wanted.shape:
            return float("inf")
        if wanted.numel():
            scale = wanted.abs().max().clamp(min=1e-30)
            worst = max(worst, float((result - wanted).abs().max() / scale))
    return worst


def operations(start: int) -> int:
    """Every operation of every GPU backend, each alone, at sizes that break kernels."""
    from arguments import SETTINGS, operation_arguments
    from kernel_inputs import outcome

    from cwbr_fused.operations import autograd, backends, schema

    def case(backend: Backend, name: str, setting: str, moved: bool) -> dict[str, Any]:
        sizes = SETTINGS[setting]
        arguments = operation_arguments(torch.float32, backend, sizes)[name]
        double = [widened(a) for a in arguments]
        truth = outcome(schema.pure_pytorch(name), name, double)
        given = on_device(arguments)
        operation = getattr(autograd.OPERATIONS[backend], name)
        results = outcome(operation, name, offset(given) if moved else given)
        if len(results) != len(truth):  # moments that a backend keeps and the reference does not
            results = [results[0], *results[len(results) - len(truth) + 1 :]]
        error = error_of(results, truth)
        return {"ok": error <= TOLERANCE, "error": error}

    def cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for backend in BACKENDS:
            reason = backends.rejection(backend, DEVICE)
            if reason is not None:
                yield f"{backend}", partial(dict, ok=None, why=reason)
                continue
            for name in schema.SCHEMAS:
                chosen = ("odd", "one pair") if REHEARSAL else SETTINGS
                for setting in chosen:
                    label = f"{backend} {name}, {setting}"
                    yield label, partial(case, backend, name, setting, False)
                label = f"{backend} {name}, offset views"
                yield label, partial(case, backend, name, "odd", True)

    return each(cases(), start)


def widened(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return type(value)(widened(part) for part in value)
    return value


# ---- training steps


class Net(nn.Module):
    """Four layers of the widths of a ResNet, without convolutions."""

    def __init__(self, classes: int, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = zip((widths[0], *widths[:-1]), widths, strict=True)
        self.layers = nn.ModuleList([nn.Linear(a, b) for a, b in pairs])
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        features = []
        for layer in self.layers:
            x = layer(x).relu()
            features.append(x)
        return features, self.head(x)


class Training:
    """A model, a batch and one form; `step` is forward, regularizer and backward."""

    def __init__(self, form: str, backend: Backend, device: str = DEVICE) -> None:
        from cwbr_fused import CWBR

        small = REHEARSAL
        batch, classes, widths = (16, 8, (8, 16)) if small else (256, 1000, (256, 512, 1024, 2048))
        torch.manual_seed(0)
        self.net = Net(classes, widths).to(device)
        self.x = torch.randn(batch, widths[0]).to(device)
        self.targets = (torch.arange(batch) % (classes // 2)).to(device)
        self.form, self.backend = form, backend
        self.cwbr = CWBR(classes, backend=backend)

    def step(self) -> list[Tensor]:
        """The gradients of one step."""
        import cwbr_fused

        features, logits = self.net(self.x)
        loss = cross_entropy(logits, self.targets)
        if self.form == "CWBR":
            self.cwbr(features, logits, self.targets)
        elif self.form != "alone":
            top_m = None if self.form == "loss, all pairs" else 64
            reg = cwbr_fused.loss(features, logits, self.targets, top_m=top_m, backend=self.backend)
            loss = cwbr_fused.scale_match(loss, reg)
        return list(torch.autograd.grad(loss, list(self.net.parameters())))


FORMS = ("CWBR", "loss", "loss, all pairs")


def without_waiting(form: str, backend: Backend) -> dict[str, Any]:
    """A step under the mode in which every wait for the device is an error."""
    training = Training(form, backend)
    for _ in range(3):
        training.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        training.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"ok": True}


def repeatable(form: str, backend: Backend) -> dict[str, Any]:
    """The same step from the same state gives the same bits."""
    first = [g.clone() for g in Training(form, backend).step()]
    for _ in range(REPEATS):
        again = Training(form, backend).step()
        if not all(torch.equal(a, b) for a, b in zip(first, again, strict=True)):
            return {"ok": False, "error": "other bits"}
    return {"ok": True, "repeats": REPEATS}


def like_the_reference(form: str, backend: Backend) -> dict[str, Any]:
    """Gradients after three steps, against pure PyTorch on the CPU."""
    ours, truth = Training(form, backend), Training(form, "reference", "cpu")
    for _ in range(3):
        got, wanted = ours.step(), truth.step()
    error = error_of(got, wanted)
    return {"ok": error <= 1e-2, "error": error}


def captured(form: str, backend: Backend) -> dict[str, Any]:
    """A whole step as a CUDA graph: replays go on from the state that the last one left."""
    graphed, plain = Training(form, backend), Training(form, backend)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            graphed.step()
            plain.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = graphed.step()
    for _ in range(2):
        graph.replay()
        wanted = plain.step()
    error = error_of(results, [w.cpu() for w in wanted])
    return {"ok": error <= 1e-6, "error": error}


def on_a_side_stream(form: str, backend: Backend) -> dict[str, Any]:
    wanted = Training(form, backend).step()
    torch.cuda.synchronize()
    training, stream = Training(form, backend), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        got = training.step()
    stream.synchronize()
    return {"ok": all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))}


def on_the_second_device(form: str, backend: Backend) -> dict[str, Any]:
    if torch.cuda.device_count() < 2:
        return {"ok": None, "why": "one device"}
    got = Training(form, backend, "cuda:1").step()
    wanted = Training(form, backend, "cuda:0").step()
    return {"ok": error_of(got, [w.cpu() for w in wanted]) <= 1e-6}


def launches(form: str, backend: Backend) -> dict[str, Any]:
    """Kernels of a step, beyond those of the network alone."""
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for each_form in (form, "alone"):
        training = Training(each_form, backend)
        for _ in range(3):
            training.step()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            training.step()
            torch.cuda.synchronize()
        kernels = [e for e in profiler.events() if "memcpy" not in e.name.lower()]
        counts.append(len(kernels))
    return {"ok": None, "launches": counts[0] - counts[1]}


def training(start: int) -> int:
    """Whole steps of both forms."""
    from cwbr_fused.operations import backends

    checks: tuple[Callable[[str, Backend], dict[str, Any]], ...] = (like_the_reference, repeatable)
    if not REHEARSAL:
        checks += (
            without_waiting,
            captured,
            on_a_side_stream,
            on_the_second_device,
            launches,
        )

    def cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        for backend in BACKENDS:
            if backends.rejection(backend, DEVICE) is not None:
                continue
            for form in FORMS:
                for check in checks:
                    label = f"{backend} {form}: {check.__name__}"
                    yield label, partial(check, form, backend)

    return each(cases(), start)


# ---- times


def milliseconds(call: Callable[[], object]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    if REHEARSAL:
        begun = time.perf_counter()
        call()
        return (1e3 * (time.perf_counter() - begun),) * 3
    from triton.testing import do_bench

    median, low, high = do_bench(call, warmup=50, rep=200, quantiles=[0.5, 0.2, 0.8])
    return median, low, high


def times(start: int) -> int:
    """First step and warm steps of each form, and what they add to the network alone."""
    from cwbr_fused.operations import backends

    def case(form: str, backend: Backend) -> dict[str, Any]:
        trained = Training(form, backend)
        begun = time.perf_counter()
        trained.step()
        first = time.perf_counter() - begun
        return {"first_step_seconds": round(first, 2), "ms": milliseconds(trained.step)}

    def cases() -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
        yield "the network alone", partial(case, "alone", "reference")
        every: tuple[Backend, ...] = (*BACKENDS, "reference")
        for backend in every:
            if backends.rejection(backend, DEVICE) is None:
                for form in FORMS:
                    yield f"{backend} {form}", partial(case, form, backend)

    return each(cases(), start)


def peers(start: int) -> int:
    """The reference under torch.compile: what a user would write instead."""

    def case(form: str) -> dict[str, Any]:
        compiled = torch.compile(
            Training(form, "reference").step, backend="eager" if REHEARSAL else "inductor"
        )
        compiled()
        return {"ms": milliseconds(compiled)}

    forms = ("loss", "loss, all pairs")
    return each(((f"compiled {form}", partial(case, form)) for form in forms), start)


if __name__ == "__main__":
    chosen = {f.__name__: f for f in (machine, operations, training, times, peers)}
    sys.exit(chosen[sys.argv[1]](int(sys.argv[2]) if len(sys.argv) > 2 else 0))
