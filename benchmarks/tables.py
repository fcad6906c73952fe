"""Markdown tables of the results: the README's short one, and a report of everything."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence

from benchmarks import operations, resnet, scaling
from benchmarks.markdown import table
from benchmarks.providers import EAGER
from benchmarks.results import Row
from benchmarks.workloads import BY_NAME, REALISTIC, SWEEP, Workload

PEERS = (
    EAGER,
    "eager compiled",
    "chunked",
    "chunked checkpoint",
    "gathered",
    "gathered compiled",
    "keops",
)
# A few of the report's many: what the recommended form costs first.
IN_README = (
    "CWBR bank",
    "CWBR landmarks",
    "CUB ResNet-50",
    "iNat-21 ViT-L",
    "pairs K=1000 D=2048",
)


class Numbers:
    """The rows of one device, to be asked for."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.rows = list(rows)
        self._by_key = {(r.workload, r.provider, r.mode, r.metric, r.threads): r for r in self.rows}

    def get(
        self, workload: str, provider: str, mode: str, metric: str, threads: int = 1
    ) -> Row | None:
        return self._by_key.get((workload, provider, mode, metric, threads))

    def median(
        self, workload: str, provider: str, mode: str, metric: str, threads: int = 1
    ) -> float | None:
        row = self.get(workload, provider, mode, metric, threads)
        return row.median if row else None

    def own(self) -> str:
        """This package's fastest provider on the device."""
        measured = {r.provider for r in self.rows if r.median is not None}
        names = ("cwbr cuda", "cwbr cpu", "cwbr triton", "cwbr reference")
        return next(name for name in names if name in measured)

    def provenance(self) -> str:
        """Device, torch and commits of the numbers, as one line."""

        def values(field: Callable[[Row], str]) -> str:
            return ", ".join(sorted({field(row) for row in self.rows}))

        device, version = values(lambda r: r.device), values(lambda r: r.torch)
        return f"{device}; torch {version}; commit {values(lambda r: r.commit)}"


def quantity(value: float, units: Sequence[tuple[float, str]]) -> str:
    """Three significant digits in the largest unit that fits."""
    size, unit = next((u for u in units if value >= u[0]), units[-1])
    scaled = value / size
    digits = max(0, 2 - math.floor(math.log10(scaled))) if scaled > 0 else 0
    return f"{scaled:.{digits}f} {unit}"


def cell(row: Row | None) -> str:
    """A number with its unit; why there is none; nothing where it was not asked for."""
    if row is None:
        return ""
    if row.median is None:
        reason = row.note.split(":")[0]
        return reason.removesuffix(" by prediction")
    if row.metric == "time_ms":
        return quantity(row.median, ((1000, "s"), (1, "ms")))
    if row.metric == "peak_extra_mb":
        return quantity(row.median, ((1000, "GB"), (1, "MB")))
    return f"{row.median:.4g}"


def sizes(workload: Workload) -> str:
    dims = (
        "+".join(map(str, workload.dims))
        if len(set(workload.dims)) > 1
        else (f"{len(workload.dims)}x{workload.dims[0]}")
    )
    pairs = "all pairs" if workload.top_m is None else f"top {workload.top_m}"
    if workload.kind == "cwbr":
        pairs += " per sample"
    return f"B={workload.batch}, C={workload.classes:,}, D={dims}, {pairs}"


def seconds_per_image(
    numbers: Numbers, threads: int, workload: Workload = resnet.LARGER
) -> float | None:
    """Of a ResNet-50 training step without a regularizer."""
    taken = numbers.median(workload.name, "none", "training step", "time_ms", threads)
    return None if taken is None else taken / 1e3 / workload.batch


def share(numbers: Numbers, workload: Workload, provider: str, threads: int) -> str:
    """Of a ResNet-50 step of as many images: the regularizer's own forward and backward."""
    own = numbers.median(workload.name, provider, "step", "time_ms", threads)
    image = seconds_per_image(numbers, threads)
    if own is None or image is None:
        return ""
    return f"{100 * own / 1e3 / (workload.images * image):.2g} %"


def share_note(numbers: Numbers, threads: int) -> str:
    """What of a share is measured and what is scaled; nothing where there is none."""
    larger = seconds_per_image(numbers, threads)
    if larger is None:
        return ""
    smaller = seconds_per_image(numbers, threads, resnet.SMALLER)
    check = "" if smaller is None else f" (at B={resnet.SMALLER.batch}: {smaller:.3g} s)"
    return (
        "Of a ResNet-50 step: the regularizer's own time over the time of a training step with as "
        "many images (224 x 224, SGD, no regularizer). That time is B times "
        f"{larger:.3g} s, measured per image at B={resnet.LARGER.batch}{check}. A workload of all "
        "pairs of K classes counts as a batch of two images per class.\n"
    )


