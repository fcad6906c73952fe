"""Each kernel by itself: how its cost grows with each size, what share of the machine it uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine, measure
from benchmarks.results import Row
from benchmarks.session import BUDGET_SECONDS, CHILD_LIMIT_SECONDS, Session
from benchmarks.workloads import EPS
from cwbr_fused import backends, reference
from cwbr_fused.operations import autograd

Sizes = dict[str, int]
Call = Callable[[], object]

# Arithmetic of a (pair, dimension), in FMA slots, when the fractions of 8 dimensions share one
# denominator: difference, square, sum, n s + a d, d s, and per group of 8 a reciprocal and a split
# into mantissa and exponent. The backward is counted for the form that takes the difference of two
# variances first; the one with fewest operations, 11.7, cancels where variances are nearly equal.
IDEAL_SLOTS = {"forward": 7.1, "backward": 15.5}


@dataclass(frozen=True)
class Operation:
    """A kernel and its backward.

    Attributes:
        calls: (operations of a backend, sizes) -> call of each mode.
        base: the sizes from which one at a time is varied.
        varied: which values each size takes.
        time_theory, memory_theory: largest exponents of time and of outputs in each size.
        traffic: bytes that must be read or written in (forward, backward); None for kernels
            bound by arithmetic.
        passes: how often they may be, for all of the bandwidth to count as used.
        pairs: pairs formed; None for kernels bound by memory.
    """

    calls: Callable[[Any, Sizes, str], dict[str, Call]]
    base: Sizes
    varied: dict[str, tuple[int, ...]]
    time_theory: dict[str, int]
    memory_theory: dict[str, int]
    traffic: Callable[[Sizes], tuple[int, int]] | None = None
    passes: int = 1
    pairs: Callable[[Sizes], int] | None = None


def _targets(batch: int, device: str) -> Tensor:
    """Four samples of each class, shuffled."""
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(batch // 4).repeat_interleave(4)
    return targets[torch.randperm(len(targets), generator=generator)].to(device)


def _groups(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    return reference.group_by_class(_targets(batch, device), 4)


def _moments(rows: int, dims: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(rows, dims, generator=generator) * (6 / dims) ** 0.5
    var = torch.rand(rows, dims, generator=generator) * (8 / dims) ** 0.5 + 1
    return mean.to(device), var.to(device)


def _class_moments(op: Any, sizes: Sizes, device: str) -> dict[str, Call]:
    z = torch.randn(sizes["B"], sizes["D"], device=device)
    order, offsets, _ = _groups(sizes["B"], device)
    mean, var = reference.class_moments(z, order, offsets, EPS)
    grads = torch.ones_like(mean), torch.ones_like(var)
    return {
        "forward": partial(op.class_moments, z, order, offsets, EPS),
        "backward": partial(op.class_moments_backward, *grads, z, mean, var, order, offsets, EPS),
    }


def _confusion_weights(op: Any, sizes: Sizes, device: str) -> dict[str, Call]:
    logits = torch.randn(sizes["B"], sizes["C"], device=device)
    groups = _groups(sizes["B"], device)
    return {"forward": partial(op.confusion_weights, logits, *groups)}


def _top_pairs(op: Any, sizes: Sizes, device: str) -> dict[str, Call]:
    alpha = torch.rand(sizes["K"], sizes["K"], device=device)
    return {"forward": partial(op.top_pairs, alpha, sizes["M"])}


def _plan(op: Any, sizes: Sizes, device: str) -> dict[str, Call]:
    logits = torch.randn(sizes["B"], sizes["C"], device=device)
    return {"forward": partial(op.plan, logits, _targets(sizes["B"], device), sizes["M"], 2)}


def _pair_distance(op: Any, sizes: Sizes, device: str) -> dict[str, Call]:
    moments = _moments(256, sizes["D"], device)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randperm(256 * 255 // 2, generator=generator)[: sizes["M"]]
    pairs = torch.triu_indices(256, 256, 1).T[drawn].contiguous().to(device)
    grad = torch.rand(sizes["M"], device=device)
    return {
        "forward": partial(op.pair_distance, *moments, pairs, EPS),
        "backward": partial(op.pair_distance_backward, grad, *moments, pairs, EPS),
    }


def _all_pair_distance(op: Any, sizes: Sizes, device: str) -> dict[str, Call]:
    moments = _moments(sizes["K"], sizes["D"], device)
    grad = torch.rand(sizes["K"], sizes["K"], device=device)
    return {
        "forward": partial(op.all_pair_distance, *moments, EPS),
        "backward": partial(op.all_pair_distance_backward, grad, *moments, EPS),
    }


def _weighted_overlap(op: Any, sizes: Sizes, device: str) -> dict[str, Call]:
    moments = _moments(sizes["K"], sizes["D"], device)
    alpha = torch.rand(sizes["K"], sizes["K"], device=device)
    last = (*moments, alpha, EPS, False)
    value = op.weighted_overlap(*last)
    return {
        "forward": partial(op.weighted_overlap, *last),
        "backward": partial(op.weighted_overlap_backward, torch.ones_like(value), value, *last),
    }


def _upper_triangle(sizes: Sizes) -> int:
    return sizes["K"] * (sizes["K"] - 1) // 2


BATCHES, GROUPS, DIMS = (256, 512, 1024, 2048), (128, 256, 512, 1024), (192, 384, 768, 1536)
OPERATIONS = {
    "class_moments": Operation(
        _class_moments,
        {"B": 1024, "D": 768},
        {"B": BATCHES, "D": DIMS},
        {"B": 1, "D": 1},
        {"B": 1, "D": 1},
        # z in, a mean and a variance per four samples out; back: z and four moments in, grad out.
        traffic=lambda s: (4 * s["B"] * s["D"] * 3 // 2, 4 * s["B"] * s["D"] * 3),
    ),
    "confusion_weights": Operation(
        _confusion_weights,
        {"B": 1024, "C": 8000},
        {"B": BATCHES, "C": (2000, 4000, 8000, 16_000)},
        {"B": 1, "C": 1},
        {"B": 2, "C": 0},
        traffic=lambda s: (4 * s["B"] * s["C"] + s["B"] ** 2 // 4, 0),
    ),
    "top_pairs": Operation(
        _top_pairs,
        {"K": 512, "M": 1024},
        {"K": GROUPS, "M": (64, 256, 1024, 4096)},
        {"K": 2, "M": 0},
        {"K": 0, "M": 1},
        traffic=lambda s: (2 * s["K"] ** 2, 0),
    ),
    "plan": Operation(
        _plan,
        {"B": 512, "C": 10_000, "M": 64},
        {"B": BATCHES, "C": (2500, 5000, 10_000, 20_000)},
        {"B": 2, "C": 1},
        {"B": 2, "C": 0},
        traffic=lambda s: (4 * s["B"] * s["C"], 0),
        passes=2,
    ),
    "pair_distance": Operation(
        _pair_distance,
        {"D": 768, "M": 1024},
        {"D": DIMS, "M": (256, 1024, 4096, 16_384)},
        {"D": 1, "M": 1},
        {"D": 1, "M": 0},
        pairs=lambda s: s["M"],
    ),
    "all_pair_distance": Operation(
        _all_pair_distance,
        {"K": 256, "D": 768},
        {"K": GROUPS, "D": DIMS},
        {"K": 2, "D": 1},
        {"K": 2, "D": 1},
        pairs=_upper_triangle,
    ),
    "weighted_overlap": Operation(
        _weighted_overlap,
        {"K": 256, "D": 768},
        {"K": GROUPS, "D": DIMS},
        {"K": 2, "D": 1},
        {"K": 1, "D": 1},
        pairs=_upper_triangle,
    ),
}


def case_name(operation: str, sizes: Sizes) -> str:
    return " ".join([operation, *(f"{key}={value}" for key, value in sizes.items())])


def base_cases() -> list[str]:
    return [case_name(name, operation.base) for name, operation in OPERATIONS.items()]


def cases() -> dict[str, tuple[Operation, Sizes]]:
    """Every operation at its base sizes and with each size varied, by case name."""
    found = {}
    for name, operation in OPERATIONS.items():
        for size, values in operation.varied.items():
            for value in values:
                sizes = operation.base | {size: value}
                found[case_name(name, sizes)] = (operation, sizes)
    return found


def usable_backends(device: str) -> list[str]:
    """The kernels worth a roofline: not the reference, nor Triton's interpreter."""
    names = [name for name in backends.NAMES if name != "reference"]
    if device == "cpu":
        names.remove("triton")
    return [name for name in names if backends.rejection(name, device) is None]


