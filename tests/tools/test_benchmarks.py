"""The benchmarks' own logic: nothing wrong is timed, nothing is lost, regressions fail."""

from __future__ import annotations

import operator
import os
import shutil
import time
from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import oracle
import pytest
import torch
from benchmark_rows import row

from benchmarks import compare, machine, measure, operations, peers, resnet, scaling
from benchmarks.providers import EAGER, Checker, Provider, peer, table
from benchmarks.results import Results, Row, default_path
from benchmarks.run import Unit, run
from benchmarks.session import Session
from benchmarks.workloads import BY_NAME, EPS, REALISTIC, make

PROVIDERS = {
    name: provider
    for name, provider in table("cpu").items()
    if provider.missing is None and not provider.compiled
}
SMALL = {"loss": BY_NAME["CUB ResNet-50"].shrunk()}
SMALL["shuffled"] = BY_NAME["shuffled DDP"].shrunk()
SMALL["cwbr"] = BY_NAME["CWBR bank"].shrunk()
SMALL["pairs"] = BY_NAME["pairs K=64 D=256"].shrunk()

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(Results(tmp_path / "rows.csv", "abc"), "cpu", 1)


@pytest.mark.parametrize("kind", ["loss", "shuffled"])
def test_truth_is_the_literal_formulas(kind: str) -> None:
    inputs = make(SMALL[kind]).double()
    value = peer(inputs, peers.gathered)
    assert inputs.logits is not None
    assert inputs.targets is not None
    expected = oracle.loss(
        list(inputs.features), inputs.logits, inputs.targets, inputs.workload.top_m, 2, EPS
    )
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)


def test_truth_of_all_pairs_is_the_literal_formula() -> None:
    inputs = make(SMALL["pairs"]).double()
    assert inputs.weights is not None
    d = oracle.distance(inputs.means[0], inputs.vars[0], EPS)
    expected = oracle.layer_loss(d, inputs.weights, None, EPS)
    torch.testing.assert_close(peer(inputs, peers.eager), expected, rtol=1e-10, atol=0)


