"""The training example, end to end on a few images: results, resuming, interruption, errors."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_vision
import pytest
import torch
import train_fgvc
from example_inputs import CLASSES, use_few_glyphs
from fgvc.methods import METHODS, Terms
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
BATCH = ["--images-per-class", "8", "--batch-size", "16", "--threads", "1"]
# 48 images in batches of 16: three steps to an epoch.


@pytest.fixture(autouse=True)
def few_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_glyphs(tmp_path, monkeypatch)


def run(*arguments: str) -> int:
    return train_fgvc.main([*BATCH, *arguments])


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_comparison_trains_every_method_and_writes_table_csv_and_picture(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    run("--compare", "ce", "plain", "--epochs", "2", "--log-every", "2", "--out", "runs/a")
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if "plain - ce" in line)
    assert header.split() == ["ce", "plain", "plain", "-", "ce"]
    results = {row["metric"]: row for row in rows("runs/a/results.csv")}
    for layer in ("layer2", "layer3", "layer4"):
        assert 0 <= float(results[f"mean overlap rho, {layer}"]["plain"]) <= 1
        assert 0 <= float(results[f"linear probe accuracy, {layer}"]["ce"]) <= 100
    assert f"{float(results['test accuracy']['plain']):.2f} %" in printed
    assert float(results["of it in the regularizer"]["ce"]) == 0
    assert 0 < float(results["regularizer's share of the time"]["plain"]) < 100
    assert Path("runs/a/report.png").read_bytes().startswith(b"\x89PNG")
    for method in ("ce", "plain"):
        log = rows(f"runs/a/{method}/log.csv")
        assert [int(row["step"]) for row in log] == [2, 4, 6]
        assert all(float(row["loss"]) > 0 for row in log)
        assert (float(log[0]["regularizer"]) > 0) == (method == "plain")


def test_every_method_sees_the_same_start_and_the_same_batches() -> None:
    run("--compare", "ce", "log_overlap", "--steps", "1", "--out", "runs/a")
    ce, log = (rows(f"runs/a/{method}/log.csv")[0] for method in ("ce", "log_overlap"))
    assert ce["cross_entropy"] == log["cross_entropy"]


def test_training_learns() -> None:
    run("--method", "ce", "--epochs", "12", "--out", "runs/a", "--log-every", "36", "--lr", "0.05")
    accuracy = next(r for r in rows("runs/a/results.csv") if r["metric"] == "test accuracy")
    assert float(accuracy["ce"]) > 2 * 100 / CLASSES


def test_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("--method", "plain", "--epochs", "1", "--seed", seed, "--out", f"runs/{name}")
    a, b, c = (Path(f"runs/{name}/plain/log.csv").read_text() for name in "abc")
    assert a == b
    assert a != c


class Noisy(nn.Module):
    """A method with state and with randomness; does something at a chosen step."""

    def __init__(self, at: int = 0, action: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.at, self.action = at, action
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(
        self, features: dict[str, Tensor], logits: Tensor, targets: Tensor, ce: Tensor
    ) -> Terms:
        self.calls += 1
        if self.calls == self.at:
            self.action()
        reg = features["layer4"].square().mean() * torch.rand(()) * self.calls
        return Terms(ce + reg, reg, torch.ones_like(ce))


def fail() -> None:
    raise MemoryError("the machine went down")


def test_resumed_run_ends_as_if_never_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--method", "noisy", "--epochs", "3", "--val-every", "1", "--log-every", "2"]
    monkeypatch.setitem(METHODS, "noisy", lambda setting: Noisy())
    for sampler in (["--sampler", "pk", "--classes-per-batch", "4"], ["--sampler", "shuffle"]):
        whole, broken = f"runs/whole-{sampler[1]}", f"runs/broken-{sampler[1]}"
        run(*options, *sampler, "--out", whole)
        signals = [(2, lambda: signal.raise_signal(signal.SIGINT)), (8, fail)]
        for at, action in signals:
            method = Noisy(at, action)
            monkeypatch.setitem(METHODS, "noisy", lambda setting, method=method: method)
            if action is fail:
                with pytest.raises(MemoryError):
                    run("--resume", "--out", broken)
            else:
                assert run(*options, *sampler, "--out", broken) == 128 + signal.SIGINT
        monkeypatch.setitem(METHODS, "noisy", lambda setting: Noisy())
        assert run("--resume", "--out", broken) == 0

        logs = [Path(f"{out}/noisy/log.csv").read_text() for out in (whole, broken)]
        assert logs[0] == logs[1]
        states = [
            torch.load(f"{out}/noisy/checkpoint.pt", weights_only=True) for out in (whole, broken)
        ]
        for state in states:
            del state["seconds"], state["regularizer_seconds"]
        assert_same(*states)
        assert_same(
            *(
                torch.load(f"{out}/noisy/result.pt", weights_only=True)["evaluation"]
                for out in (whole, broken)
            )
        )


def assert_same(a: Any, b: Any) -> None:
    """Equal bit for bit, whatever the nesting."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def test_resumed_comparison_keeps_what_was_finished(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Noisy(2, lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setitem(METHODS, "noisy", lambda setting: stop)
    options = ["--compare", "ce", "noisy", "--epochs", "1", "--out", "runs/a"]
    assert run(*options) == 128 + signal.SIGTERM
    finished = Path("runs/a/ce/result.pt").stat().st_mtime_ns
    assert run("--resume", "--out", "runs/a") == 0
    assert Path("runs/a/ce/result.pt").stat().st_mtime_ns == finished
    assert list(rows("runs/a/results.csv")[0]) == ["metric", "unit", "ce", "noisy"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_saves_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    script = ROOT / "examples" / "train_fgvc.py"
    command = [sys.executable, str(script), "--method", "plain", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        [*command, "--batch-size", "8", "--threads", "1", "--log-every", "1"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        while "step 2 of" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(number)
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    resume = shlex.split(printed.strip().splitlines()[-1])
    assert resume == ["python", str(script), "--resume", "--out", str(tmp_path / "run")]
    state = torch.load(tmp_path / "run" / "plain" / "checkpoint.pt", weights_only=True)
    assert state["step"] >= 2


def test_run_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        run("--method", "ce", "--steps", "1", "--out", "runs/a")
    assert sorted(path.name for path in Path("runs").iterdir()) == ["a", "a-2"]
    assert "this one goes to runs/a-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "magic"], "'magic'.*log_overlap"),
        (["--layers", "layer2", "layer9"], "got 'layer9'"),
        (["--model", "timm:resnet50"], "timm:resnet50 needs the package timm: pip install timm"),
        (["--model", "resnet50"], "needs the package torchvision"),
        (["--model", "keras:resnet50"], "--model.*keras"),
        (["--data", "nowhere"], "--data nowhere needs the package torchvision"),
        (["--batch-size", "1000"], "--batch-size is 1000, but there are 48"),
        (["--backend", "quantum"], "backend.*'quantum'"),
        (["--sampler", "pk", "--classes-per-batch", "7"], "classes_per_batch is 7"),
        (["--pretrained"], "--pretrained"),
        (["--steps", "0"], "at least 1"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "runs/none"], "no run in runs/none"),
    ],
)
def test_wrong_option_is_named(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for library in ("timm", "torchvision"):
        monkeypatch.setitem(sys.modules, library, None)  # as if not installed
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    said = capsys.readouterr().err if stopped.value.code == 2 else str(stopped.value.code)
    assert re.search(words, said, re.DOTALL)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--lr", "0.3"], "--lr was None in this run, not 0.3"),
        (["--log-every", "10"], "--log-every was 5 in this run, not 10"),
        (["--compare", "ce", "plain"], "--methods was ['ce'] in this run, not ['ce', 'plain']"),
    ],
)
def test_resuming_with_other_options_is_an_error(
    option: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--method", "ce", "--steps", "1", "--log-every", "5", "--out", "runs/a")
    with pytest.raises(SystemExit):
        run("--resume", "--out", "runs/a", *option)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("timm:vit_tiny --pretrained", ["blocks.0", "blocks.1", "blocks.2"]),
        ("swin_tiny", ["layers.0", "layers.1"]),
        ("torchvision:resnet18", ["layer2", "layer3", "layer4"]),
        ("torchvision:resnet18 --pretrained", ["layer2", "layer3", "layer4"]),
        ("small_resnet", ["layer2", "layer3", "layer4"]),
    ],
)
def test_folder_of_images_trains_with_models_of_timm_and_torchvision(
    model: str, layers: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vision.install(monkeypatch)
    fake_vision.make_folder(Path("birds"), ["train", "val", "test"])
    options = ["--data", "birds", "--image-size", "8", "--model", *model.split()]
    assert run(*options, "--method", "plain", "--steps", "2", "--batch-size", "8") == 0
    log = rows("runs/birds-plain-seed0/plain/log.csv")
    assert [name.removeprefix("rho ") for name in log[0] if name.startswith("rho ")] == layers


def test_tensorboard_events_are_written_on_request() -> None:
    pytest.importorskip("tensorboard")
    run("--method", "ce", "--steps", "1", "--out", "runs/a", "--tensorboard")
    assert list(Path("runs/a/ce").glob("events.out.tfevents.*"))


def test_without_matplotlib_only_the_picture_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--method", "ce", "--steps", "1", "--out", "runs/a")
    assert "pip install matplotlib" in capsys.readouterr().out
    assert Path("runs/a/results.csv").exists()
    assert not Path("runs/a/report.png").exists()


def test_configuration_is_kept_with_the_run() -> None:
    run("--method", "ce", "--steps", "1", "--out", "runs/a", "--lr", "0.25")
    assert json.loads(Path("runs/a/config.json").read_text())["lr"] == 0.25
