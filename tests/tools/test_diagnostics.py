"""Diagnostics of a trained classifier: confusing pairs, their errors, overlaps, linear probes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cwbr_fused import backends, reference
from cwbr_fused.diagnostics import (
    layer_overlaps,
    layer_separations,
    linear_probe,
    pair_error_rate,
    report,
    top_confusing_pairs,
)

BACKENDS = [name for name in backends.NAMES if backends.rejection(name, "cpu") is None]


def batch(seed: int, size: int, dims: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (size,), generator=generator)
    z = torch.randn(size, dims, generator=generator)
    return z, 2 * torch.randn(size, classes, generator=generator), targets


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_m", [1, 4, 64, None])
def test_overlaps_are_the_mean_rho_of_the_pairs_that_the_loss_takes(
    top_m: int | None, backend: str
) -> None:
    z, logits, y = batch(0, 40, 5, 7)
    features = {"map": z[:, :, None, None].expand(-1, -1, 2, 3), "vector": z[:, :2]}
    overlaps = layer_overlaps(features, logits, y, top_m=top_m, backend=backend)
    assert list(overlaps) == ["map", "vector"]
    for layer, vectors in (("map", z), ("vector", z[:, :2])):
        classes, mu, var, _, inv = reference.class_stats_diag(vectors, y)
        alpha = reference.confusion_alpha(logits, y, classes, inv)
        pairs, _ = reference.top_pairs(alpha, top_m or 1000)
        rho = reference.bhattacharyya_diag(mu, var)[1]
        torch.testing.assert_close(overlaps[layer], rho[pairs[:, 0], pairs[:, 1]].mean())


def test_with_one_pair_the_overlap_is_the_loss_of_the_literal_formulas() -> None:
    z, logits, y = batch(1, 30, 3, 6)
    overlap = layer_overlaps({"layer": z}, logits, y, top_m=1)["layer"]
    loss = oracle.loss([z.double()], logits.double(), y, 1, 2, 1e-6)
    torch.testing.assert_close(overlap.double(), loss, rtol=1e-5, atol=0)


def test_overlaps_carry_no_gradient_and_change_nothing() -> None:
    z, logits, y = batch(2, 24, 4, 4)
    z.requires_grad_()
    before = z.detach().clone()
    assert not layer_overlaps({"layer": z}, logits.requires_grad_(), y)["layer"].requires_grad
    assert torch.equal(z, before)


@pytest.mark.parametrize("targets", [[0, 0, 0, 0], [0, 1, 2, 3], [1, 1, 2, 3]])
def test_overlap_of_fewer_than_two_usable_classes_is_nan(targets: list[int]) -> None:
    overlaps = layer_overlaps(
        {"layer": torch.randn(4, 3)}, torch.randn(4, 5), torch.tensor(targets)
    )
    assert math.isnan(overlaps["layer"])


@pytest.mark.parametrize("sizes", [(2, 2), (3, 40), (40, 40)])
@pytest.mark.parametrize("power", [1, 3])
def test_separation_of_classes_with_equal_means_is_0_whatever_their_sizes_and_distributions(
    sizes: tuple[int, int], power: int
) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    y = torch.arange(2).repeat_interleave(torch.tensor(sizes))
    y = torch.cat([y, torch.arange(2, 42).repeat_interleave(4)])  # for the variance within
    z = 5 + torch.randn(len(y), 20_000, generator=generator) ** power
    logits = torch.zeros(len(y), 42)
    logits[y < 2, :2] = 9
    separation = layer_separations({"a": z}, logits, y, top_m=1)["a"]
    assert abs(separation) < 0.02 / min(sizes)


@pytest.mark.parametrize("dims", [1, 8, 4096])
def test_separation_is_the_distance_per_dimension_at_every_width_and_scale(dims: int) -> None:
    generator = torch.Generator().manual_seed(dims)
    y = torch.arange(max(600, 20_000 // dims)) % 2
    z = torch.randn(len(y), dims, generator=generator) + 2.0 * y[:, None]
    scale = torch.logspace(-3, 3, dims)
    separation = layer_separations({"a": z * scale}, torch.zeros(len(y), 2), y)["a"]
    assert float(separation) == pytest.approx(2.0**2 / 8, rel=0.05)


def test_separation_of_a_dead_layer_is_nan_and_a_dead_dimension_does_not_count() -> None:
    z, logits, y = batch(9, 40, 3, 4)
    dead = torch.cat([z, torch.full((40, 2), 3.0)], dim=1)
    whole, part, none = layer_separations({"a": z, "b": dead, "c": dead[:, 3:]}, logits, y).values()
    torch.testing.assert_close(whole, part)
    assert math.isnan(none)


class NoFloat64(TorchDispatchMode):
    """As on an Apple GPU, no operation may make float64."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and t.dtype == torch.float64]
        assert not made, func
        return out


