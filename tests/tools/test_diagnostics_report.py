"""The dictionary of `diagnostics.report` against hand-computed and float64 values."""

from __future__ import annotations

import json
import math
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import cwbr_fused
from cwbr_fused.diagnostics import (
    layer_overlaps,
    layer_separations,
    linear_probe,
    pair_error_rate,
    report,
    top_confusing_pairs,
)


def batch(seed: int, size: int, dims: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (size,), generator=generator)
    z = torch.randn(size, dims, generator=generator)
    return z, 2 * torch.randn(size, classes, generator=generator), targets


# Two classes in one dimension: means 0 and 4, variances 1; of four samples of class 2 one is taken
# for class 0, of two of class 0 none is for class 2.
Z = torch.tensor([[-1.0], [1.0], [3.0], [5.0], [3.0], [5.0]])
Y = torch.tensor([0, 0, 2, 2, 2, 2])
PROBS = torch.tensor(
    [[0.8, 0.1, 0.1], [0.6, 0.1, 0.3], [0.7, 0.1, 0.2], [0.1, 0.1, 0.8]] + [[0.1, 0.0, 0.9]] * 2
)


def test_numbers_of_one_pair_are_those_computed_by_hand() -> None:
    result = report({"layer": Z}, PROBS.log(), Y, before=torch.tensor([2, 0, 2, 0, 1, 1]))
    distance = 4**2 / 8  # equal variances: (4 - 0)^2 / (8 * 1)
    rho = math.exp(-distance)
    (pair,) = result["pairs"]
    assert (pair["classes"], pair["names"], pair["samples"]) == ([0, 2], ["0", "2"], [2, 4])
    lent_02, lent_20 = (0.1 + 0.3) / 2, (0.7 + 0.1 + 0.1 + 0.1) / 4
    assert pair["alpha"] == pytest.approx((lent_02 + lent_20) / 2)
    assert pair["error_rate"] == result["error_rate"] == pytest.approx(1 / 6)
    assert pair["error_rate_before"] == result["error_rate_before"] == pytest.approx(2 / 6)
    of_pair, layer = pair["layers"]["layer"], result["layers"]["layer"]
    # 4^2 less the variances of the means, 2 / 2 and (4 / 3) / 4, over the variance within the
    # classes, (2 * 1 + 4 * 1) / (1 + 3), and over 8.
    separation = (16 - 1 - 1 / 3) / 1.5 / 8
    expected = {"distance": distance, "rho": rho, "separation": separation}
    for key, value in {**expected, "overlap": math.exp(-separation)}.items():
        assert of_pair[key] == layer[key] == pytest.approx(value, rel=1e-5)
    assert layer["dims"] == 1
    assert layer["underflow"] == 0
    assert result["samples"] == 6
    assert result["classes"] == 2
    assert result["accuracy"] == pytest.approx(5 / 6)
    ce = -sum(math.log(p) for p in (0.8, 0.6, 0.2, 0.8, 0.9, 0.9)) / 6
    assert result["cross_entropy"] == pytest.approx(ce, rel=1e-6)
    assert result["regularizer"] == pytest.approx(rho, rel=1e-5)  # one pair: its weight cancels
    assert result["scale"] == pytest.approx(ce / (rho + 1e-6), rel=1e-5)
    matrix = result["confusion"]
    assert matrix["classes"] == [0, 2]
    assert matrix["mean_probs"][0] == pytest.approx([0.7, lent_02])
    assert matrix["mean_probs"][1] == pytest.approx([lent_20, 0.7])


def test_numbers_are_those_of_the_single_measures_and_of_float64_formulas() -> None:
    z, logits, y = batch(0, 120, 6, 7)
    features = {"map": z[:, :, None, None].expand(-1, -1, 2, 3), "vector": z[:, :2]}
    train = ({"vector": z[:50, :2], "map": z[:50]}, y[:50])
    result = report(features, logits, y, count=5, train=train, top_m=5)
    pairs, alpha = top_confusing_pairs(logits, y, 5)
    assert [pair["classes"] for pair in result["pairs"]] == pairs.tolist()
    assert [pair["alpha"] for pair in result["pairs"]] == pytest.approx(alpha.tolist())
    errors = pair_error_rate(logits.argmax(1), y, pairs)
    assert [pair["error_rate"] for pair in result["pairs"]] == pytest.approx(errors.tolist())
    assert result["error_rate"] == pytest.approx(float(errors.mean()))
    overlaps = layer_overlaps(features, logits, y, top_m=5)
    separations = layer_separations(features, logits, y, top_m=5)
    for layer, vectors in (("map", z), ("vector", z[:, :2])):
        measures = result["layers"][layer]
        assert measures["separation"] == pytest.approx(float(separations[layer]), rel=1e-4)
        assert measures["rho"] == pytest.approx(float(overlaps[layer]), rel=1e-5)
        probe = linear_probe(vectors[:50], y[:50], vectors, y)
        assert measures["probe"] == probe
        for pair in result["pairs"]:
            i, j = (vectors[y == k].double() for k in pair["classes"])
            u = [x.var(0, correction=0) + 1e-6 for x in (i, j)]
            s = (u[0] + u[1]) / 2
            terms = (i.mean(0) - j.mean(0)) ** 2 / (8 * s) + s.log() / 2
            expected = float((terms - u[0].log() / 4 - u[1].log() / 4).sum())
            assert pair["layers"][layer]["distance"] == pytest.approx(expected, rel=1e-4)
    assert result["cross_entropy"] == pytest.approx(float(cross_entropy(logits, y)))
    expected = oracle.loss([z.double(), z[:, :2].double()], logits.double(), y, 5, 2, 1e-6)
    assert result["regularizer"] == pytest.approx(float(expected), rel=1e-5)


