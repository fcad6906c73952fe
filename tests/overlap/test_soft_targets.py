"""Soft targets: one-hot rows are class indices, mixtures are what their formulas say."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import oracle
import pytest
import torch
from adjusted_batches import ADJUSTED, batch, smoothed
from torch import Tensor
from torch.nn.functional import one_hot

import cwbr_fused
from cwbr_fused import reference
from cwbr_fused.inputs import membership
from cwbr_fused.inputs.membership import Members
from cwbr_fused.inputs.targets import read_soft
from cwbr_fused.operations.autograd import PLAIN

EPS = 1e-6
OPTIONS: list[dict[str, Any]] = [{}, *ADJUSTED]
options_too = pytest.mark.parametrize("options", OPTIONS, ids=str)


def mixed(y: Tensor, classes: int) -> Tensor:
    """Mixup's targets: each sample with the one before it, in shares of its own."""
    share = torch.linspace(0.1, 0.9, len(y), dtype=torch.float64)[:, None]
    rows = one_hot(y, classes).double()
    return share * rows + (1 - share) * rows.roll(1, 0)


def members_of(targets: Tensor, min_count: float, dtype: torch.dtype = torch.float32) -> Members:
    return membership.of_targets(read_soft(targets), targets.shape[1], min_count, dtype)


def literal_loss(z: Tensor, logits: Tensor, targets: Tensor, top_m: int | None) -> Tensor:
    """The formulas with a loop over classes, moments about each class's own mean."""
    classes = [k for k in range(targets.shape[1]) if float(targets[:, k].sum()) >= 2 - 1e-9]
    shares = [targets[:, k] / targets[:, k].sum() for k in classes]
    mean = torch.stack([(w[:, None] * z).sum(0) for w in shares])
    var = torch.stack(
        [(w[:, None] * (z - m) ** 2).sum(0) for w, m in zip(shares, mean, strict=True)]
    )
    probs = torch.stack([(w[:, None] * logits.softmax(1)).sum(0)[classes] for w in shares])
    alpha = (probs + probs.T) / 2
    d = oracle.distance(mean, var.clamp(min=EPS), EPS)
    return oracle.layer_loss(d, alpha - torch.diag(alpha.diagonal()), top_m, EPS)


@pytest.mark.parametrize("objective", ["overlap", "log_overlap"])
@options_too
def test_one_hot_rows_give_what_indices_give(options: dict[str, Any], objective: str) -> None:
    z, logits, y = batch(0, 40, 11, 12)
    for dtype, top_m in itertools.product((torch.float32, torch.float64), (6, None)):
        features = [(z * 3 + 50).to(dtype).requires_grad_(), z[:, :2].to(dtype).requires_grad_()]
        rest = {**options, "top_m": top_m, "objective": objective}
        expected = cwbr_fused.loss(features, logits.to(dtype), y, **rest)
        rows = one_hot(y, 12).to(dtype)
        value = cwbr_fused.loss(features, logits.to(dtype), rows, **rest)
        rounding = 2e-5 if dtype == torch.float32 else 1e-10
        torch.testing.assert_close(value, expected, rtol=rounding, atol=rounding / 10)
        assert value.dtype == dtype
        wanted = torch.autograd.grad(expected, features)
        for gradient, of_index in zip(torch.autograd.grad(value, features), wanted, strict=True):
            tolerance = 10 * rounding * float(of_index.abs().max())
            torch.testing.assert_close(gradient, of_index, rtol=0, atol=tolerance)


def test_moments_of_one_hot_rows_survive_classes_a_million_times_their_spread_apart() -> None:
    z, _, y = batch(1, 40, 3, 4)
    z = (z + 1e6 * y[:, None]).float()
    members = members_of(one_hot(y, 4).float(), 2)
    ((mean, var),) = membership.class_moments([z], members, EPS, PLAIN)
    truth = reference.class_moments(z.double(), *reference.group_by_class(y, 2)[:2], EPS)
    torch.testing.assert_close(mean, truth[0][:4].float())
    torch.testing.assert_close(var, truth[1][:4].float(), rtol=1e-5, atol=0)
    assert members.counts.tolist() == pytest.approx(y.bincount().tolist())


@pytest.mark.parametrize("top_m", [3, None])
@pytest.mark.parametrize("how", ["mixed", "unnormalised"])
def test_weighted_classes_equal_the_literal_formulas(how: str, top_m: int | None) -> None:
    z, logits, y = batch(2, 40, 5, 6)
    targets = mixed(y, 6)
    if how == "unnormalised":
        targets = targets * torch.linspace(0.5, 1.5, 40)[:, None]
    expected = literal_loss(z, logits, targets, top_m)
    for loss in (cwbr_fused.loss, reference.loss):
        value = loss(z, logits, targets, top_m=top_m)
        torch.testing.assert_close(value, expected)


def test_scaling_all_rows_changes_the_counts_alone() -> None:
    z, logits, y = batch(3, 30, 4, 5)
    targets = mixed(y, 5)
    scaled = cwbr_fused.loss(z, logits, targets * 2)
    torch.testing.assert_close(scaled, cwbr_fused.loss(z, logits, targets))
    assert cwbr_fused.loss(z, logits, targets / 30).item() == 0.0


def test_a_class_counts_as_many_samples_as_its_weights_sum_to() -> None:
    targets = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.7, 0.3]])
    members = members_of(targets, 2)
    assert members.classes.tolist() == [0, -1]
    assert members.counts.tolist() == pytest.approx([4 / 1.5, 0])
    # Three of the places are of class 0, whose shares of it are 1/4, 1/4 and 1/2.
    assert sorted(members.scale.flatten().tolist()) == pytest.approx([0] * 5 + [0.75, 0.75, 1.5])
    everything = members_of(targets, 1)
    assert everything.classes.tolist() == [0, 1, -1]


