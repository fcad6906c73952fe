"""The arguments of a report, checked, and its numbers, made plain."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from cwbr_fused.diagnostics.content import Report
from cwbr_fused.diagnostics.measures import check_pairs
from cwbr_fused.inputs import validation

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


def checked_names(class_names: Sequence[str] | None, classes: int) -> Sequence[str]:
    """One name for each of C classes; their numbers where none are given."""
    if class_names is None:
        return [str(k) for k in range(classes)]
    check_names(class_names)
    if len(class_names) != classes:
        raise ValueError(
            f"class_names: expected C = {classes} names, as logits has columns, "
            f"got {len(class_names)}"
        )
    return class_names


def check_names(class_names: object) -> None:
    """A sequence of strings that is not itself a string."""
    if (
        not isinstance(class_names, Sequence)
        or isinstance(class_names, str)
        or not all(isinstance(name, str) for name in class_names)
    ):
        raise TypeError(
            f"class_names: expected a sequence of strings, got {type(class_names).__name__}"
        )


def check_step(name: str, step: object, required: bool = False) -> None:
    """An int >= 0, or None where it is not required."""
    if step is None and not required:
        return
    if not isinstance(step, int) or isinstance(step, bool) or step < 0:
        raise ValueError(f"{name}: expected an int >= 0, got {validation.describe(step)}")


def checked_pairs(pairs: Tensor, logits: Tensor) -> Tensor:
    """(M, 2) int64 pairs of different classes, on the device of the logits."""
    check_pairs(pairs)
    columns = logits.shape[1]
    validation.check_range("pairs", pairs, 0, columns, "as logits has C = {high} columns")
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
    """Norms and cosine of each layer, as plain numbers."""
    if gradients is None:
        return {}
    if not isinstance(gradients, Mapping):
        raise TypeError(
            f"gradients: expected a mapping from layers, got {validation.describe(gradients)}"
        )
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
    return {
        layer: {key: finite(measured[key]) for key in GRADIENTS}
        for layer, measured in gradients.items()
    }


def checked_history(report: object) -> list[Report]:
    """The reports in order of their steps."""
    if isinstance(report, Mapping):
        check_report("report", report)
        return [report]
    if not isinstance(report, Sequence) or isinstance(report, str):
        described = validation.describe(report)
        raise TypeError(f"report: expected a dictionary or a sequence of those, got {described}")
    if not report:
        raise ValueError("report: expected at least one, got an empty sequence")
    for index, entry in enumerate(report):
        check_report(f"report[{index}]", entry)
        check_step(f"report[{index}]['step']", entry["step"], required=len(report) > 1)
        if index > 0 and entry["step"] <= report[index - 1]["step"]:
            raise ValueError(
                f"report[{index}]['step']: expected more than the one before it, "
                f"{report[index - 1]['step']}, got {entry['step']}"
            )
    return list(report)


def check_report(name: str, report: object) -> None:
    """A dictionary with the keys of a report."""
    if not isinstance(report, Mapping):
        raise TypeError(f"{name}: expected a dictionary, got {type(report).__name__}")
    missing = KEYS - set(report)
    if missing:
        raise ValueError(
            f"{name}: expected what cwbr_fused.diagnostics.report returns, "
            f"got a dictionary without {sorted(missing)}"
        )


def shown_names(report: Report, class_names: Sequence[str] | None) -> dict[int, str]:
    """The name of each class that the report shows."""
    entries = [*report["pairs"], report["confusion"]]
    names = {
        k: name
        for entry in entries
        for k, name in zip(entry["classes"], entry["names"], strict=True)
    }
    if class_names is None:
        return names
    check_names(class_names)
    if len(class_names) <= max(names, default=0):
        raise ValueError(
            f"class_names: expected a name for each class up to {max(names)}, "
            f"got {len(class_names)} names"
        )
    return {k: class_names[k] for k in names}
