"""All measures of a classifier in one dictionary of plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cwbr_fused.diagnostics.arguments import (
    GRADIENTS,
    check_step,
    checked_gradients,
    checked_names,
    checked_pairs,
    checked_predictions,
    finite,
    finite_list,
)
from cwbr_fused.diagnostics.measures import linear_probe, pair_error_rate, top_confusing_pairs
from cwbr_fused.inputs import validation
from cwbr_fused.inputs.pooling import to_vec
from cwbr_fused.operations import backends, reference
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.overlap import loss
from cwbr_fused.overlap.adjustments import log_and_inverse_mean

SHOWN_CLASSES = 40  # of the confusion matrix


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
    backend: str = "auto",
) -> dict[str, Any]:
    """What a classifier confuses, and how well each layer separates it.

    The numbers are of the data given, as one batch: pass all outputs on a validation set. Class
    moments of few samples overstate the distance, so every layer has its `distance_floor`, the
    mean D that pairs of *identical* Gaussian classes with these sample counts would read; D means
    something where it is well above it.

    The Bhattacharyya bound: the best classifier that sees one layer alone takes the classes of a
    pair for each other at a rate of at most `sqrt(w_i w_j) rho`, with the class weights w
    normalized within the pair (Kailath 1967; Nielsen 2014, arXiv 1401.4788). It holds as far as
    the features are what rho takes them for: Gaussians with diagonal covariance and the measured
    moments. Few samples make it too small.

    Args:
        features: N samples' layer outputs by name, raw or pooled, as for `cwbr_fused.loss`.
        logits: (N, C).
        targets: (N,) integer classes.
        class_names: C names; without them classes go by number.
        count: how many of the most confused pairs.
        pairs: (M, 2) classes to report on instead, as from `top_confusing_pairs` on another set.
            The error rate of pairs picked on the same data falls by itself when the model is
            trained again.
        before: an earlier model's logits (N, C) or predictions (N,) for the same samples.
        train: features, by the same names, and targets of the samples to fit linear probes on.
        gradients: by layer, the norms `ce_norm` and `reg_norm` of the gradients of cross-entropy
            and regularizer at its output and their `cosine`. More keys are ignored.
        step: the training step, for a history of reports.
        top_m: pairs of the published regularizer behind `scale`.
        min_count: classes with fewer samples have no moments.
        eps, backend: see `cwbr_fused.loss`.

    Returns:
        Numbers, strings, lists and dictionaries that `json` can write; None where a number is
        undefined or not finite.

        - `step`, `samples`, `classes` (that occur), `accuracy`, `cross_entropy`
        - `regularizer`: `cwbr_fused.loss` of the data; `scale`: `cross_entropy / (regularizer +
          eps)`, the weight that `scale_match` gives it
        - `pairs_given`: whether `pairs` was; `error_rate`, `error_rate_before`: means over them
        - `pairs`: for each its `classes`, `names`, `samples` (of either class), `alpha`,
          `error_rate`, `error_rate_before` (see `pair_error_rate`), and `layers`: `distance` D,
          `rho` and `bayes_bound` by layer
        - `layers`: for each the means over pairs of `rho`, `distance`, `distance_per_dim`,
          `bayes_bound`; `distance_floor`; `underflow`, the share of pairs whose rho is 0 in
          float32 (the dictionary's is float64); `dims`; `probe`, the accuracy of `linear_probe`;
          `ce_norm`, `reg_norm`, `cosine`
        - `confusion`: of the `classes` in the first pairs, at most 40, with `names`,
          `mean_probs[k][j]`: the mean softmax of class j over the samples of class k

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(features, Mapping):
        described = validation.describe(features)
        raise TypeError(f"features: expected a mapping of tensors, got {described}")
    validation.check_options(top_m, eps, "overlap", min_count)
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
    sizes = targets.long().bincount(minlength=logits.shape[1])[pairs].cpu()
    options: dict[str, Any] = {"min_count": min_count, "eps": eps, "backend": backend}
    by_layer = {
        layer: _pair_measures(z, targets, pairs, sizes, **options) for layer, z in vectors.items()
    }

    dtype = reference.accumulation_dtype(logits.dtype)
    ce = float(cross_entropy(logits.to(dtype), targets.long()))
    reg = float(loss.loss(vectors, logits, targets, top_m=top_m, **options))
    return {
        "step": step,
        "samples": len(targets),
        "classes": len(targets.unique()),
        "accuracy": float((predictions == targets).double().mean()),
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
                "samples": sizes[m].tolist(),
                "alpha": alpha[m],
                "error_rate": rates[m],
                "error_rate_before": rates_before[m],
                "layers": {layer: _row(measures, m) for layer, measures in by_layer.items()},
            }
            for m, pair in enumerate(pairs.tolist())
        ],
        "layers": {
            layer: _layer(measures, sizes, min_count, vectors[layer].shape[1])
            | {"probe": probes.get(layer)}
            | measured.get(layer, dict.fromkeys(GRADIENTS))
            for layer, measures in by_layer.items()
        },
        "confusion": _confusion(pairs.tolist(), classes.tolist(), mean_probs, names),
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """Over those that are defined."""
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None


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
    z: Tensor,
    targets: Tensor,
    pairs: Tensor,
    sizes: Tensor,
    min_count: int,
    eps: float,
    backend: str,
) -> dict[str, Tensor]:
    """Distance, overlap and bound of each pair, (M,) float64; NaN without moments."""
    usable = (sizes >= min_count).all(1)
    operations = OPERATIONS[backends.resolve(backend, z.device.type)]
    order, offsets, classes = operations.group_by_class(targets, min_count)
    mean, var = operations.class_moments(z, order, offsets, eps)
    groups = torch.searchsorted(classes[classes >= 0], pairs[usable.to(pairs.device)])
    distance = torch.full((len(pairs),), torch.nan, dtype=torch.float64)
    distance[usable] = operations.pair_distance(mean, var, groups, eps).double().cpu()
    rho = distance.neg().exp()
    share = sizes / sizes.sum(1, keepdim=True).double()
    return {"distance": distance, "rho": rho, "bayes_bound": share.prod(1).sqrt() * rho}