def test_rounded_weights_of_two_samples_count_as_two() -> None:
    share = torch.tensor([0.1, 0.7, 1 / 3, 0.6])
    targets = torch.stack([share, 1 - share, torch.zeros(4)], dim=1)
    targets = torch.cat([targets, targets.flip(1)[:, [1, 2, 0]]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        members = members_of((targets * 2 / targets[:, 1].sum()).to(dtype), 2)
        assert 1 in members.classes.tolist()


# ---- The floor of a row


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("classes", "amount"), [(2, 0.1), (6, 0.2), (201, 0.1), (1000, 0.3)])
def test_label_smoothing_says_what_the_labels_say(
    classes: int, amount: float, dtype: torch.dtype
) -> None:
    y = torch.randint(1, classes, (40,), generator=torch.Generator().manual_seed(classes))
    labels, shares = read_soft(smoothed(y, classes, amount).to(dtype))
    assert shares is not None
    assert torch.equal(labels[:, 0], y)
    torch.testing.assert_close(shares[:, 0], torch.ones(40), rtol=0, atol=1e-2)
    assert not shares[:, 1:].any()


@pytest.mark.parametrize("amount", [0.0, 0.1])
def test_mixtures_keep_their_shares_with_or_without_smoothing(amount: float) -> None:
    """Of two, three and four images, also in equal parts."""
    weights = [
        [0.7, 0.3],
        [0.5, 0.5],
        [0.5, 0.3, 0.2],
        [1 / 3] * 3,
        [0.4, 0.3, 0.2, 0.1],
        [0.25] * 4,
    ]
    for parts in weights:
        y = torch.stack([torch.randperm(201)[: len(parts)] for _ in range(20)])
        rows = sum(w * smoothed(y[:, i], 201, amount).float() for i, w in enumerate(parts))
        assert isinstance(rows, Tensor)
        labels, shares = read_soft(rows)
        assert shares is not None
        found = torch.zeros(20, 201).scatter(1, labels, shares)
        expected = torch.zeros(20, 201).scatter(1, y, torch.tensor(parts).expand(20, -1))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        assert ((shares > 0).sum(1) == len(parts)).all()


@pytest.mark.parametrize(
    "row",
    [[0.0] * 9, [1 / 9] * 9, [0.2] * 5 + [0.0] * 4, [0.112, *[0.111] * 8]],
    ids=["zeros", "uniform", "five alike", "nearly uniform"],
)
def test_a_row_that_is_all_floor_is_an_unlabelled_sample(row: list[float]) -> None:
    _, shares = read_soft(torch.tensor([row]))
    assert shares is not None
    assert not shares.any()
    z, logits, y = batch(8, 30, 4, 9)
    rows = one_hot(y, 9).double()
    extended = [torch.cat([x, x[:1] + 1]) for x in (z, logits)]
    with_row = torch.cat([rows, torch.tensor([row], dtype=torch.float64)])
    value = cwbr_fused.loss(*extended, with_row)
    torch.testing.assert_close(value, cwbr_fused.loss(z, logits, rows))


@options_too
def test_the_gradient_goes_to_the_features_alone_and_is_the_numerical_one(
    options: dict[str, Any],
) -> None:
    z, logits, y = batch(4, 12, 2, 3)
    targets = mixed(y, 3)
    rest = {**options, "shrinkage": 2 if "shrinkage" in options else None}
    z, logits, targets = (t.requires_grad_() for t in (z, logits, targets))

    def value(z: Tensor) -> Tensor:
        return cwbr_fused.loss([z, z.square()], logits, targets, **rest)

    assert torch.autograd.gradcheck(value, z)
    value(z).backward()
    assert logits.grad is None
    assert targets.grad is None


@pytest.mark.parametrize("size", [0, 1, 3])
@pytest.mark.parametrize("objective", ["overlap", "log_overlap"])
def test_too_few_classes_give_a_connected_zero(objective: str, size: int) -> None:
    for options in OPTIONS:
        z = torch.randn(size, 3, requires_grad=True)
        targets = torch.full((size, 8), 1 / 8)
        value = cwbr_fused.loss(z, torch.randn(size, 8), targets, objective=objective, **options)
        (gradient,) = torch.autograd.grad(value, z)
        assert value.item() == 0.0
        assert not gradient.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_and_autocast_change_nothing_but_the_rounding_of_the_inputs(
    dtype: torch.dtype,
) -> None:
    z, logits, y = batch(5, 40, 6, 5)
    z, logits, targets = z.to(dtype).requires_grad_(), logits.to(dtype), mixed(y, 5).to(dtype)
    expected = cwbr_fused.loss(z.double(), logits.double(), targets.double())
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=dtype, enabled=enabled):
            value = cwbr_fused.loss(z, logits, targets)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
        (gradient,) = torch.autograd.grad(value, z)
        assert gradient.dtype == dtype


def test_the_module_takes_soft_targets_and_changes_none_of_its_inputs() -> None:
    z, logits, y = batch(6, 30, 4, 5)
    given = ({"a": z}, logits, smoothed(y, 5, 0.1))
    before = copy.deepcopy(given)
    module = cwbr_fused.ConfusionWeightedBhatReg(["a"], shrinkage="analytic")
    assert 0 < module(*given).item() < 1
    torch.testing.assert_close(given, before, rtol=0, atol=0)


def test_broken_soft_targets_stop_a_compiled_step() -> None:
    z, logits, y = batch(7, 12, 3, 4)
    compiled = torch.compile(cwbr_fused.loss, backend="eager")
    with pytest.raises(RuntimeError, match="targets: expected finite values >= 0"):
        compiled(z, logits, mixed(y, 4) - 0.5)