def test_float32_inputs_need_no_float64() -> None:
    z, logits, y = batch(10, 60, 5, 4)
    features = {"a": z, "b": z[:, :2].half()}
    with NoFloat64():
        layer_overlaps(features, logits, y, backend="reference")
        layer_separations(features, logits, y, backend="reference")
        linear_probe(z, y, z, y)
        report(features, logits, y, train=(features, y), before=logits, backend="reference")


@pytest.fixture
def other_default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


@pytest.mark.usefixtures("other_default_device")
def test_the_default_device_does_not_matter() -> None:
    with torch.device("cpu"):
        y = torch.arange(60) % 4
        z, logits = torch.randn(60, 5), torch.randn(60, 4)
    features = {"a": z}
    written = report(features, logits, y, train=(features, y), before=logits, backend="reference")
    assert 0 <= written["layers"]["a"]["probe"] <= 1
    assert written["layers"]["a"]["separation"] is not None
    assert not layer_separations(features, logits, y, backend="reference")["a"].isnan()


def test_most_confused_pair_is_the_one_with_most_softmax_mass_between_it() -> None:
    probs = torch.tensor(
        [[0.6, 0.0, 0.4, 0.0], [0.6, 0.0, 0.4, 0.0], [0.2, 0.8, 0.0, 0.0], [0.2, 0.1, 0.7, 0.0]]
    )
    pairs, confusion = top_confusing_pairs(probs.log(), torch.tensor([0, 0, 1, 2]), 2)
    assert pairs.tolist() == [[0, 2], [0, 1]]
    torch.testing.assert_close(confusion, torch.tensor([(0.4 + 0.2) / 2, (0.0 + 0.2) / 2]))


def test_pairs_are_named_by_class_even_where_classes_are_missing() -> None:
    logits = torch.zeros(4, 10)
    logits[:, 7] = 3
    pairs, confusion = top_confusing_pairs(logits, torch.tensor([9, 9, 7, 4]), 1)
    assert pairs.tolist() == [[4, 7]]
    probs = logits.softmax(1)
    torch.testing.assert_close(confusion[0], (probs[3, 7] + probs[2, 4]) / 2)


def test_no_more_pairs_than_there_are() -> None:
    _, logits, y = batch(3, 50, 2, 3)
    pairs, confusion = top_confusing_pairs(logits, y, 20)
    assert pairs.shape == (3, 2)
    assert (confusion.diff() <= 0).all()


def test_pair_error_counts_only_swaps_within_the_pair() -> None:
    targets = torch.tensor([0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 1, 2, 0, 1, 0])
    rates = pair_error_rate(predictions, targets, torch.tensor([[0, 1], [0, 2], [1, 2], [3, 4]]))
    torch.testing.assert_close(
        rates, torch.tensor([2 / 5, 2 / 4, 0.0, float("nan")]), equal_nan=True
    )


def test_probe_separates_what_a_hyperplane_separates_at_any_scale() -> None:
    generator = torch.Generator().manual_seed(4)
    y, y_test = (torch.randint(5, (n,), generator=generator) for n in (300, 200))
    centres = 6 * torch.randn(5, 12, generator=generator)
    scale = torch.logspace(-6, 6, 12)

    def draw(targets: Tensor) -> Tensor:
        noise = torch.randn(len(targets), 12, generator=generator)
        return (centres[targets] + noise) * scale + 100 * scale

    assert linear_probe(draw(y), y, draw(y_test), y_test) == 1.0