def _row(measures: Mapping[str, Tensor], row: int) -> dict[str, float | None]:
    return {key: finite(values[row]) for key, values in measures.items()}


def _layer(
    measures: Mapping[str, Tensor], sizes: Tensor, min_count: int, dims: int
) -> dict[str, Any]:
    """Means over the pairs that have moments, of which `sizes` (M, 2) tells."""
    usable = (sizes >= min_count).all(1)
    means = {key: finite(values[usable].mean()) for key, values in measures.items()}
    distance = means["distance"]
    vanished = measures["distance"][usable].float().neg().exp() == 0
    return {
        "dims": dims,
        **means,
        "distance_per_dim": None if distance is None else distance / dims,
        "distance_floor": finite(dims * _floor_per_dim(sizes[usable]).mean()),
        "underflow": finite(vanished.double().mean()),
    }


def _floor_per_dim(sizes: Tensor) -> Tensor:
    """Expected D per dimension of identical Gaussian classes with (M, 2) samples, (M,) float64.

    In units of their variance, the measured ones are independent `chi2(n - 1) / n`, and the means
    differ by `1/n_i + 1/n_j` in the square. Infinite for two classes of two samples.
    """
    n_i, n_j = sizes.double().unbind(1)
    log_i, _ = log_and_inverse_mean((1 / n_i, n_i - 1))
    log_j, _ = log_and_inverse_mean((1 / n_j, n_j - 1))
    log_s, inverse_s = log_and_inverse_mean((0.5 / n_i, n_i - 1), (0.5 / n_j, n_j - 1))
    floor = (1 / n_i + 1 / n_j) / 8 * inverse_s + log_s / 2 - (log_i + log_j) / 4
    return torch.where((sizes > 1).all(1) & (sizes.sum(1) > 4), floor, torch.inf)


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
