"""The training example, end to end on a few images: results, resuming, interruption, errors."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from example_inputs import CLASSES, use_few_glyphs
from fgvc import commands
from fgvc.methods import METHODS, Method, Terms
from torch import Tensor

LAYERS = ("layer2", "layer3", "layer4")
ROOT = Path(__file__).parents[2]
BATCH = ["--images-per-class", "8", "--batch-size", "16", "--threads", "1"]
# 48 images in batches of 16: three steps to an epoch.


@pytest.fixture(autouse=True)
def few_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_glyphs(tmp_path, monkeypatch)


def run(*arguments: str) -> int:
    return commands.main([*BATCH, *arguments])


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def test_comparison_trains_every_method_and_writes_table_csv_and_pictures(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.figure")
    run("--compare", "ce", "cwbr", "published", "--epochs", "2", "--log-every", "2", "--out", "a")
    printed = capsys.readouterr().out
    header = next(line for line in printed.splitlines() if "published - ce" in line)
    assert header.split() == ["ce", "cwbr", "published", "cwbr", "-", "ce", "published", "-", "ce"]
    results = {row["metric"]: row for row in rows("a/results.csv")}
    for layer in LAYERS:
        assert math.isfinite(float(results[f"distance, {layer}"]["cwbr"]))
        assert 0 <= float(results[f"linear probe accuracy, {layer}"]["ce"]) <= 100
    for name in ("top-1 accuracy", "top-5 accuracy", "mean class accuracy"):
        assert f"{float(results[name]['published']):.2f} %" in printed
    assert float(results["of it in the regularizer"]["ce"]) == 0
    assert 0 < float(results["regularizer's share of the time"]["cwbr"]) < 100
    for picture in ("report.png", "pairs.png"):
        assert Path("a", picture).read_bytes().startswith(b"\x89PNG")
    for method in ("ce", "cwbr", "published"):
        log = rows(f"a/{method}/seed0/log.csv")
        assert [int(row["step"]) for row in log] == [2, 4, 6, 6]
        assert all(float(row["loss"]) > 0 for row in log[:3])
        assert 0 <= float(log[3]["val top-1"]) <= float(log[3]["val top-5"]) <= 1


def test_log_shows_the_share_that_cwbr_has_in_the_gradient_of_each_layer() -> None:
    run("--steps", "9", "--log-every", "1", "--out", "a")
    log = rows("a/cwbr/seed0/log.csv")[:9]
    for layer in LAYERS:
        pulls = [float(row[f"pull {layer}"]) for row in log]
        assert 0 < max(pulls) <= 1
        assert min(pulls) >= 0
        assert all(math.isfinite(float(row[f"distance {layer}"])) for row in log)


def test_several_seeds_give_paired_differences_with_an_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--compare", "ce", "cwbr", "--seeds", "2", "--steps", "1", "--out", "a")
    printed = capsys.readouterr().out
    assert re.search(r"top-1 accuracy .* [+-]\d+\.\d\d ± \d+\.\d\d points", printed)
    assert "95 % interval over 2 seeds by Student's t; each: " in printed.replace("\n  ", " ")
    top = [row for row in rows("a/results.csv") if row["metric"] == "top-1 accuracy"]
    assert [row["seed"] for row in top] == ["0", "1"]
    starts = [
        [rows(f"a/{method}/seed{seed}/log.csv")[0]["cross_entropy"] for method in ("ce", "cwbr")]
        for seed in (0, 1)
    ]
    # Every method has the same start and the same batches, every seed others.
    assert starts[0][0] == starts[0][1] != starts[1][0] == starts[1][1]


def test_training_learns() -> None:
    run("--method", "ce", "--epochs", "12", "--out", "a", "--log-every", "36", "--lr", "0.05")
    accuracy = next(r for r in rows("a/results.csv") if r["metric"] == "top-1 accuracy")
    assert float(accuracy["ce"]) > 2 * 100 / CLASSES


def test_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        run("--epochs", "1", "--seed", seed, "--out", name)
    a, b, c = (
        Path(f"{name}/cwbr/seed{seed}/log.csv").read_text() for name, seed in ("a1", "b1", "c2")
    )
    assert a == b
    assert a != c


class Noisy(Method):
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
        return Terms(ce + reg, {})


def fail() -> None:
    raise MemoryError("the machine went down")


@pytest.mark.parametrize(
    "recipe",
    [
        "--sampler pk --classes-per-batch 4",
        "--amp bf16 --ema 0.9 --mixup 0.2 --cutmix 1 --accumulate 2 --clip 1 --optimizer adamw",
    ],
)
def test_resumed_run_ends_as_if_never_interrupted(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--method", "noisy", "--epochs", "3", "--val-every", "1", "--log-every", "2"]
    options += recipe.split()
    # The second step, then the eighth; with two parts to a batch there are two calls a step.
    calls = 2 if "--accumulate" in options else 1

    def use(*action: Any) -> None:
        monkeypatch.setitem(METHODS, "noisy", lambda setting: Noisy(*action))

    use()
    run(*options, "--out", "whole")
    use(2 * calls, lambda: signal.raise_signal(signal.SIGINT))
    assert run(*options, "--out", "broken") == 128 + signal.SIGINT
    use(8 * calls, fail)
    with pytest.raises(MemoryError):
        run("--resume", "--out", "broken")
    use()
    assert run("--resume", "--out", "broken") == 0

    folders = [Path(f"{out}/noisy/seed0") for out in ("whole", "broken")]
    logs = [(folder / "log.csv").read_text() for folder in folders]
    assert logs[0] == logs[1]
    states = [torch.load(folder / "checkpoint.pt", weights_only=True) for folder in folders]
    for state in states:
        del state["seconds"], state["method_seconds"]
    assert_same(*states)
    bests = [torch.load(folder / "best.pt", weights_only=True)["model"] for folder in folders]
    assert_same(*bests)
    results = [torch.load(folder / "result.pt", weights_only=True) for folder in folders]
    assert_same(*(result["evaluation"] for result in results))


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
    stop = (2, lambda: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setitem(METHODS, "noisy", lambda setting: Noisy(*stop))
    options = ["--compare", "ce", "noisy", "--epochs", "1", "--out", "a"]
    assert run(*options) == 128 + signal.SIGTERM
    finished = Path("a/ce/seed0/result.pt").stat().st_mtime_ns
    assert run("--resume", "--out", "a") == 0
    assert Path("a/ce/seed0/result.pt").stat().st_mtime_ns == finished
    assert list(rows("a/results.csv")[0]) == ["metric", "unit", "seed", "ce", "noisy"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_process_saves_and_says_how_to_go_on(
    number: signal.Signals, tmp_path: Path
) -> None:
    script = ROOT / "examples" / "train_fgvc.py"
    command = [sys.executable, str(script), "--method", "published", "--out", str(tmp_path / "run")]
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
    state = torch.load(
        tmp_path / "run" / "published" / "seed0" / "checkpoint.pt", weights_only=True
    )
    assert state["step"] >= 2


def test_run_is_never_overwritten(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        run("--method", "ce", "--steps", "1", "--out", "a")
    assert Path("a-2/ce/seed0/best.pt").exists()
    assert "this one goes to a-2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "magic"], "'magic'.*published_log"),
        (["--layers", "layer2", "layer9"], "got 'layer9'"),
        (["--model", "timm:resnet50"], "timm:resnet50 needs the package timm: pip install timm"),
        (["--model", "resnet50"], "needs the package torchvision"),
        (["--model", "keras:resnet50"], "--model.*keras"),
        (["--data", "nowhere"], "--data: nowhere is not a directory"),
        (["--mixup", "0.2"], "--mixup and --cutmix needs the package timm"),
        (["--ema", "0.9"], "--ema needs the package timm"),
        (["--randaugment"], "--randaugment needs --data"),
        (["--init", "weights.pt"], "--init: there is no file weights.pt"),
        (["--device", "gpu"], "--device.*'gpu'"),
        (["--compare", "ce", "magic"], "'magic'"),
        (["--batch-size", "1000"], "--batch-size is 1000, but there are 48"),
        (["--backend", "quantum"], "backend.*'quantum'"),
        (
            ["--sampler", "pk", "--classes-per-batch", "7"],
            "classes_per_batch: expected at most the 6 usable",
        ),
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
    for library in ("timm", "timm.data", "timm.utils", "torchvision", "torchvision.models"):
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
        (
            ["--compare", "ce", "published"],
            "--methods was ['ce'] in this run, not ['ce', 'published']",
        ),
    ],
)
def test_resuming_with_other_options_is_an_error(
    option: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run("--method", "ce", "--steps", "1", "--log-every", "5", "--out", "a")
    with pytest.raises(SystemExit):
        run("--resume", "--out", "a", *option)
    assert words in capsys.readouterr().err


def test_tensorboard_events_are_written_on_request() -> None:
    pytest.importorskip("tensorboard")
    run("--method", "ce", "--steps", "1", "--out", "a", "--tensorboard")
    assert list(Path("a/ce/seed0").glob("events.out.tfevents.*"))


def test_without_matplotlib_only_the_picture_is_missing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run("--method", "ce", "--steps", "1", "--out", "a")
    assert "pip install matplotlib" in capsys.readouterr().out
    assert Path("a/results.csv").exists()
    assert not Path("a/report.png").exists()


def test_configuration_is_kept_with_the_run() -> None:
    run("--method", "ce", "--steps", "1", "--out", "a", "--lr", "0.25")
    assert json.loads(Path("a/config.json").read_text())["lr"] == 0.25