def test_truth_of_the_bank_of_means_is_the_energy_sample_by_sample() -> None:
    inputs = make(SMALL["cwbr"]).double()
    logits, targets = inputs.logits, inputs.targets
    assert logits is not None
    assert targets is not None
    energies = []
    for z, mean, var in zip(inputs.features, inputs.bank_means, inputs.bank_vars, strict=True):
        for chances, own, x in zip(logits.softmax(1), targets.tolist(), z, strict=True):
            others = sorted((p, c) for c, p in enumerate(chances.tolist()) if c != own)[-5:]
            energy = ((x - mean[own]) ** 2 / (2 * var)).sum()
            energy = energy - sum(p * ((x - mean[c]) ** 2 / (2 * var)).sum() for p, c in others)
            energies.append(energy / z.shape[1])
    value = peer(inputs, peers.eager)
    torch.testing.assert_close(value, torch.stack(energies).mean(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("workload", REALISTIC, ids=lambda w: w.name)
def test_inputs_have_overlaps_and_gradients_that_do_not_underflow(workload) -> None:  # noqa: ANN001
    value, *gradients = Checker(make(replace(workload.shrunk(), dims=(512,)))).truth
    assert 1e-3 < float(value) < 0.5
    assert all(bool((g != 0).any()) for g in gradients)


@pytest.mark.slow
@pytest.mark.skipif(table("cpu")["keops"].missing is not None, reason="pykeops is not installed")
def test_keops_is_right() -> None:
    chosen, checker = table("cpu")["keops"], Checker(make(SMALL["pairs"]))
    assert checker.complaint(chosen, "forward") is None
    assert checker.complaint(chosen, "step") is None


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("kind", SMALL)
def test_every_provider_is_right(kind: str, provider: str) -> None:
    chosen = PROVIDERS[provider]
    if not chosen.takes(SMALL[kind]):
        pytest.skip("it is for other kinds of problems")
    checker = Checker(make(SMALL[kind]))
    assert checker.complaint(chosen, "forward") is None
    assert checker.complaint(chosen, "step") is None


def test_a_wrong_value_or_gradient_or_a_failure_is_noted_and_never_timed(session: Session) -> None:
    def failing(inputs: object) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    right = partial(peer, overlap=peers.eager)
    wrong = {
        "wrong value": Provider("wrong value", lambda i: right(i) * 1.001),
        "wrong gradient": Provider(
            "wrong gradient",
            lambda i: right(i) + 0.1 * (s := i.features[0].sum()) - 0.1 * s.detach(),
        ),
        "fails": Provider("fails", failing),
    }
    rows = session.time(SMALL["loss"], {EAGER: PROVIDERS[EAGER], **wrong})
    steps = {r.provider: r for r in rows if r.mode == "step"}
    assert steps[EAGER].median is not None
    assert steps[EAGER].ratio_to_eager == 1
    for name in wrong:
        assert steps[name].median is None
        assert steps[name].note.startswith("failed" if name == "fails" else "wrong")


def test_rows_have_every_field_and_survive_the_file(session: Session) -> None:
    rows = session.time(SMALL["pairs"], {EAGER: PROVIDERS[EAGER]})
    session.results.add(rows)
    header = session.results.path.read_text().splitlines()[0].split(",")
    assert header == [field.name for field in fields(Row)]
    again = Results(session.results.path, "abc").rows
    for measured in rows:
        stored = again[measured.key]
        assert stored.median == pytest.approx(measured.median, rel=1e-3)
        assert stored.p20 is not None
        assert stored.p80 is not None
        assert stored.p20 <= stored.median <= stored.p80
        assert (stored.torch, stored.commit, stored.threads) == (torch.__version__, "abc", 1)


def test_what_cannot_fit_or_finish_is_a_row_that_says_so(session: Session) -> None:
    large = BY_NAME["pairs K=1000 D=2048"]
    eager = PROVIDERS[EAGER]
    assert "out of memory by prediction: 65.5 GB" in str(session.objection(eager, large, "step"))
    checkpoint = PROVIDERS["chunked checkpoint"]
    assert session.objection(checkpoint, large, "step") is None
    device = session.device_name
    slow = row("pairs K=500 D=2048", checkpoint.name, median=8000.0, device=device)
    session.results.add([slow])
    assert session.objection(checkpoint, large, "step") == "too slow by prediction: 32 s"
    assert session.memory(large, {EAGER: eager})[0].note.startswith("out of memory")


def test_a_workload_is_predicted_by_smaller_ones_of_its_kind_alone(session: Session) -> None:
    compiled = table("cpu")["eager compiled"]
    smaller = row("128x4 C=1000", compiled.name, median=500.0, device=session.device_name)
    session.results.add([smaller])
    larger = BY_NAME["Herbarium Swin-B"]  # 512^2 pairs of 1920 dimensions, not 128^2 of 2048
    assert session.predicted_seconds(compiled, larger, "step") == pytest.approx(7.5)
    assert session.predicted_seconds(compiled, BY_NAME["pairs K=5000 D=768"], "step") == 0


def test_the_memory_limit_is_a_share_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch, session: Session
) -> None:
    of_all, large = PROVIDERS[EAGER], BY_NAME["pairs K=500 D=768"]  # 6.1 GB
    monkeypatch.setattr(measure, "available_bytes", lambda _: 10e9)
    assert replace(session).objection(of_all, large, "step") is None
    monkeypatch.setattr(measure, "available_bytes", lambda _: 8e9)
    assert "out of memory" in str(replace(session).objection(of_all, large, "step"))
    monkeypatch.setattr(measure, "available_bytes", lambda _: 1e12)
    assert replace(session).memory_limit == 18e9


def test_what_a_goal_is_set_for_may_take_longer_and_only_its_strongest_peers(
    session: Session,
) -> None:
    goal, compiled = BY_NAME["pairs K=1000 D=2048"], table("cpu")["eager compiled"]
    checkpoint = PROVIDERS["chunked checkpoint"]
    assert goal.patient
    for provider in (compiled, checkpoint):
        smaller = row(
            "pairs K=500 D=2048", provider.name, median=8000.0, device=session.device_name
        )
        session.results.add([smaller])
    assert session.may_take(compiled, goal) > 32
    assert session.may_take(checkpoint, goal) < 32
    assert session.may_take(compiled, BY_NAME["pairs K=2000 D=2048"]) < 32


def test_a_second_run_skips_what_is_done_and_another_commit_starts_again(tmp_path: Path) -> None:
    path, done = tmp_path / "rows.csv", []

    def unit(name: str, results: Results) -> Unit:
        session = Session(results, "cpu", torch.get_num_threads())
        mine = row(
            name,
            device=session.device_name,
            threads=session.threads,
            commit=results.current,
        )

        def measured() -> list[Row]:
            done.append(name)
            return [mine]

        return Unit(name, session, partial(session.has, name, [EAGER], "time_ms"), measured)

    first = Results(path, "abc")
    assert run([unit("a", first)], first, limit=1)
    again = Results(path, "abc")
    assert run([unit("a", again), unit("b", again)], again, limit=1)
    assert done == ["a", "b"]
    other = Results(path, "def")
    assert not run([unit("a", other)], other, limit=-1)
    assert run([unit("a", other)], other, limit=1)
    assert done == ["a", "b", "a"]
    assert {r.workload: r.commit for r in Results(path, "def").rows.values()} == {
        "a": "def",
        "b": "abc",
    }
    other.drop_others()
    assert [r.workload for r in Results(path, "def").rows.values()] == ["a"]


def test_interleaving_takes_turns_in_every_round() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in ("a", "b", "c")}
    samples = measure.interleave(calls, budget=0.01)
    assert all(measure.ROUNDS[0] <= len(s) <= measure.ROUNDS[1] for s in samples.values())
    turns = [name for name, _ in groupby(order[3:])]
    assert turns[:9] == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_slow_calls_take_part_in_fewer_rounds_and_the_slowest_in_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[str] = []
    cost = {"fast": 1e-3, "slow": 0.5, "slower": 3.0, "slowest": 9.0}
    monkeypatch.setattr(measure, "seconds", lambda call, *_: call() or cost[made[-1]])
    calls = {name: partial(made.append, name) for name in cost}
    samples = measure.interleave(calls, 0.03, known={"slowest": 8.0, "slow": 1.0})
    assert {name: len(taken) for name, taken in samples.items()} == {
        "fast": 30,
        "slow": measure.ROUNDS[0],
        "slower": 1,
        "slowest": 1,
    }
    assert samples["slowest"] == [8.0]
    assert "slowest" not in made
    assert measure.ratio(samples["slow"], samples["slower"]) == pytest.approx(0.5 / 3)