def memory_note(numbers: Numbers) -> str:
    """From where on the runs of these numbers were left out for memory; nothing if none was."""
    reason = re.compile(r"out of memory by prediction: ([\d.]+) GB")
    needed = [float(found[1]) for row in numbers.rows if (found := reason.match(row.note))]
    return f"; out of memory: by prediction {min(needed):.3g} GB or more" if needed else ""


def readme_table(numbers: Numbers) -> str:
    """Forward and backward of some workloads, those that were measured."""
    own = numbers.own()
    columns = (EAGER, "eager compiled", "gathered compiled", own)
    header = ["one training step's regularizer", *columns, "of a ResNet-50 step"]
    header += ["peak extra memory: eager", own]
    lines = []
    for workload in map(BY_NAME.__getitem__, IN_README):
        times = [cell(numbers.get(workload.name, p, "step", "time_ms")) for p in columns]
        if not any(times):
            continue
        memory = [
            cell(numbers.get(workload.name, p, "step", "peak_extra_mb")) for p in (EAGER, own)
        ]
        if workload.kind == "pairs":
            label = f"all pairs of K={workload.groups}, D={workload.dims[0]}"
        else:
            label = f"{workload.name}: {sizes(workload)}"
        lines.append([label, *times, share(numbers, workload, own, 1), *memory])
    return (
        table(header, lines)
        + "\nForward + backward on one thread, medians of interleaved runs"
        + f"{memory_note(numbers)}. {numbers.provenance()}.\n\n{share_note(numbers, 1)}".rstrip()
        + "\n"
    )


def _comparison(numbers: Numbers, workloads: Iterable[Workload], mode: str, threads: int) -> str:
    own = numbers.own()
    names = (*PEERS, "cwbr reference", own)
    header = ["workload", *names, "eager ÷ it"] + ["of a ResNet-50 step"] * (mode == "step")
    lines = []
    for workload in workloads:
        rows = [numbers.get(workload.name, p, mode, "time_ms", threads) for p in names]
        if not any(rows):
            continue  # not measured yet
        mine = rows[-1]
        ratio = f"{1 / mine.ratio_to_eager:.3g}" if mine and mine.ratio_to_eager else ""
        shares = [share(numbers, workload, own, threads)] * (mode == "step")
        lines.append([workload.name, *map(cell, rows), ratio, *shares])
    return table(header, lines)


def _by_step_metric(numbers: Numbers, workloads: Iterable[Workload], metric: str) -> str:
    names = (*PEERS, "cwbr reference", numbers.own())
    cells = {
        w.name: [cell(numbers.get(w.name, p, "step", metric)) for p in names] for w in workloads
    }
    return table(["workload", *names], [[name, *row] for name, row in cells.items() if any(row)])