def test_probe_of_noise_is_at_chance() -> None:
    generator = torch.Generator().manual_seed(5)
    y, y_test = (torch.randint(10, (n,), generator=generator) for n in (2000, 2000))
    x, x_test = (torch.randn(2000, 8, generator=generator) for _ in range(2))
    assert 0.06 < linear_probe(x, y, x_test, y_test) < 0.14


def test_probe_survives_a_dead_dimension_and_more_dimensions_than_samples() -> None:
    generator = torch.Generator().manual_seed(6)
    y = torch.arange(20) % 2 * 3  # classes 0 and 3
    x = torch.randn(20, 50, generator=generator)
    x[:, 0], x[:, 1] = 7.0, y.float()
    assert linear_probe(x, y, x, y) == 1.0


def test_probe_in_float32_is_that_of_float64_on_features_that_are_nearly_dependent() -> None:
    generator = torch.Generator().manual_seed(11)
    y = torch.arange(400) % 5
    factors = torch.randn(400, 3, generator=generator) + y[:, None].eq(torch.arange(3)) * 2
    x = factors @ torch.randn(3, 200, generator=generator)
    x = x + 1e-2 * torch.randn(400, 200, generator=generator)
    train, test = slice(0, 200), slice(200, 400)
    probes = [
        linear_probe(z[train], y[train], z[test], y[test], ridge=1e-6) for z in (x, x.double())
    ]
    assert probes[0] == probes[1] > 0.25


def test_probe_solves_the_ridge_problem() -> None:
    generator = torch.Generator().manual_seed(7)
    y = torch.randint(3, (40,), generator=generator)
    x = torch.randn(40, 4, generator=generator, dtype=torch.float64)
    x = (x - x.mean(0)) / x.std(0, correction=0)
    one_hot = torch.eye(3, dtype=torch.float64)[y]
    # The same penalty as rows of an ordinary least-squares problem.
    rows = torch.cat([x / 40**0.5, 0.3**0.5 * torch.eye(4, dtype=torch.float64)])
    right = torch.cat([(one_hot - one_hot.mean(0)) / 40**0.5, torch.zeros(4, 3).double()])
    scores = x @ torch.linalg.lstsq(rows, right).solution + one_hot.mean(0)
    expected = float((scores.argmax(1) == y).double().mean())
    assert 0 < expected < 1
    assert linear_probe(x, y, x, y, ridge=0.3) == expected


Z, LOGITS, Y = batch(8, 6, 3, 4)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: layer_overlaps(Z, LOGITS, Y), TypeError, "features"),
        (lambda: layer_overlaps({}, LOGITS, Y), ValueError, "features"),
        (lambda: layer_overlaps({"a": Z[:5]}, LOGITS, Y), ValueError, "features\\['a'\\]"),
        (lambda: layer_overlaps({"a": Z}, LOGITS, Y, top_m=0), ValueError, "top_m"),
        (lambda: layer_separations({"a": Z}, LOGITS, Y, top_m=0), ValueError, "top_m"),
        (lambda: top_confusing_pairs(LOGITS, Y[:5]), ValueError, "targets"),
        (lambda: top_confusing_pairs(LOGITS, Y, 0), ValueError, "count"),
        (lambda: pair_error_rate(LOGITS, Y, Y), ValueError, "predictions"),
        (lambda: pair_error_rate(Y, Y[:5], torch.tensor([[0, 1]])), ValueError, "targets"),
        (lambda: pair_error_rate(Y, Y, Y), ValueError, "pairs"),
        (lambda: linear_probe(Z, Y, Z[:, :2], Y), ValueError, "test_features"),
        (lambda: linear_probe(Z, Y.float(), Z, Y), TypeError, "train_targets"),
        (lambda: linear_probe(Z[:0], Y[:0], Z, Y), ValueError, "train_features"),
        (lambda: linear_probe(Z, Y, Z, Y, ridge=0.0), ValueError, "ridge"),
    ],
)
def test_wrong_arguments_are_named(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