def test_a_child_gives_its_result_or_says_what_went_wrong() -> None:
    assert measure.in_child(operator.add, 2, 3, timeout=60) == 5
    with pytest.raises(RuntimeError, match="ZeroDivisionError: "):
        measure.in_child(operator.floordiv, 2, 0, timeout=60)
    with pytest.raises(RuntimeError, match="exit code 7"):
        measure.in_child(os._exit, 7, timeout=60)
    with pytest.raises(RuntimeError, match=r"no answer in 0 s"):
        measure.in_child(time.sleep, 60, timeout=0.1)


def test_spread_and_ratio_of_known_samples() -> None:
    assert measure.spread([1, 2, 3, 4, 5, 6]) == (3.5, 2, 5)
    assert measure.spread([7]) == (7, 7, 7)
    assert measure.ratio([2, 6, 4], [1, 2, 4]) == 2


def test_with_several_threads_only_eager_its_fastest_form_and_kernels_are_timed(
    session: Session,
) -> None:
    few = replace(session, threads=2, few=True)
    kernels = {name for name in PROVIDERS if name == "cwbr cpu"}
    assert set(few.providers(SMALL["loss"])) == {EAGER, "gathered compiled"} | kernels
    assert set(few.providers(SMALL["pairs"])) == {EAGER, "eager compiled"} | kernels
    assert set(session.providers(SMALL["pairs"])) > set(few.providers(SMALL["pairs"]))