def test_scale_is_the_weight_that_scale_match_gives() -> None:
    z, logits, y = batch(1, 60, 4, 5)
    result = report({"a": z}, logits, y, top_m=3)
    reg = cwbr_fused.loss(z, logits, y, top_m=3).requires_grad_()
    (weight,) = torch.autograd.grad(cwbr_fused.scale_match(cross_entropy(logits, y), reg), reg)
    assert result["scale"] == pytest.approx(float(weight), rel=1e-6)


def test_overlaps_that_underflow_in_float32_keep_their_value() -> None:
    y = torch.tensor([0, 0, 1, 1, 2, 2])
    z = torch.tensor([-1.0, 1.0, 39.0, 41.0, 1.0, 3.0])[:, None]  # D(0, 1) = 200, D(0, 2) = 0.5
    result = report({"a": z}, torch.zeros(6, 3), y, pairs=torch.tensor([[0, 1], [0, 2]]))
    far, near = (pair["layers"]["a"] for pair in result["pairs"])
    assert far["rho"] == pytest.approx(math.exp(-200), rel=1e-2)
    assert near["rho"] == pytest.approx(math.exp(-0.5), rel=1e-5)
    assert result["layers"]["a"]["underflow"] == 0.5


def test_pairs_may_be_picked_elsewhere() -> None:
    z, logits, y = batch(2, 80, 4, 6)
    pairs = torch.tensor([[4, 1], [0, 5]])
    result = report({"a": z}, logits, y, pairs=pairs)
    assert result["pairs_given"]
    assert [pair["classes"] for pair in result["pairs"]] == pairs.tolist()
    assert not report({"a": z}, logits, y)["pairs_given"]


@pytest.mark.parametrize("form", ["logits", "predictions"])
def test_before_takes_logits_or_predictions(form: str) -> None:
    z, logits, y = batch(3, 60, 4, 4)
    earlier = logits.flip(0)
    before = earlier if form == "logits" else earlier.argmax(1).int()
    result = report({"a": z}, logits, y, before=before)
    pairs = torch.tensor([pair["classes"] for pair in result["pairs"]])
    expected = pair_error_rate(earlier.argmax(1), y, pairs).tolist()
    assert [pair["error_rate_before"] for pair in result["pairs"]] == pytest.approx(expected)


def test_gradients_are_reported_by_layer_and_what_else_is_measured_is_ignored() -> None:
    z, logits, y = batch(4, 40, 4, 4)
    measured = {"ce_norm": 2.0, "reg_norm": torch.tensor(0.5), "cosine": math.nan, "ratio": 0.2}
    layers = report({"a": z, "b": z}, logits, y, gradients={"b": measured})["layers"]
    keys = ("ce_norm", "reg_norm", "cosine", "share")
    assert [layers["b"][key] for key in keys] == [2.0, 0.5, None, 0.25]
    assert [layers["a"][key] for key in keys] == [None] * 4
    assert "ratio" not in layers["b"]


def test_gradients_may_be_the_health_of_cwbr() -> None:
    torch.manual_seed(0)
    body, head = torch.nn.Linear(8, 5), torch.nn.Linear(5, 3)
    cwbr, (x, _, y) = cwbr_fused.CWBR(3), batch(10, 12, 8, 3)
    for _ in range(2):
        features = {"body": body(x)}
        logits = head(features["body"])
        cwbr(features, logits, y)
        cross_entropy(logits, y).backward()
    layer = report(features, logits, y, gradients=cwbr.health())["layers"]["body"]
    assert layer["ce_norm"] > 0
    assert layer["reg_norm"] > 0
    assert -1 <= layer["cosine"] <= 1
    assert layer["share"] == pytest.approx(layer["reg_norm"] / layer["ce_norm"])


