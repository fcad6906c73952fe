"""What was measured of each training, and the differences between methods."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cwbr_fused.diagnostics import pair_error_rate
from fgvc.evaluation import SCORES, Evaluation
from fgvc.log import Row
from fgvc.packages import require

RESULT = "result.pt"


class Result(NamedTuple):
    """One method, trained with one seed."""

    evaluation: Evaluation
    history: list[Row]
    training_seconds: float
    method_seconds: float


# By method, one for each seed, the same seeds for all.
Results = Mapping[str, Sequence[Result]]


def write_result(result: Result, folder: Path) -> None:
    torch.save(result._asdict() | {"evaluation": result.evaluation._asdict()}, folder / RESULT)


def read_result(folder: Path) -> Result:
    stored = torch.load(folder / RESULT, weights_only=True)
    return Result(Evaluation(**stored.pop("evaluation")), **stored)


class Metric(NamedTuple):
    """A line of the table: for each method its values, one for each seed."""

    name: str
    unit: str
    values: list[list[float]]


class Difference(NamedTuple):
    """The mean of paired differences, and half its 95 % interval: NaN where that is unknown."""

    mean: float
    half: float

    @property
    def sign(self) -> int:
        """1 or -1 where the interval leaves 0 out, else 0."""
        if math.isnan(self.half) or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def paired_difference(values: Sequence[float], base: Sequence[float]) -> Difference:
    """Over seeds, by Student's t distribution: the same seed starts and draws the same."""
    differences = [v - b for v, b in zip(values, base, strict=True)]
    mean, count = statistics.fmean(differences), len(differences)
    if count < 2:
        return Difference(mean, math.nan)
    quantile = float(require("scipy.stats", "--seeds").t.ppf(0.975, count - 1))
    return Difference(mean, quantile * statistics.stdev(differences) / math.sqrt(count))


def image_difference(run: Evaluation, base: Evaluation) -> Difference:
    """Of two models in points of top-1 accuracy, over the test images: each is right or wrong
    under both."""
    gain = 100 * (run.correct.double() - base.correct.double())
    return Difference(float(gain.mean()), 1.96 * float(gain.std()) / math.sqrt(len(gain)))


def metrics(results: Results) -> list[Metric]:
    """Every line of the table. The confusing pairs of a seed are the first method's."""
    first = next(iter(results.values()))

    def line(name: str, unit: str, values: Sequence[Sequence[float]]) -> Metric:
        return Metric(name, unit, [list(v) for v in values])

    runs = list(results.values())
    evaluations = [[run.evaluation for run in seeds] for seeds in runs]
    lines = [
        line(title, "%", [[100 * e.scores[key] for e in seeds] for seeds in evaluations])
        for key, title in SCORES.items()
    ]
    errors = [
        [_error_rate(e, base.evaluation) for e, base in zip(seeds, first, strict=True)]
        for seeds in evaluations
    ]
    pairs = len(first[0].evaluation.pairs)
    lines.append(line(f"error rate, {pairs} confusing pairs", "%", errors))
    for layer in first[0].evaluation.distances:
        values = [[e.distances[layer] for e in seeds] for seeds in evaluations]
        lines.append(line(f"distance, {layer}", "", values))
    for layer in first[0].evaluation.probes:
        values = [[100 * e.probes[layer] for e in seeds] for seeds in evaluations]
        lines.append(line(f"linear probe accuracy, {layer}", "%", values))
    spent = [[r.method_seconds for r in seeds] for seeds in runs]
    shares = [[100 * r.method_seconds / r.training_seconds for r in seeds] for seeds in runs]
    return [
        *lines,
        line("training time", "s", [[r.training_seconds for r in seeds] for seeds in runs]),
        line("of it in the regularizer", "s", spent),
        line("regularizer's share of the time", "%", shares),
    ]


def _error_rate(run: Evaluation, base: Evaluation) -> float:
    rates = pair_error_rate(run.predictions, run.targets, base.pairs)
    return 100 * float(rates.nanmean())


def write_csv(results: Results, seeds: Sequence[int], path: Path) -> None:
    """A line for each metric and seed, a column for each method."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["metric", "unit", "seed", *results])
        for name, unit, values in metrics(results):
            for k, seed in enumerate(seeds):
                writer.writerow([name, unit, seed, *(method[k] for method in values)])
