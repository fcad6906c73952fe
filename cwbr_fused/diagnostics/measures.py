"""The single measures: confusing pairs and their errors, overlaps of layers, linear probes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cwbr_fused.inputs import validation
from cwbr_fused.operations import backends, reference
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.overlap import functional


@torch.no_grad()
def layer_overlaps(
    features: Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    *,
    top_m: int | None = 64,
    min_count: int = 2,
    eps: float = 1e-6,
    backend: str = "auto",
) -> dict[str, Tensor]:
    """Mean overlap `rho = exp(-D)` of the most confused pairs of classes, for each layer.

    The pairs, and what they are measured by, are those of `cwbr_fused.loss`; every pair counts the
    same. A whole dataset may be passed as one batch: memory grows with the square of the number of
    classes, not of samples.

    Args:
        features: raw layer outputs by name, as for `cwbr_fused.loss`.
        logits: (B, C).
        targets: (B,) integer classes.
        top_m, min_count, eps, backend: see `cwbr_fused.loss`.

    Returns:
        A scalar for each layer, in [0, 1]; NaN with fewer than two usable classes.

    Raises:
        TypeError, ValueError: as `cwbr_fused.loss`.
    """
    if not isinstance(features, Mapping):
        raise TypeError(
            f"features: expected a mapping of tensors, got {validation.describe(features)}"
        )
    validation.check_options(top_m, eps, "overlap", min_count)
    validation.check_batch(logits, targets)
    vectors = validation.feature_vectors(features, logits)
    name = backends.resolve(backend, logits.device.type)
    operations = OPERATIONS[name]

    order, offsets, classes = operations.group_by_class(targets, min_count)
    used = int((classes != -1).sum())
    offsets, classes = offsets[: used + 1], classes[:used]
    alpha = operations.confusion_weights(logits, order, offsets, classes)
    pairs, _ = operations.top_pairs(alpha, top_m or max(1, used * (used - 1) // 2))
    overlaps = {}
    for layer, z in zip(features, vectors, strict=True):
        mean, var = operations.class_moments(z, order, offsets, eps)
        overlaps[layer] = operations.pair_distance(mean, var, pairs, eps).neg().exp().mean()
    return overlaps


@torch.no_grad()
def top_confusing_pairs(logits: Tensor, targets: Tensor, count: int = 20) -> tuple[Tensor, Tensor]:
    """The pairs of classes that lend each other most softmax mass over a dataset.

    The confusion of i and j is `(P[i, j] + P[j, i]) / 2`, with `P[i, j]` the mean of
    `softmax(logits)[:, j]` over the samples of class i.

    Args:
        logits: (N, C); of probabilities pass the logarithm.
        targets: (N,) integer classes.
        count: how many pairs.

    Returns:
        pairs: (M, 2) int64 classes i < j, M = min(count, K (K - 1) / 2) with K classes in
            `targets`; by falling confusion, ties to the smaller (i, j).
        confusion: (M,).
    """
    validation.check_batch(logits, targets)
    validation.check_positive_int("count", count)
    classes, inverse = targets.unique(return_inverse=True)
    alpha = functional.confusion_alpha(logits, targets, classes.long(), inverse)
    pairs, confusion = reference.top_pairs(alpha, count)
    return classes.long()[pairs], confusion


def check_pairs(pairs: object) -> None:
    """(M, 2) integer classes."""
    if not isinstance(pairs, Tensor) or pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"pairs: expected shape (M, 2), got {validation.describe(pairs)}")
    validation.check_index_tensor("pairs", pairs.flatten(), None, "(M, 2)")


def pair_error_rate(predictions: Tensor, targets: Tensor, pairs: Tensor) -> Tensor:
    """How often the classes of each pair are taken for each other.

    Of the samples of class i or j, the share that is predicted as the other one of the two.

    Args:
        predictions, targets: (N,) integer classes.
        pairs: (M, 2) integer classes, from `top_confusing_pairs`.

    Returns:
        (M,) float32 in [0, 1]; NaN for pairs without a sample.
    """
    validation.check_index_tensor("predictions", predictions, None, "(N,)")
    length = predictions.shape[0]
    validation.check_index_tensor(
        "targets", targets, length, f"(N,) = ({length},), as predictions has"
    )
    check_pairs(pairs)
    i, j = pairs.unbind(1)
    is_i, is_j = targets == i[:, None], targets == j[:, None]
    swapped = (is_i & (predictions == j[:, None])) | (is_j & (predictions == i[:, None]))
    return swapped.sum(1) / (is_i | is_j).sum(1)


@torch.no_grad()
def linear_probe(
    train_features: Tensor,
    train_targets: Tensor,
    test_features: Tensor,
    test_targets: Tensor,
    *,
    ridge: float = 1e-3,
) -> float:
    """Test accuracy of a linear classifier on frozen features: how far a layer separates classes.

    Ridge regression onto one-hot targets with an intercept, on features standardized by the
    training set, in closed form and float64: `W = (X'X/N + ridge I)^-1 X'(Y - mean(Y))/N`, no
    random start and nothing to tune. It reads lower than a logistic probe trained to convergence,
    above all on early layers; compare it with itself only.

    Args:
        train_features, test_features: (N, D) and (N', D) pooled features, see `cwbr_fused.to_vec`.
        train_targets, test_targets: (N,) and (N',) integer classes.
        ridge: penalty, relative to the unit variance of the features.

    Returns:
        The share of test samples classified right, in [0, 1].
    """
    for name, x, y in (
        ("train", train_features, train_targets),
        ("test", test_features, test_targets),
    ):
        validation.check_float_tensor(f"{name}_features", x, "(N, D)")
        what = f"(N,) = ({x.shape[0]},), as {name}_features has"
        validation.check_index_tensor(f"{name}_targets", y, x.shape[0], what)
        if x.shape[0] == 0:
            raise ValueError(f"{name}_features: expected at least one sample, got none")
    if test_features.shape[1] != train_features.shape[1]:
        raise ValueError(
            f"test_features: expected D = {train_features.shape[1]}, as train_features has, "
            f"got {validation.describe(test_features)}"
        )
    if ridge <= 0:
        raise ValueError(f"ridge: expected a number > 0, got {ridge!r}")
    x, x_test = train_features.double(), test_features.double()
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1)
    x, x_test = (x - mean) / std, (x_test - mean) / std

    classes, inverse = train_targets.unique(return_inverse=True)
    samples, dims = x.shape
    # X is centred, so X'(Y - mean(Y)) = X'Y: the sum of the features of each class.
    class_sums = x.new_zeros(len(classes), dims).index_add(0, inverse, x)
    penalized = x.T @ x / samples + ridge * torch.eye(dims, dtype=x.dtype, device=x.device)
    weights = torch.linalg.solve(penalized, class_sums.T / samples)
    intercept = inverse.bincount(minlength=len(classes)) / samples
    predictions = classes[(x_test @ weights + intercept).argmax(1)]
    return float((predictions == test_targets).double().mean())