def test_what_is_undefined_or_not_finite_is_none_and_json_can_write_it() -> None:
    z, logits, y = batch(5, 40, 4, 4)
    y[y == 3] = 2
    y[0] = 3  # a single sample: no moments, and the pair is left out of the means
    z[y == 2, 0] = math.nan
    pairs = torch.tensor([[0, 1], [0, 3], [1, 2], [3, 4]])
    logits = torch.cat([logits, logits[:, :1]], dim=1)  # a class 4, which has no sample
    result = report({"a": z, "b": z[:, 1:]}, logits, y, pairs=pairs, step=7)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    distances = [pair["layers"]["a"]["distance"] for pair in result["pairs"]]
    assert distances[0] > 0
    assert distances[1:] == [None, None, None]
    assert result["layers"]["a"]["distance"] is None  # a non-finite feature is not averaged away
    of_b = [pair["layers"]["b"]["distance"] for pair in result["pairs"]]
    assert result["layers"]["b"]["distance"] == pytest.approx((of_b[0] + of_b[2]) / 2)
    assert result["pairs"][3]["alpha"] is None
    assert result["pairs"][2]["error_rate"] is not None
    assert result["regularizer"] is None


def test_a_single_class_has_no_pairs_and_no_numbers_about_them() -> None:
    result = report({"a": torch.randn(4, 3)}, torch.randn(4, 2), torch.zeros(4).long())
    assert result["pairs"] == []
    assert result["error_rate"] is None
    assert result["layers"]["a"]["rho"] is None
    assert result["confusion"]["classes"] == []


def test_confusion_holds_the_classes_of_the_first_pairs_side_by_side() -> None:
    z, logits, y = batch(6, 900, 2, 60)
    pairs = torch.tensor([[7, 3], [1, 2], [5, 3], *([k, k + 1] for k in range(10, 58))])
    shown = report({"a": z}, logits, y, pairs=pairs)["confusion"]["classes"]
    assert shown[:5] == [7, 3, 5, 1, 2]
    assert len(shown) == len(set(shown)) == 40


def test_half_precision_and_many_dtypes_of_targets_are_read() -> None:
    z, logits, y = batch(7, 60, 4, 5)
    exact = report({"a": z.half().float()}, logits.half().float(), y)
    rounded = report({"a": z.half()}, logits.half(), y.to(torch.uint8))
    assert rounded["pairs"][0]["classes"] == exact["pairs"][0]["classes"]
    assert rounded["cross_entropy"] == pytest.approx(exact["cross_entropy"])
    assert rounded["layers"]["a"]["rho"] == pytest.approx(exact["layers"]["a"]["rho"])


def test_nothing_is_changed_and_no_gradient_kept() -> None:
    z, logits, y = batch(8, 40, 4, 4)
    copies = z.clone(), logits.clone(), y.clone()
    report({"a": z.requires_grad_()}, logits.requires_grad_(), y, train=({"a": z}, y))
    assert all(torch.equal(x, copy) for x, copy in zip((z, logits, y), copies, strict=True))
    assert z.grad is None


A, LOGITS, TARGETS = batch(9, 12, 3, 4)
GRADIENT = {"ce_norm": 1.0, "reg_norm": 1.0}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"features": A}, TypeError, "features"),
        ({"features": {}}, ValueError, "features"),
        ({"features": {"a": A[:5]}}, ValueError, "features\\['a'\\]"),
        ({"logits": LOGITS[0]}, ValueError, "logits"),
        ({"targets": TARGETS + 9}, ValueError, "targets"),
        (
            {"targets": TARGETS[:0], "logits": LOGITS[:0], "features": {"a": A[:0]}},
            ValueError,
            "logits",
        ),
        ({"class_names": ["x"]}, ValueError, "class_names"),
        ({"class_names": "abcd"}, TypeError, "class_names"),
        ({"class_names": [1, 2, 3, 4]}, TypeError, "class_names"),
        ({"count": 0}, ValueError, "count"),
        ({"pairs": torch.tensor([0, 1])}, ValueError, "pairs"),
        ({"pairs": torch.tensor([[0.0, 1.0]])}, TypeError, "pairs"),
        ({"pairs": torch.tensor([[0, 4]])}, ValueError, "pairs"),
        ({"pairs": torch.tensor([[1, 1]])}, ValueError, "pairs"),
        ({"before": TARGETS[:3]}, ValueError, "before"),
        ({"before": [0, 1]}, TypeError, "before"),
        ({"train": {"a": A}}, TypeError, "train"),
        ({"train": ({"b": A}, TARGETS)}, ValueError, "train"),
        ({"train": ({"a": A}, TARGETS[:3])}, ValueError, "train"),
        ({"train": ({"a": A[:, :2]}, TARGETS)}, ValueError, "train"),
        ({"gradients": [GRADIENT]}, TypeError, "gradients"),
        ({"gradients": {"b": GRADIENT}}, ValueError, "gradients.*'b'"),
        ({"gradients": {"a": GRADIENT}}, ValueError, "gradients\\['a'\\].*cosine"),
        ({"step": -1}, ValueError, "step"),
        ({"step": 1.5}, ValueError, "step"),
        ({"top_m": 0}, ValueError, "top_m"),
        ({"min_count": 0}, ValueError, "min_count"),
        ({"eps": 0.0}, ValueError, "eps"),
    ],
)
def test_wrong_arguments_are_named(
    changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    arguments = {"features": {"a": A}, "logits": LOGITS, "targets": TARGETS} | changes
    with pytest.raises(error, match=words):
        report(**arguments)