def beside_outputs(numbers: Numbers) -> str:
    """What a step of all pairs needs beside its inputs and its outputs, which are two gradients."""
    lines = []
    for workload in SWEEP:
        extra = numbers.median(workload.name, numbers.own(), "step", "peak_extra_mb")
        if extra is not None:
            outputs = 2 * 4 * workload.groups * sum(workload.dims) / 1e6
            amounts = (extra, outputs, extra - outputs)
            lines.append([workload.name, *(f"{amount:.1f} MB" for amount in amounts)])
    return table(["workload", "peak extra", "two gradients", "beside them"], lines)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The least-squares slope of log cost over log size: cost ~ size^exponent."""
    x, y = [math.log(s) for s in sizes], [math.log(c) for c in costs]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return covariance / sum((a - mean_x) ** 2 for a in x)


def growth(numbers: Numbers) -> str:
    """Fitted exponents of time and memory beside the largest that theory allows."""
    own, lines = numbers.own(), []
    for name, operation in operations.OPERATIONS.items():
        for size, values in operation.varied.items():
            cases = [operations.case_name(name, operation.base | {size: v}) for v in values]
            for mode, metric, theory in (
                ("forward", "time_ms", operation.time_theory[size]),
                ("backward", "time_ms", operation.time_theory[size]),
                ("step", "peak_extra_mb", operation.memory_theory[size]),
            ):
                costs = [numbers.median(case, own, mode, metric) for case in cases]
                known = [c for c in costs if c is not None and c > 0]
                if len(known) < len(values):
                    continue
                what = "memory" if metric == "peak_extra_mb" else f"time, {mode}"
                span = f"{values[0]} … {values[-1]}"
                lines.append(
                    [name, what, size, span, f"{exponent(values, known):.2f}", str(theory)]
                )
    return table(["operation", "cost", "in", "range", "exponent", "theory, at most"], lines)


def roofline(numbers: Numbers, threads: int) -> str:
    own, lines = numbers.own(), []
    for name, operation in operations.OPERATIONS.items():
        case = operations.case_name(name, operation.base)
        for mode in ("forward", "backward"):
            values = [
                numbers.median(case, own, mode, metric, threads)
                for metric in ("fma_slots_per_vector", "fraction_of_peak", "fraction_of_bandwidth")
            ]
            if any(value is not None for value in values):
                slots, of_peak, of_bandwidth = values
                shown = [
                    "" if slots is None else f"{slots:.1f}",
                    "" if of_peak is None else f"{100 * of_peak:.0f} %",
                    "" if of_bandwidth is None else f"{100 * of_bandwidth:.0f} %",
                ]
                lines.append([case, mode, *shown])
    header = ["kernel", "mode", "FMA slots per vector of pair·dims", "of peak", "of bandwidth"]
    return table(header, lines)


def roofline_note() -> str:
    forward, backward = operations.IDEAL_SLOTS.values()
    return (
        f"Of peak: {forward} slots forward and {backward} backward, the arithmetic of the formulas "
        "in a form that does not cancel, over the slots that were spent. Of bandwidth: the "
        "bytes that must be moved, at the speed of a triad on as many, over the time; for `plan` "
        "these are the logits, twice: at 100 % it is as fast as reading them two times.\n"
    )


def machine(numbers: Numbers, threads: int) -> str:
    def get(metric: str) -> str:
        value = numbers.median("machine", "measured", "machine", metric, threads)
        return "?" if value is None else f"{value:.3g}"

    return (
        f"Measured peak: {get('vector_gfma_per_s')} G FMA/s of {get('float_lanes')} floats, "
        f"triad of 1 GB: {get('triad_gb_per_s')} GB/s.\n"
    )


def two_threads(numbers: Numbers) -> str:
    """Time with one thread over that with two, beside what multiply-adds alone gain."""
    own = numbers.own()
    peak = numbers.median("machine", "measured", "machine", scaling.METRIC, 2)
    if peak is None:
        return "Not measured in turn.\n"
    lines = [["the machine's multiply-adds", f"{peak:.2f}", f"{peak:.2f}"]]
    for workload in scaling.WORKLOADS:
        gains = [
            numbers.median(workload.name, own, mode, scaling.METRIC, 2)
            for mode in ("forward", "step")
        ]
        if None not in gains:
            lines.append([workload.name, *(f"{gain:.2f}" for gain in gains)])
    return table(["one thread ÷ two, in turn", "forward", "forward + backward"], lines)


def training(numbers: Numbers) -> str:
    """ResNet-50 steps without and with a regularizer, and their time per image."""
    batches = {workload.name: workload.batch for workload in (resnet.SMALLER, resnet.LARGER)}
    lines = []
    for row in numbers.rows:
        if row.workload in batches and row.median is not None:
            image = row.median / 1e3 / batches[row.workload]
            lines.append(
                [row.workload, row.provider, str(row.threads), cell(row), f"{image:.3g} s"]
            )
    return table(["step", "regularizer", "threads", "time", "per image"], lines)


def report(numbers: Numbers) -> str:
    """Everything in the CSV, for people."""
    origin = f"{numbers.provenance()}{memory_note(numbers)}. Generated by `make plots`.\n"
    parts = ["# Benchmark results\n", origin]
    for threads in sorted({row.threads for row in numbers.rows}):
        for mode in ("forward", "step"):
            title = "forward" if mode == "forward" else "forward + backward"
            parts += [
                f"## Time, {title}, {threads} thread{'s' * (threads > 1)}\n",
                _comparison(numbers, (*REALISTIC, *SWEEP), mode, threads),
            ]
        parts.append(share_note(numbers, threads))
        parts += [
            f"## Roofline, {threads} thread{'s' * (threads > 1)}\n",
            machine(numbers, threads),
            roofline(numbers, threads),
            roofline_note(),
        ]
    parts += [
        f"## A second thread, {numbers.own()}\n",
        two_threads(numbers),
        "## Peak extra memory, forward + backward\n",
        _by_step_metric(numbers, (*REALISTIC, *SWEEP), "peak_extra_mb"),
        f"## Memory of all pairs beside inputs and outputs, {numbers.own()}\n",
        beside_outputs(numbers),
        "## Dispatcher calls or kernel launches, forward + backward\n",
        _by_step_metric(numbers, REALISTIC, "calls"),
        "## A training step of ResNet-50 (224 x 224, SGD, four layers)\n",
        training(numbers),
        "## How cost grows\n",
        growth(numbers),
    ]
    return "\n".join(parts)
