"""Warnings of a regularizer without effect: each cause once, with its remedy; never in the way."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from cwbr_fused import ConfusionWeightedBhatReg, PKSampler
from cwbr_fused.operations import backends
from cwbr_fused.operations.warning import CWBRWarning
from cwbr_fused.overlap import silence
from cwbr_fused.overlap.options import OverlapOptions
from cwbr_fused.overlap.silence import SilenceCheck

BACKENDS = [n for n in ("cpu", "reference") if backends.rejection(n, "cpu") is None]

Batch = tuple[dict[str, Tensor], Tensor, Tensor]


@pytest.fixture(autouse=True)
def caught() -> Iterator[list[warnings.WarningMessage]]:
    """All warnings, none of which is an error."""
    with warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        yield messages


def texts(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if w.category is CWBRWarning]


def features(y: Tensor, dims: int, spread: float = 0.5) -> Tensor:
    """N(0, 1) samples about class means that are N(0, spread^2)."""
    generator = torch.Generator().manual_seed(0)
    means = spread * torch.randn(int(y.max()) + 1, dims, generator=generator)
    return (torch.randn(len(y), dims, generator=generator) + means[y]).requires_grad_()


def healthy() -> Batch:
    y = torch.arange(32) % 8
    return {"a": features(y, 6), "b": features(y, 12)}, torch.zeros(32, 20), y


def wide() -> Batch:
    named, logits, y = healthy()
    return named | {"b": features(y, 1024)}, logits, y


def no_class_twice() -> Batch:
    y = torch.arange(16)
    return {"a": features(y, 6), "b": features(y, 12)}, torch.zeros(16, 20), y


def few_classes_twice() -> Batch:
    y = torch.cat([torch.arange(8) % 2, torch.arange(2, 32)])
    return {"a": features(y, 6), "b": features(y, 12)}, torch.zeros(38, 40), y


def far_apart() -> Batch:
    y = torch.arange(32) % 8
    return {"a": features(y, 6, 5.0), "b": features(y, 6, 5.0)}, torch.zeros(32, 20), y


def certain() -> Batch:
    named, _, y = healthy()
    return named, torch.eye(20)[y] * 1000, y


def dead_dimensions() -> Batch:
    named, logits, y = healthy()
    alive = torch.arange(12) < 5
    return named | {"b": (named["b"] * alive).detach().requires_grad_()}, logits, y


CAUSES: list[tuple[Callable[[], Batch], str]] = [
    (wide, r"underflows to 0 in b \(100%\).*CWBR.*objective='log_overlap'"),
    (no_class_twice, r"0 of the 16 classes.*min_count=2.*regularizer is 0.*PKSampler.*CWBR"),
    (few_classes_twice, r"2 of the 32 classes.*others are left out.*PKSampler.*CWBR"),
    (far_apart, r"regularizer is \d.\de-\d\d, below the eps=1e-06 of scale_match.*CWBR"),
    (certain, r"exactly 0.*confusion weights.*CWBR"),
    (dead_dimensions, r"eps=1e-06.* in b \(58%\).*before the activation"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_m", [8, None])
@pytest.mark.parametrize(("batch", "remedy"), CAUSES)
def test_each_cause_is_reported_once_with_its_remedy(
    batch: Callable[[], Batch],
    remedy: str,
    top_m: int | None,
    backend: str,
    caught: list[warnings.WarningMessage],
) -> None:
    module = ConfusionWeightedBhatReg(["a", "b"], top_m=top_m, backend=backend, check_every=2)
    for _ in range(5):
        module(*batch())
    (text,) = texts(caught)
    assert re.search(remedy, text)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_m": None},
        {"objective": "log_overlap"},
        {"temperature": "dims"},
        {"shrinkage": "analytic", "min_count": 1},
        {"noise_floor": True},
    ],
)
def test_a_healthy_batch_is_not_reported(
    options: dict[str, Any], backend: str, caught: list[warnings.WarningMessage]
) -> None:
    module = ConfusionWeightedBhatReg(["a", "b"], backend=backend, check_every=1, **options)
    assert module(*healthy()) != 0
    assert texts(caught) == []


@pytest.mark.parametrize("options", [{"objective": "log_overlap"}, {"temperature": "dims"}])
def test_what_does_not_underflow_is_not_reported(
    options: dict[str, Any], caught: list[warnings.WarningMessage]
) -> None:
    ConfusionWeightedBhatReg(["a", "b"], **options)(*wide())
    ConfusionWeightedBhatReg(["a", "b"], **options)(*far_apart())
    assert texts(caught) == []


def test_classes_of_one_sample_have_no_variance_without_shrinkage(
    caught: list[warnings.WarningMessage],
) -> None:
    ConfusionWeightedBhatReg(["a"], min_count=1, objective="log_overlap")(*no_class_twice())
    assert re.search(r"in a \(100%\).*shrinkage for classes of one sample", *texts(caught))


def test_soft_targets_are_judged_by_their_weights(caught: list[warnings.WarningMessage]) -> None:
    named, logits, y = healthy()
    module = ConfusionWeightedBhatReg(["a", "b"])
    module(named, logits, 0.9 * torch.eye(20)[y] + 0.1 / 20)
    assert texts(caught) == []
    named, logits, y = few_classes_twice()
    ConfusionWeightedBhatReg(["a", "b"])(named, logits, torch.eye(40)[y])
    assert "2 of the 32 classes" in texts(caught)[0]


def test_of_a_group_of_processes_only_the_value_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silence, "process_group", lambda group: object())

    def causes(value: float, objective: Any = "overlap") -> set[str]:
        options = OverlapOptions(objective=objective, group="world")
        return set(silence.causes_in_batch(torch.tensor(value), *no_class_twice(), options))

    assert causes(0.0) == causes(1e-9) == {"scale"}
    assert causes(0.3) == causes(float("nan")) == causes(-200.0, "log_overlap") == set()


def test_non_finite_features_are_left_to_the_gradient_scaler(
    caught: list[warnings.WarningMessage],
) -> None:
    named, logits, y = healthy()
    with torch.no_grad():
        named["a"][0, 0] = torch.inf
    assert not ConfusionWeightedBhatReg(["a", "b"])(named, logits, y).isfinite()
    assert texts(caught) == []


def looks(
    module: ConfusionWeightedBhatReg, monkeypatch: pytest.MonkeyPatch, calls: int
) -> list[int]:
    """Which of so many calls are looked at."""
    looked: list[int] = []
    for call in range(calls):
        monkeypatch.setattr(
            "cwbr_fused.overlap.module.causes_in_batch",
            lambda *_, call=call, **__: looked.append(call) or {},
        )
        module(*healthy())
    return looked


def test_the_first_call_and_every_nth_after_it_are_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert looks(ConfusionWeightedBhatReg(["a"], check_every=3), monkeypatch, 8) == [0, 3, 6]
    assert looks(ConfusionWeightedBhatReg(["a"]), monkeypatch, 202) == [0, 100, 200]
    assert looks(ConfusionWeightedBhatReg(["a"], check_every=None), monkeypatch, 5) == []


def test_only_training_calls_count(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ConfusionWeightedBhatReg(["a"], check_every=2)
    assert looks(module.eval(), monkeypatch, 3) == []
    with torch.no_grad():
        assert looks(module.train(), monkeypatch, 3) == []
    assert looks(module, monkeypatch, 3) == [0, 2]


def test_a_cause_that_comes_later_is_reported_then(caught: list[warnings.WarningMessage]) -> None:
    module = ConfusionWeightedBhatReg(["a", "b"], check_every=2)
    for batch in (healthy, wide, wide, no_class_twice, no_class_twice, wide):
        module(*batch())
    underflow, classes = texts(caught)
    assert "underflows" in underflow
    assert "classes in this batch" in classes


def test_each_module_reports_for_itself_and_copies_remember(
    caught: list[warnings.WarningMessage],
) -> None:
    module = ConfusionWeightedBhatReg(["a", "b"], check_every=1)
    module(*wide())
    copy.deepcopy(module)(*wide())
    assert len(texts(caught)) == 1
    ConfusionWeightedBhatReg(["a", "b"], check_every=1)(*wide())
    assert len(texts(caught)) == 2


def test_the_warning_points_at_the_call_and_can_be_an_error(
    caught: list[warnings.WarningMessage],
) -> None:
    ConfusionWeightedBhatReg(["b"])(*wide())
    assert [w.filename for w in caught] == [__file__]
    warnings.simplefilter("error", CWBRWarning)
    with pytest.raises(CWBRWarning, match="underflows"):
        ConfusionWeightedBhatReg(["b"])(*wide())


@pytest.mark.parametrize("batch", [healthy, *(batch for batch, _ in CAUSES)])
def test_value_and_gradient_are_the_same_bit_for_bit(batch: Callable[[], Batch]) -> None:
    results = []
    for check_every in (1, None):
        named, logits, y = batch()
        before = torch.get_rng_state()
        value = ConfusionWeightedBhatReg(["a", "b"], check_every=check_every)(named, logits, y)
        assert torch.equal(torch.get_rng_state(), before)
        results.append((value.detach(), *torch.autograd.grad(value, list(named.values()))))
    for looked_at, not_looked_at in zip(*results, strict=True):
        assert torch.equal(looked_at, not_looked_at)


@pytest.mark.parametrize("batch", [wide, no_class_twice])
def test_compiled_calls_are_silent_and_one_graph(
    batch: Callable[[], Batch], caught: list[warnings.WarningMessage]
) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    module = ConfusionWeightedBhatReg(["a", "b"], check_every=1)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    values = [compiled(*batch()) for _ in range(3)]
    assert counter.frame_count == 1
    assert texts(caught) == []
    torch.testing.assert_close(values[0], module(*batch()))
    assert len(texts(caught)) == 1


def test_fake_tensors_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "resolve", lambda name, device_type: "reference")
    module = ConfusionWeightedBhatReg(["a"], check_every=1)
    with FakeTensorMode():
        z = torch.empty(32, 16, device="meta", requires_grad=True)
        logits = torch.empty(32, 10, device="meta")
        value = module({"a": z}, logits, torch.empty(32, device="meta", dtype=torch.int64))
    assert value.shape == ()


def test_a_captured_call_is_not_looked_at_and_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    check, value = SilenceCheck(2), torch.tensor(0.0)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert [check.due(value) for _ in range(3)] == [False, False, False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert [check.due(value) for _ in range(3)] == [True, False, True]


@pytest.mark.parametrize(
    ("check_every", "error"),
    [(0, ValueError), (-5, ValueError), (1.5, TypeError), (True, TypeError)],
)
def test_a_wrong_interval_is_named(check_every: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=r"check_every.*None for no checks"):
        ConfusionWeightedBhatReg(["a"], check_every=check_every)


# ---- PKSampler

SIX_AND_THREE = [0] * 6 + [1] * 6 + [2] * 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": False},
        {"short_classes": "drop", "samples_per_class": 3},
        {"drop_last": True, "samples_per_class": 3, "classes_per_batch": 1},
        {"drop_last": True, "samples_per_class": 3, "classes_per_batch": 1, "shuffle": False},
    ],
)
def test_a_sampler_that_covers_the_epoch_is_not_reported(
    options: dict[str, Any], caught: list[warnings.WarningMessage]
) -> None:
    arguments = {"classes_per_batch": 2, "samples_per_class": 4} | options
    sampler = PKSampler(SIX_AND_THREE, **arguments)
    assert {i for batch in sampler for i in batch} == set(range(15))
    assert texts(caught) == []


def test_classes_that_are_never_drawn_are_reported_with_the_remedy(
    caught: list[warnings.WarningMessage],
) -> None:
    PKSampler(SIX_AND_THREE, 2, 4, short_classes="drop")
    (text,) = texts(caught)
    assert re.search(r"1 of 3 classes .3 of 15 samples.*never drawn.*short_classes='replace'", text)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("sizes", [[6, 6, 3], [7, 9, 5, 1], [20, 4, 8], [5] * 7, [8, 1, 1, 2]])
def test_the_share_that_drop_last_leaves_out_is_the_average_over_epochs(
    sizes: list[int], caught: list[warnings.WarningMessage]
) -> None:
    labels = [c for c, n in enumerate(sizes) for _ in range(n)]
    sampler = PKSampler(labels, 2, 3, drop_last=True)
    missed = 0
    for epoch in range(400):
        sampler.set_epoch(epoch)
        missed += len(labels) - len({i for batch in sampler for i in batch})
    assert abs(sampler._share_left_out() - missed / (400 * len(labels))) < 0.02
    (text,) = texts(caught)
    assert re.search(r"leaves [\d.]+% of the samples out of each epoch. drop_last=False", text)


def test_few_remainders_are_not_reported_unless_they_are_always_the_same(
    caught: list[warnings.WarningMessage],
) -> None:
    labels = [c for c in range(8) for _ in range(41)]
    PKSampler(labels, 4, 4, drop_last=True)
    assert texts(caught) == []
    PKSampler(labels, 4, 4, drop_last=True, shuffle=False)
    (text,) = texts(caught)
    assert re.search(r"the same 2\.4% .*every epoch.*drop_last=False", text)


def test_one_rank_reports_for_all(caught: list[warnings.WarningMessage]) -> None:
    for rank in range(3):
        PKSampler(SIX_AND_THREE * 4, 2, 9, short_classes="drop", num_replicas=3, rank=rank)
    assert texts(caught) == []
    for rank in range(3):
        PKSampler(SIX_AND_THREE * 4, 2, 13, short_classes="drop", num_replicas=3, rank=rank)
    assert len(texts(caught)) == 1