def test_dispatcher_calls_are_counted() -> None:
    x = torch.ones(3, 4)
    assert measure.count_calls(lambda: (x + 1).sum()) == 2


@pytest.mark.skipif("cwbr cpu" not in PROVIDERS, reason="the cpu kernels are not built")
def test_a_fused_step_makes_a_tenth_of_the_calls_of_an_eager_one(session: Session) -> None:
    eager, fused = session.calls(SMALL["loss"], {n: PROVIDERS[n] for n in (EAGER, "cwbr cpu")})
    assert eager.median is not None
    assert fused.ratio_to_eager is not None
    assert eager.median > 100
    assert fused.ratio_to_eager < 0.1


@pytest.mark.parametrize(
    ("ratios", "status"),
    [
        ([1.30, 1.25, 1.31, 1.28, 1.27], 1),
        ([1.30, 0.70, 1.31, 0.90, 1.27], 0),
        ([1.02, 1.03, 1.01, 1.02, 1.04], 0),
        ([0.50, 0.52, 0.49, 0.51, 0.50], 0),
    ],
    ids=["slower", "too noisy to say", "below the threshold", "faster"],
)
def test_comparison_fails_past_the_threshold_only(
    ratios: list[float], status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare.report({"steady": [1.0, 1.0, 1.0], "w": ratios}, threshold=1.1) == status
    assert ("slower than 1.10" in capsys.readouterr().out) == bool(status)


def test_verdict_interval_holds_the_median() -> None:
    verdict = compare.judge("w", [0.9, 1.0, 1.1, 1.2])
    assert 0.9 <= verdict.low <= verdict.ratio <= verdict.high <= 1.2


def test_numbers_of_another_instruction_set_are_kept_apart() -> None:
    assert default_path("cuda").name == "cuda.csv"
    name = default_path("cpu").stem
    built = "cwbr cpu" in PROVIDERS
    assert name in (("cpu-avx512", "cpu-avx2", "cpu-portable") if built else ("cpu-reference",))


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_machine_peaks_are_of_a_possible_size() -> None:
    assert machine.lanes() in (4, 8, 16)
    assert 1e8 < machine.vector_fmas_per_second() < 2e10
    assert 1e8 < machine.bytes_per_second(10**6) < 1e13


@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_every_operation_runs_alone_at_small_sizes(name: str) -> None:
    operation = operations.OPERATIONS[name]
    sizes = {key: min(value, 24) for key, value in operation.base.items()}
    reference = operations.autograd.OPERATIONS["reference"]
    for call in operation.calls(reference, sizes, "cpu").values():
        outputs = call()
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        assert all(bool(torch.isfinite(t).all()) for t in tensors)


def test_resnet50_has_its_published_parameters_and_regularized_steps_train_it() -> None:
    assert sum(p.numel() for p in resnet.ResNet50(1000).parameters()) == 25_557_032
    workload = replace(resnet.SMALLER, groups=2, samples=2, batch=4, classes=5)
    trainer = resnet.Trainer(workload, "cpu", pixels=32)
    before = trainer.model.head.weight.clone()
    trainer.step(PROVIDERS["cwbr reference"])
    assert not torch.equal(before, trainer.model.head.weight)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
def test_one_thread_and_two_take_turns(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BUDGET_SECONDS", 0.01)
    counts: list[int] = []
    samples = scaling.speedups(lambda: counts.append(torch.get_num_threads()))
    assert len(samples) >= measure.ROUNDS[0]
    assert set(counts) == {1, 2}
    monkeypatch.setattr(scaling, "OWN", (EAGER,))
    rows = scaling.measure_speedups(session, [SMALL["pairs"]])
    assert [(r.workload, r.mode) for r in rows[1:]] == [
        (SMALL["pairs"].name, mode) for mode in ("forward", "step")
    ]
    assert all(r.median is not None and r.median > 0 for r in rows)
    assert torch.get_num_threads() == session.threads
