"""The single measures: confusing pairs and their errors, distances of layers, linear probes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from cwbr_fused.inputs import validation
from cwbr_fused.operations import backends, reference
from cwbr_fused.operations.autograd import OPERATIONS
from cwbr_fused.operations.backends import Backend
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
    backend: Backend = "auto",
) -> dict[str, Tensor]:
    """Mean overlap `rho = exp(-D)` of the most confused pairs of classes, for each layer.

    The pairs and D are those of `cwbr_fused.loss`; every pair has the same weight. On layers with
    many dimensions rho is 0 in float32 from the start: `layer_separations` is the measure to watch
    there. A whole dataset may be passed as one batch: memory grows with the square of the number of
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
    validation.check_eps(eps)
    validation.check_positive_int("min_count", min_count)
    name = _checked_backend(features, logits, targets, top_m, backend)

    def overlap(mean: Tensor, var: Tensor, counts: Tensor, pairs: Tensor) -> Tensor:
        distance: Tensor = OPERATIONS[name].pair_distance(mean, var.clamp(min=eps), pairs, eps)
        return distance.neg().exp()

    return _of_confused_pairs(overlap, features, logits, targets, top_m, min_count, name)


@torch.no_grad()
def layer_separations(
    features: Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    *,
    top_m: int | None = 64,
    backend: Backend = "auto",
) -> dict[str, Tensor]:
    """Mean distance per dimension of the most confused pairs of classes, for each layer.

    The Bhattacharyya distance of two classes that share the variance V within the classes of a
    layer is `|mean_i - mean_j|^2_V / 8`. This is its mean over the dimensions, without what the
    sampling noise of the means adds to it: `(mean_i - mean_j)^2` is reduced by its expectation for
    classes with equal means, `s_i^2/n_i + s_j^2/n_j`. Unlike rho it neither underflows on wide
    layers nor depends on the number of samples. `exp` of its negative is the overlap of the pair
    in an average dimension.

    Args:
        features, logits, targets, top_m, backend: see `layer_overlaps`.

    Returns:
        A scalar for each layer: 0 for classes with equal means, below 0 by chance alone; NaN with
        fewer than two classes of at least two samples.

    Raises:
        TypeError, ValueError: as `cwbr_fused.loss`.
    """
    name = _checked_backend(features, logits, targets, top_m, backend)
    return _of_confused_pairs(separation, features, logits, targets, top_m, 2, name)


def _checked_backend(
    features: object, logits: Tensor, targets: object, top_m: object, backend: str
) -> str:
    """The backend for arguments that are as they should be."""
    check_mapping(features)
    validation.check_batch(logits, targets)
    if top_m is not None:
        validation.check_positive_int("top_m", top_m, " or None for all pairs")
    return backends.resolve(backend, logits.device.type)


def _of_confused_pairs(
    measure: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    features: Mapping[str, Tensor],
    logits: Tensor,
    targets: Tensor,
    top_m: int | None,
    min_count: int,
    backend: str,
) -> dict[str, Tensor]:
    """The mean over pairs of `measure` of the class moments of each layer."""
    vectors = validation.feature_vectors(features, logits)
    operations = OPERATIONS[backend]
    order, offsets, classes = operations.group_by_class(targets, min_count)
    used = int((classes != -1).sum())
    offsets, classes = offsets[: used + 1], classes[:used]
    alpha = operations.confusion_weights(logits, order, offsets, classes)
    pairs, _ = operations.top_pairs(alpha, top_m or max(1, used * (used - 1) // 2))
    moments = [operations.class_moments(z, order, offsets, 0.0) for z in vectors]
    means = [measure(mean, var, offsets.diff(), pairs).mean() for mean, var in moments]
    return dict(zip(features, means, strict=True))


def separation(mean: Tensor, var: Tensor, counts: Tensor, pairs: Tensor) -> Tensor:
    """The distance of `layer_separations` for each pair.

    Args:
        mean, var: (K, D) biased moments of the classes.
        counts: (K,) samples of each class, at least 2.
        pairs: (M, 2) rows of mean.

    Returns:
        (M,) in the dtype of mean; NaN where no dimension varies within the classes.
    """
    freedom = (counts - 1)[:, None]
    noise = var / freedom  # of a class mean, squared: the unbiased variance over the samples
    within = (var * counts[:, None]).sum(0) / freedom.sum()
    varying = within != 0
    i, j = pairs.unbind(1)
    excess = (mean[i] - mean[j]) ** 2 - noise[i] - noise[j]
    return (excess[:, varying] / within[varying]).mean(1) / 8


def check_mapping(features: object) -> None:
    """A mapping of layers."""
    if not isinstance(features, Mapping):
        raise TypeError(
            f"features: expected a mapping of tensors, got {validation.describe(features)}"
        )


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
    training set, in closed form: `W = (X'X/N + ridge I)^-1 X'(Y - mean(Y))/N`, no random start and
    nothing to tune. It reads lower than a logistic probe trained to convergence, above all on early
    layers; compare it with itself only. It is computed on the CPU, by a QR decomposition, which is
    accurate in float32 where X'X is not.

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
    dtype = reference.accumulation_dtype(train_features.dtype)
    x, x_test = (features.to("cpu", dtype) for features in (train_features, test_features))
    mean, std = x.mean(0), x.std(0, correction=0)
    std = torch.where(std > 0, std, 1)
    x, x_test = (x - mean) / std, (x_test - mean) / std

    classes, inverse, sizes = train_targets.cpu().unique(return_inverse=True, return_counts=True)
    samples, dims = x.shape
    # X is centred, so X'(Y - mean(Y)) = X'Y: the sum of the features of each class.
    class_sums = x.new_zeros(len(classes), dims).index_add(0, inverse, x)
    penalty = torch.eye(dims, dtype=dtype, device="cpu") * ridge**0.5
    r = torch.linalg.qr(torch.cat([x / samples**0.5, penalty]), mode="r").R
    half = torch.linalg.solve_triangular(r.mT, class_sums.T / samples, upper=False)
    weights = torch.linalg.solve_triangular(r, half, upper=True)
    predictions = classes[(x_test @ weights + sizes / samples).argmax(1)]
    return int((predictions == test_targets.cpu()).sum()) / len(test_targets)
