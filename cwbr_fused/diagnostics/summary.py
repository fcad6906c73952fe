"""All measures of a classifier in one dictionary of plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cwbr_fused.diagnostics.arguments import (
    check_step,
    checked_gradients,
    checked_names,
    checked_pairs,
    checked_predictions,
    finite,
    finite_list,
)
from cwbr_fused.diagnostics.measures import (
    check_mapping,
    linear_probe,
    pair_error_rate,
    separation,
    top_confusing_pairs,
)
from cwbr_fused.inputs import validation
from cwbr_fused.inputs.pooling import to_vec
from cwbr_fused.operations import backends, reference
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.operations.backends import Backend
from cwbr_fused.overlap import loss
from cwbr_fused.overlap.options import OverlapOptions

PAIR_KEYS = ("separation", "overlap", "distance", "rho")
SHOWN_CLASSES = 40  # of the confusion matrix
FLOAT32_ZERO = 2.0**-150  # what float32 rounds to 0


@torch.no_grad()
def report(
    features: Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    *,
    class_names: Sequence[str] | None = None,
    count: int = 20,
    pairs: Tensor | None = None,
    before: Tensor | None = None,
    train: tuple[Mapping[str, Tensor], Tensor] | None = None,
    gradients: Mapping[str, Mapping[str, float | None]] | None = None,
    step: int | None = None,
    top_m: int | None = 64,
    min_count: int = 2,
    eps: float = 1e-6,
    backend: Backend = "auto",
) -> dict[str, Any]:
    """What a classifier confuses, and how well each layer separates it.

    The numbers are of the data given, as one batch: pass all outputs on a validation set.

    Args:
        features: N samples' layer outputs by name, raw or pooled, as for `cwbr_fused.loss`.
        logits: (N, C).
        targets: (N,) integer classes.
        class_names: C names; without them the report shows class numbers.
        count: how many of the most confused pairs.
        pairs: (M, 2) classes to report on instead, as from `top_confusing_pairs` on another set.
            The error rate of pairs picked on the same data falls by itself when the model is
            trained again.
        before: an earlier model's logits (N, C) or predictions (N,) for the same samples.
        train: features, by the same names, and targets of the samples to fit linear probes on.
        gradients: `CWBR.health()`, or by layer the norms `ce_norm` of the loss's gradient at its
            output and `reg_norm` of what was added to it, and their `cosine`. Other keys are
            ignored.
        step: the training step, for a history of reports.
        top_m: pairs of the published regularizer behind `scale`.
        min_count: smallest class of which the published form takes moments.
        eps, backend: see `cwbr_fused.loss`.

    Returns:
        Numbers, strings, lists and dictionaries that `json` can write; None where a number is
        undefined or not finite.

        - `step`, `samples`, `classes` (that occur), `accuracy`, `cross_entropy`
        - `pairs_given`: whether `pairs` was; `error_rate`, `error_rate_before`: means over them
        - `pairs`: for each its `classes`, `names`, `samples` (of either class), `alpha`,
          `error_rate`, `error_rate_before` (see `pair_error_rate`), and by layer, in `layers`:
          `separation` (see `layer_separations`), `overlap = exp(-separation)`, and of the published
          form `distance` D and `rho = exp(-D)`
        - `layers`: for each its `dims`; the means over pairs of `separation`, `distance` and
          `rho`, and `overlap` of the mean separation; `underflow`, the share of pairs whose rho is
          0 in float32 (the dictionary's is float64); `probe`, the accuracy of `linear_probe`;
          `ce_norm`, `reg_norm`, `cosine`, and `share = reg_norm / ce_norm`
        - `confusion`: of the `classes` in the first pairs, at most 40, with `names`,
          `mean_probs[k][j]`: the mean softmax of class j over the samples of class k
        - of the published form `regularizer`: `cwbr_fused.loss` of the data; `scale`:
          `cross_entropy / (regularizer + eps)`, the weight that `scale_match` gives it

    Raises:
        TypeError, ValueError: naming the argument.
    """
    check_mapping(features)
    OverlapOptions(top_m, min_count, eps).check()
    validation.check_batch(logits, targets)
    if len(targets) == 0:
        raise ValueError("logits: expected at least one sample, got none")
    vectors = dict(zip(features, validation.feature_vectors(features, logits), strict=True))
    names = checked_names(class_names, logits.shape[1])
    check_step("step", step)
    measured = checked_gradients(gradients, features)
    earlier = checked_predictions(before, targets)
    probes = _probes(train, vectors, targets)
    given = pairs is not None
    if pairs is None:
        pairs, _ = top_confusing_pairs(logits, targets, count)
    pairs = checked_pairs(pairs, logits)

    predictions = logits.argmax(1)
    rates = finite_list(pair_error_rate(predictions, targets, pairs))
    rates_before: list[float | None] = [None] * len(pairs)
    if earlier is not None:
        rates_before = finite_list(pair_error_rate(earlier, targets, pairs))
    classes = pairs.unique()
    mean_probs = _mean_probs(logits, targets, classes)
    i, j = torch.searchsorted(classes, pairs.T.contiguous())
    alpha = finite_list((mean_probs[i, j] + mean_probs[j, i]) / 2)
    sizes = targets.long().bincount(minlength=logits.shape[1])[pairs].tolist()
    options: dict[str, Any] = {"min_count": min_count, "eps": eps, "backend": backend}
    by_layer = {layer: _pair_measures(z, targets, pairs, **options) for layer, z in vectors.items()}

    dtype = reference.accumulation_dtype(logits.dtype)
    ce = float(cross_entropy(logits.to(dtype), targets.long()))
    reg = float(loss.loss(vectors, logits, targets, top_m=top_m, **options))
    return {
        "step": step,
        "samples": len(targets),
        "classes": len(targets.unique()),
        "accuracy": int((predictions == targets).sum()) / len(targets),
        "cross_entropy": finite(ce),
        "regularizer": finite(reg),
        "scale": finite(ce / (reg + eps)),
        "pairs_given": given,
        "error_rate": _mean(rates),
        "error_rate_before": _mean(rates_before),
        "pairs": [
            {
                "classes": pair,
                "names": [names[k] for k in pair],
                "samples": sizes[m],
                "alpha": alpha[m],
                "error_rate": rates[m],
                "error_rate_before": rates_before[m],
                "layers": {layer: _plain(rows[m]) for layer, rows in by_layer.items()},
            }
            for m, pair in enumerate(pairs.tolist())
        ],
        "layers": {
            layer: {
                "dims": vectors[layer].shape[1],
                **_layer(rows),
                "probe": probes.get(layer),
                **measured[layer],
            }
            for layer, rows in by_layer.items()
        },
        "confusion": _confusion(pairs.tolist(), classes.tolist(), mean_probs, names),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Over those that are defined."""
    defined = [value for value in values if value is not None]
    return fmean(defined) if defined else None


def _probes(train: object, vectors: Mapping[str, Tensor], targets: Tensor) -> dict[str, float]:
    """Accuracy of a linear probe of each layer that `train` has features of."""
    if train is None:
        return {}
    if not isinstance(train, Sequence) or len(train) != 2 or not isinstance(train[0], Mapping):
        raise TypeError(
            "train: expected a pair of a mapping of features and their targets, "
            f"got {type(train).__name__}"
        )
    features, train_targets = train
    if set(features) != set(vectors):
        raise ValueError(
            f"train: expected the layers of features, {list(vectors)}, got {list(features)}"
        )
    try:
        return {
            layer: linear_probe(to_vec(features[layer]), train_targets, z, targets)
            for layer, z in vectors.items()
        }
    except (TypeError, ValueError) as error:
        raise type(error)(f"train: {error}") from error


def _mean_probs(logits: Tensor, targets: Tensor, classes: Tensor) -> Tensor:
    """Mean softmax of each of K classes over each one's samples, (K, K); NaN without samples."""
    chosen = torch.isin(targets, classes)
    inverse = torch.searchsorted(classes, targets[chosen].long())
    order, offsets = reference.groups_of_inverse(inverse, len(classes))
    probs = reference.mean_probs(logits[chosen], order, offsets, classes)
    return torch.where(offsets.diff()[:, None] > 0, probs, torch.nan)


def _pair_measures(
    z: Tensor, targets: Tensor, pairs: Tensor, min_count: int, eps: float, backend: str
) -> list[dict[str, float] | None]:
    """The numbers of a layer for each pair; None for pairs whose classes have no moments."""
    operations = OPERATIONS[backends.resolve(backend, z.device.type)]
    order, offsets, classes = operations.group_by_class(targets, max(min_count, 2))
    used = int((classes != -1).sum())
    offsets, classes = offsets[: used + 1], classes[:used]
    usable = torch.isin(pairs, classes).all(1)
    groups = torch.searchsorted(classes, pairs[usable])
    mean, var = operations.class_moments(z, order, offsets, 0.0)
    distances = operations.pair_distance(mean, var.clamp(min=eps), groups, eps).tolist()
    separations = separation(mean, var, offsets.diff(), groups).tolist()
    rows = (
        {"separation": s, "overlap": math.exp(-s), "distance": d, "rho": math.exp(-d)}
        for s, d in zip(separations, distances, strict=True)
    )
    return [next(rows) if pair_usable else None for pair_usable in usable.tolist()]


def _plain(row: Mapping[str, float] | None) -> dict[str, float | None]:
    return {key: None if row is None else finite(row[key]) for key in PAIR_KEYS}


def _layer(rows: Sequence[Mapping[str, float] | None]) -> dict[str, float | None]:
    """Means over the pairs that have moments."""
    usable = [row for row in rows if row is not None]
    if not usable:
        return dict.fromkeys((*PAIR_KEYS, "underflow"))
    means = {key: fmean(row[key] for row in usable) for key in PAIR_KEYS}
    means["overlap"] = math.exp(-means["separation"])
    vanished = fmean(row["rho"] <= FLOAT32_ZERO for row in usable)
    return {**_plain(means), "underflow": None if math.isnan(means["rho"]) else vanished}


def _confusion(
    pairs: list[list[int]], classes: list[int], mean_probs: Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """The matrix of the classes of the first pairs, the classes of a pair side by side."""
    shown: list[int] = []
    for i, j in pairs:
        if len({*shown, i, j}) > SHOWN_CLASSES:
            break
        if i not in shown and j not in shown:
            shown += [i, j]
        elif j not in shown:
            shown.insert(shown.index(i) + 1, j)
        elif i not in shown:
            shown.insert(shown.index(j) + 1, i)
    place = [classes.index(k) for k in shown]
    return {
        "classes": shown,
        "names": [names[k] for k in shown],
        "mean_probs": [finite_list(row) for row in mean_probs[place][:, place]],
    }
