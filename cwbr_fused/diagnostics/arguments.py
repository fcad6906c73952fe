"""The arguments of reports, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from cwbr_fused.diagnostics.measures import check_pairs
from cwbr_fused.inputs import validation

Report = Mapping[str, Any]
# The reports of each method in the order of their steps; a method without a name is "".
Histories = dict[str, list[Report]]
GRADIENTS = ("ce_norm", "reg_norm", "cosine")
KEYS = {
    *("step", "samples", "classes", "accuracy", "cross_entropy", "regularizer", "scale"),
    *("pairs_given", "error_rate", "error_rate_before", "pairs", "layers", "confusion"),
}


def finite(value: float | Tensor | None) -> float | None:
    """A plain number; None in place of None, NaN and the infinities, which JSON has not."""
    return None if value is None or not math.isfinite(value) else float(value)


def finite_list(values: Tensor) -> list[float | None]:
    """`finite` of each of (M,) values."""
    return [finite(value) for value in values.tolist()]


def checked_names(class_names: object, classes: int) -> Sequence[str]:
    """A name for each of C classes; their numbers where none are given."""
    if class_names is None:
        return [str(k) for k in range(classes)]
    if (
        not isinstance(class_names, Sequence)
        or isinstance(class_names, str)
        or not all(isinstance(name, str) for name in class_names)
    ):
        described = type(class_names).__name__
        raise TypeError(f"class_names: expected a sequence of strings, got {described}")
    if len(class_names) != classes:
        raise ValueError(
            f"class_names: expected C = {classes} names, as logits has columns, "
            f"got {len(class_names)}"
        )
    return class_names


def check_step(name: str, step: object, required: bool = False) -> None:
    """An int >= 0, or None where it is not required."""
    if step is None and not required:
        return
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{name}: expected an int >= 0, got {validation.describe(step)}")


def checked_pairs(pairs: Tensor, logits: Tensor) -> Tensor:
    """(M, 2) int64 pairs of different classes, on the device of the logits."""
    check_pairs(pairs)
    validation.check_range("pairs", pairs, 0, logits.shape[1], "as logits has C = {high} columns")
    if bool((pairs[:, 0] == pairs[:, 1]).any()):
        raise ValueError("pairs: expected two different classes in each, got one with itself")
    return pairs.to(logits.device).long()


def checked_predictions(before: object, targets: Tensor) -> Tensor | None:
    """The classes that an earlier model predicted, from those or its logits."""
    if before is None:
        return None
    what = "(N,) or (N, C) with N = {n}, as targets has"
    if isinstance(before, Tensor) and before.dim() == 2 and before.dtype.is_floating_point:
        before = before.argmax(1)
    validation.check_index_tensor("before", before, targets.shape[0], what)
    assert isinstance(before, Tensor)
    return before.to(targets.device)


def checked_gradients(
    gradients: object, features: Mapping[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """Norms, cosine and share of each layer of features, as plain numbers."""
    if gradients is None:
        gradients = {}
    if not isinstance(gradients, Mapping):
        described = validation.describe(gradients)
        raise TypeError(f"gradients: expected a mapping from layers, got {described}")
    numbers: dict[str, dict[str, float | None]] = {
        layer: dict.fromkeys((*GRADIENTS, "share")) for layer in features
    }
    for layer, measured in gradients.items():
        if layer not in features:
            raise ValueError(
                f"gradients: expected layers of features, {list(features)}, got {layer!r}"
            )
        if not isinstance(measured, Mapping) or any(key not in measured for key in GRADIENTS):
            raise ValueError(
                f"gradients[{layer!r}]: expected a mapping with the keys {GRADIENTS}, "
                f"got {validation.describe(measured)}"
            )
        loss, added, cosine = (finite(measured[key]) for key in GRADIENTS)
        share = added / loss if loss and added is not None else None
        numbers[layer] = {"ce_norm": loss, "reg_norm": added, "cosine": cosine, "share": share}
    return numbers


def check_report(name: str, report: object) -> None:
    """What `cwbr_fused.diagnostics.report` returns."""
    if not isinstance(report, Mapping):
        got = type(report).__name__
        raise TypeError(f"{name}: expected a report of cwbr_fused.diagnostics, got {got}")
    if missing := sorted(KEYS - set(report)):
        raise ValueError(f"{name}: expected a report of cwbr_fused.diagnostics, got no {missing}")


def checked_histories(report: object) -> Histories:
    """The reports of each method."""
    by_method = isinstance(report, Mapping) and not KEYS & set(report)
    methods = report if by_method and isinstance(report, Mapping) else {"": report}
    histories: Histories = {}
    for method, of_method in methods.items():
        name = f"report[{method!r}]" if by_method else "report"
        if isinstance(of_method, str) or not isinstance(of_method, (Mapping, Sequence)):
            described = validation.describe(of_method)
            raise TypeError(f"{name}: expected a report or a sequence of reports, got {described}")
        if not of_method:
            raise ValueError(f"{name}: expected at least one report, got an empty sequence")
        history = [of_method] if isinstance(of_method, Mapping) else list(of_method)
        before = -1
        for index, entry in enumerate(history):
            label = f"{name}[{index}]" if len(history) > 1 else name
            check_report(label, entry)
            check_step(f"{label}['step']", entry["step"], required=len(history) > 1)
            if len(history) > 1 and entry["step"] <= before:
                raise ValueError(
                    f"{label}['step']: expected more than the step before, {before}, "
                    f"got {entry['step']}"
                )
            before = entry["step"]
        histories[str(method)] = history
    if not histories:
        raise ValueError("report: expected at least one report, got an empty mapping")
    return histories


def shown_names(report: Report) -> dict[int, str]:
    """The name of each class that the report shows."""
    entries = [*report["pairs"], report["confusion"]]
    return {k: n for e in entries for k, n in zip(e["classes"], e["names"], strict=True)}