def _fractions(session: Session, case: str, backend: str, mode: str, seconds: float) -> list[Row]:
    """The share of the machine's peak that a kernel bound by it reaches (CPU only)."""
    operation, sizes = cases()[case]
    row = partial(session.row, case, f"cwbr {backend}", mode)
    if operation.pairs is not None:
        vectors = operation.pairs(sizes) * sizes["D"] / machine.lanes()
        slots = seconds * machine.vector_fmas_per_second(session.threads) / vectors
        ideal = IDEAL_SLOTS[mode]
        return [row("fma_slots_per_vector", [slots]), row("fraction_of_peak", [ideal / slots])]
    assert operation.traffic is not None
    traffic = operation.traffic(sizes)[list(IDEAL_SLOTS).index(mode)]
    bandwidth = machine.bytes_per_second(traffic, session.threads)
    reached = operation.passes * traffic / seconds
    return [row("fraction_of_bandwidth", [reached / bandwidth])]


def measure_case(session: Session, case: str, with_memory: bool) -> list[Row]:
    """Times of one case on every backend; its peak memory; at the base sizes its fractions."""
    operation, sizes = cases()[case]
    rows = []
    names = usable_backends(session.device)
    calls = {
        name: operation.calls(autograd.OPERATIONS[name], sizes, session.device) for name in names
    }
    for mode in next(iter(calls.values())) if calls else ():
        of_mode = {name: by_mode[mode] for name, by_mode in calls.items()}
        for call in of_mode.values():
            call()
        samples = measure.interleave(of_mode, BUDGET_SECONDS, session.device)
        for name, taken in samples.items():
            milliseconds = [s * 1e3 for s in taken]
            rows.append(session.row(case, f"cwbr {name}", mode, "time_ms", milliseconds))
            if sizes == operation.base and session.device == "cpu":
                rows += _fractions(session, case, name, mode, measure.spread(taken)[0])
    for name in names if with_memory else ():
        arguments = (case, name, session.device, session.threads)
        peak = measure.in_child(peak_extra_bytes, *arguments, timeout=CHILD_LIMIT_SECONDS)
        rows.append(session.row(case, f"cwbr {name}", "step", "peak_extra_mb", [peak / 1e6]))
    return rows


def measure_machine(session: Session) -> list[Row]:
    """The peaks that the fractions refer to."""
    row = partial(session.row, "machine", "measured", "machine")
    fmas = machine.vector_fmas_per_second(session.threads)
    bandwidth = machine.bytes_per_second(10**9, session.threads)
    return [
        row("vector_gfma_per_s", [fmas / 1e9]),
        row("float_lanes", [machine.lanes()]),
        row("triad_gb_per_s", [bandwidth / 1e9]),
    ]


def peak_extra_bytes(case: str, backend: str, device: str, threads: int) -> int:
    """Of forward and backward, outputs included; to be measured in a fresh process."""
    torch.set_num_threads(threads)
    operation, sizes = cases()[case]
    tiny = {key: min(value, 16) for key, value in sizes.items()}
    for call in operation.calls(autograd.OPERATIONS[backend], tiny, device).values():
        call()
    calls = operation.calls(autograd.OPERATIONS[backend], sizes, device)
    return measure.peak_extra_bytes(lambda: [call() for call in calls.values()], device)
