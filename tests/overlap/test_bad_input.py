"""Bad input: each case gives an error naming the argument, what it was, and what was expected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import cwbr_fused
from cwbr_fused import FeatureCatcher, PKSampler, functional, to_vec

Z = torch.randn(8, 5)
LOGITS = torch.randn(8, 4)
Y = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
MU, VAR = torch.randn(3, 5), torch.rand(3, 5)
ALPHA = torch.rand(3, 3)
META = torch.device("meta")


def loss(features: Any = Z, logits: Any = LOGITS, targets: Any = Y, **options: Any) -> Any:
    return cwbr_fused.loss(features, logits, targets, **options)


def pair_loss(mu: Any = MU, var: Any = VAR, alpha: Any = ALPHA, **options: Any) -> Any:
    return functional.bhat_confusion_loss(mu, var, alpha, **options)


def module(*args: Any, **options: Any) -> Any:
    return cwbr_fused.ConfusionWeightedBhatReg(*args, **options)


CASES: list[tuple[str, Callable[[], Any], type[Exception], str]] = [
    ("features rank 1", lambda: loss(Z[0]), ValueError, r"features: .*\(B, D\).*\(5,\)"),
    (
        "features rank 5",
        lambda: loss(Z[:, :, None, None, None]),
        ValueError,
        r"features: .*\(8, 5, 1, 1, 1\)",
    ),
    ("features integer", lambda: loss(Z.long()), TypeError, r"features: .*floating.*int64"),
    ("features complex", lambda: loss(Z.to(torch.complex64)), TypeError, r"features: .*complex64"),
    ("features other B", lambda: loss(Z[:7]), ValueError, r"features: expected B = 8.*\(7, 5\)"),
    (
        "features no dims",
        lambda: loss(Z[:, :0]),
        ValueError,
        r"features: .*empty dimension.*\(8, 0\)",
    ),
    ("features none", lambda: loss(None), TypeError, r"features: .*NoneType"),
    ("features string", lambda: loss("layer4"), TypeError, r"features: .*'layer4'"),
    ("features empty list", lambda: loss([]), ValueError, r"features: .*at least one layer"),
    ("features empty mapping", lambda: loss({}), ValueError, r"features: .*at least one layer"),
    ("features list item", lambda: loss([Z, 3]), TypeError, r"features\[1\]: .*int 3"),
    (
        "features mapping item",
        lambda: loss({"l3": Z[0]}),
        ValueError,
        r"features\['l3'\]: .*\(5,\)",
    ),
    ("features device", lambda: loss(Z.to(META)), ValueError, r"features: .*cpu, got meta"),
    ("logits rank", lambda: loss(logits=LOGITS[:, 0]), ValueError, r"logits: .*\(B, C\).*\(8,\)"),
    ("logits integer", lambda: loss(logits=LOGITS.long()), TypeError, r"logits: .*floating.*int64"),
    ("logits list", lambda: loss(logits=[[0.0]]), TypeError, r"logits: .*list"),
    ("targets float", lambda: loss(targets=Y.float()), TypeError, r"targets: .*integer.*float32"),
    ("targets bool", lambda: loss(targets=Y > 1), TypeError, r"targets: .*integer.*bool"),
    ("targets other B", lambda: loss(targets=Y[:5]), ValueError, r"targets: .*\(8,\).*\(5,\)"),
    (
        "targets soft, other C",
        lambda: loss(targets=LOGITS.softmax(1)[:, :3]),
        ValueError,
        r"targets: .*\(B, C\).*\(8, 4\).*\(8, 3\)",
    ),
    (
        "targets soft and negative",
        lambda: loss(targets=LOGITS.softmax(1) - 0.5),
        ValueError,
        r"targets: .*>= 0.*from -0",
    ),
    (
        "targets soft and infinite",
        lambda: loss(targets=LOGITS.exp() / 0),
        ValueError,
        r"targets: .*finite.*inf",
    ),
    (
        "targets soft on another device",
        lambda: loss(targets=LOGITS.softmax(1).to(META)),
        ValueError,
        r"targets: .*cpu, got meta",
    ),
    (
        "y soft",
        lambda: functional.class_stats_diag(Z, LOGITS.softmax(1)),
        ValueError,
        r"y: .*soft targets are for cwbr_fused.loss and CWBR",
    ),
    ("targets list", lambda: loss(targets=Y.tolist()), TypeError, r"targets: .*list"),
    (
        "targets too large",
        lambda: loss(targets=Y + 1),
        ValueError,
        r"targets: .*\[0, 4\).*from 1 to 4",
    ),
    (
        "targets negative",
        lambda: loss(targets=Y - 1),
        ValueError,
        r"targets: .*\[0, 4\).*from -1 to 2",
    ),
    ("targets device", lambda: loss(targets=Y.to(META)), ValueError, r"targets: .*cpu, got meta"),
    ("top_m negative", lambda: loss(top_m=-1), ValueError, r"top_m: .*>= 1.*-1"),
    ("top_m zero", lambda: loss(top_m=0), ValueError, r"top_m: .*>= 1.*0"),
    ("top_m float", lambda: loss(top_m=6.0), TypeError, r"top_m: .*int.*6\.0"),
    ("top_m bool", lambda: loss(top_m=True), TypeError, r"top_m: .*True"),
    ("min_count zero", lambda: loss(min_count=0), ValueError, r"min_count: .*>= 1.*0"),
    ("min_count float", lambda: loss(min_count=2.5), TypeError, r"min_count: .*2\.5"),
    ("eps zero", lambda: loss(eps=0.0), ValueError, r"eps: .*> 0.*0\.0"),
    ("eps negative", lambda: loss(eps=-1e-6), ValueError, r"eps: .*> 0.*-1e-06"),
    ("eps nan", lambda: loss(eps=float("nan")), ValueError, r"eps: .*finite.*nan"),
    ("eps inf", lambda: loss(eps=float("inf")), ValueError, r"eps: .*finite.*inf"),
    ("eps string", lambda: loss(eps="1e-6"), TypeError, r"eps: .*number.*str"),
    ("objective unknown", lambda: loss(objective="kl"), ValueError, r"objective: .*overlap.*'kl'"),
    ("backend unknown", lambda: loss(backend="fast"), ValueError, r"backend: .*'auto'.*'fast'"),
    (
        "backend elsewhere",
        lambda: loss(backend="cuda"),
        ValueError,
        r"backend: expected .*'cuda'.*cpu",
    ),
    ("group unknown", lambda: loss(group="all"), TypeError, r"group: .*ProcessGroup.*str 'all'"),
    ("group of others", lambda: loss(group=-100), TypeError, r"group: .*belongs to, got int -100"),
    ("group too early", lambda: loss(group="world"), ValueError, r"group: .*init_process_group"),
    ("z rank", lambda: functional.class_stats_diag(Z[0], Y), ValueError, r"z: .*\(B, D\).*\(5,\)"),
    (
        "y other B",
        lambda: functional.class_stats_diag(Z, Y[:3]),
        ValueError,
        r"y: .*\(8,\).*\(3,\)",
    ),
    (
        "y float",
        lambda: functional.class_stats_diag(Z, Y.half()),
        TypeError,
        r"y: .*integer.*float16",
    ),
    (
        "inv other B",
        lambda: functional.confusion_alpha(LOGITS, Y, Y[::2], Y[:3]),
        ValueError,
        r"inv: .*\(8,\).*\(3,\)",
    ),
    (
        "inv out of range",
        lambda: functional.confusion_alpha(LOGITS, Y, Y[:2], Y),
        ValueError,
        r"inv: .*\[-1, 2\).*from 0 to 3",
    ),
    (
        "classes out of range",
        lambda: functional.confusion_alpha(LOGITS, Y, torch.tensor([0, 1, 2, 9]), Y),
        ValueError,
        r"classes: .*\[0, 4\).*from 0 to 9",
    ),
    ("mu integer", lambda: pair_loss(mu=MU.long()), TypeError, r"mu: .*floating.*int64"),
    ("var shape", lambda: pair_loss(var=VAR[:2]), ValueError, r"var: .*mu.*\(3, 5\).*\(2, 5\)"),
    ("var dtype", lambda: pair_loss(var=VAR.double()), ValueError, r"var: .*mu.*float32.*float64"),
    ("alpha shape", lambda: pair_loss(alpha=ALPHA[:2]), ValueError, r"alpha: .*\(3, 3\).*\(2, 3\)"),
    ("alpha rank", lambda: pair_loss(alpha=ALPHA[0]), ValueError, r"alpha: .*\(K, K\).*\(3,\)"),
    ("distance eps", lambda: functional.bhattacharyya_diag(MU, VAR, 0), ValueError, r"eps: .*> 0"),
    (
        "ce vector",
        lambda: cwbr_fused.scale_match(Z[0], Z[0, 0]),
        ValueError,
        r"ce: .*scalar.*\(5,\)",
    ),
    ("reg number", lambda: cwbr_fused.scale_match(Z[0, 0], 0.5), TypeError, r"reg: .*float 0\.5"),
    ("reg integer", lambda: cwbr_fused.scale_match(Z[0, 0], Y[0]), TypeError, r"reg: .*floating"),
    (
        "layer not caught",
        lambda: module(["l3"])({"l4": Z}, LOGITS, Y),
        ValueError,
        r"features: .*l3.*l4",
    ),
    ("module features", lambda: module(["l3"])(Z, LOGITS, Y), TypeError, r"features: .*mapping"),
    ("layer_names string", lambda: module("layer4"), TypeError, r"layer_names: .*'layer4'"),
    ("layer_names empty", lambda: module([]), ValueError, r"layer_names: .*\[\]"),
    ("layer_names twice", lambda: module(["a", "a"]), ValueError, r"layer_names: .*distinct"),
    ("module top_m", lambda: module(["a"], top_m=-4), ValueError, r"top_m: .*-4"),
    ("module group", lambda: module(["a"], group=0), TypeError, r"group: .*int 0"),
    ("module backend", lambda: module(["a"], backend="gpu"), ValueError, r"backend: .*'gpu'"),
    (
        "unknown layer",
        lambda: FeatureCatcher(torch.nn.Linear(2, 2), ["layer4"]),
        ValueError,
        r"layer4",
    ),
    ("to_vec rank", lambda: to_vec(Z[0]), ValueError, r"\(B, D\).*\(5,\)"),
    ("sampler classes", lambda: PKSampler(Y, 0, 2), ValueError, r"classes_per_batch.*0"),
]


@pytest.mark.parametrize(
    ("call", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_error_names_the_argument_what_it_was_and_what_was_expected(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"(?s){message}"):
        call()


@pytest.mark.parametrize(
    "targets",
    [[0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 1], [0], []],
    ids=["one class", "all singletons", "K=2", "B=1", "empty batch"],
)
@pytest.mark.parametrize("dims", [1, 5])
def test_small_batches_give_a_number(targets: list[int], dims: int) -> None:
    y = torch.tensor(targets, dtype=torch.int64)
    value = loss(torch.randn(len(y), dims), torch.randn(len(y), 4), y)
    assert 0.0 <= value.item() <= 1.0


def test_logits_without_columns_accept_only_the_empty_batch() -> None:
    assert loss(Z[:0], LOGITS[:0, :0], Y[:0]).item() == 0.0
    with pytest.raises(ValueError, match=r"targets: .*\[0, 0\)"):
        loss(logits=LOGITS[:, :0])
