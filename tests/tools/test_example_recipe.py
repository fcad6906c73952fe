"""The training example on image files with models of timm and torchvision: every option of it."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from example_inputs import draw, draw_cub, draw_folders, use_few_glyphs
from fgvc import arguments, commands
from fgvc.models import SmallResNet, classifier, load_weights, make_model
from fgvc.optimization import Optimization
from fgvc.options import Options
from torch import Tensor, nn

pytest.importorskip("timm")

ROOT = Path(__file__).parents[2]
VIT = ["--model", "timm:test_vit", "--image-size", "32"]
FILES = ["--data", "birds", *VIT, "--batch-size", "8", "--log-every", "1", "--threads", "1"]


@pytest.fixture(autouse=True)
def few_glyphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_few_glyphs(tmp_path, monkeypatch)


def rows(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="") as file:
        return list(csv.DictReader(file))


def options(*words: str) -> Options:
    return arguments.parse(list(words))[0]


def weights(folder: str, key: str = "model") -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(f"{folder}/checkpoint.pt", weights_only=True)[key]
    return state


def test_whole_recipe_trains_evaluates_and_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    draw_cub(Path("birds"))
    broken = next(Path("birds/images").rglob("*.jpg"))
    broken.write_bytes(b"")
    recipe = (
        "--method cwbr --steps 3 --amp bf16 --ema 0.9 --mixup 0.2 --cutmix 1 --label-smoothing 0.1 "
        "--randaugment --erase 0.25 --accumulate 2 --clip 1 --warmup 1 --head-lr 0.01 --lr 0.001 "
        "--optimizer adamw --workers 1"
    )
    assert commands.main([*FILES, *recipe.split(), "--out", "run"]) == 0
    assert capsys.readouterr().out.count(f"Skipped {broken}") == 1
    log = rows("run/cwbr/seed0/log.csv")
    assert all(0 <= float(row["pull blocks.5"]) <= 1 for row in log[:3])

    best = "run/cwbr/seed0/best.pt"
    assert commands.main(["evaluate", best, "--part", "val"]) == 0
    assert f"{float(log[-1]['val top-1']):.2%}" in capsys.readouterr().out
    draw(Path("photos/a.jpg"), 90)
    (Path("photos") / "._a.jpg").write_bytes(b"")
    assert commands.main(["predict", best, "photos", "--top", "2"]) == 0
    found = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(row["path"], row["rank"]) for row in found] == [("photos/a.jpg", k) for k in "12"]
    assert {row["class"] for row in found} <= {"001.crow", "002.jay", "003.rook"}
    assert 0 < float(found[1]["probability"]) <= float(found[0]["probability"]) < 1


def test_prediction_of_what_the_model_cannot_read_is_one_line() -> None:
    assert commands.main(["--method", "ce", "--steps", "1", "--batch-size", "8", "--out", "a"]) == 0
    draw(Path("photo.jpg"), 90)
    for path, words in (("photo.jpg", "1 channel does not read"), ("none.jpg", "no none.jpg")):
        with pytest.raises(SystemExit, match=f"^error: .*{words}"):
            commands.main(["predict", "a/ce/seed0/best.pt", path])


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("timm:test_convnext", ["stages.1", "stages.2", "stages.3"]),
        ("torchvision:resnet18", ["layer2", "layer3", "layer4"]),
        ("small_resnet", ["layer2", "layer3", "layer4"]),
    ],
)
def test_models_of_every_library_train_on_folders(model: str, layers: list[str]) -> None:
    draw_folders(Path("birds"), ["train", "val", "test"])
    assert commands.main([*FILES, "--model", model, "--steps", "1", "--out", "run"]) == 0
    log = rows("run/cwbr/seed0/log.csv")
    assert [name.removeprefix("pull ") for name in log[0] if name.startswith("pull ")] == layers


def test_parts_of_a_batch_give_the_step_of_the_whole_batch() -> None:
    draw_folders(Path("birds"), [""])
    for parts in ("1", "2"):
        words = ["--method", "ce", "--steps", "2", "--accumulate", parts, "--out", parts]
        commands.main([*FILES, *words])
    whole, parted = (weights(f"{parts}/ce/seed0") for parts in ("1", "2"))
    for name, value in whole.items():
        torch.testing.assert_close(parted[name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_train_as_one_and_write_one_run() -> None:
    draw_folders(Path("birds"), [""])
    words = [*FILES, "--device", "cpu", "--compare", "ce", "cwbr", "--steps", "3"]
    assert commands.main([*words, "--out", "one"]) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(ROOT / "examples" / "train_fgvc.py")
    command = [*launcher, "--nproc-per-node", "2", script, *words, "--out", "two"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as run:
        try:
            printed, errors = run.communicate(timeout=900)
        finally:
            run.terminate()  # and it ends its processes
    assert run.returncode == 0, errors[-3000:]
    assert printed.count("step 3 of 3, loss") == 2  # one line for each method
    assert [path.name for path in Path().glob("two*")] == ["two"]
    for method in ("ce", "cwbr"):
        for key in ("model", "method"):
            one, two = (weights(f"{out}/{method}/seed0", key) for out in ("one", "two"))
            assert one.keys() == two.keys()
            for name, value in one.items():
                torch.testing.assert_close(two[name], value, rtol=2e-4, atol=2e-5)
        scores = [rows(f"{out}/{method}/seed0/log.csv")[-1]["val top-1"] for out in ("one", "two")]
        assert scores[0] == scores[1]


def test_compiled_model_trains_as_the_plain_one(fresh_compiler: None) -> None:
    words = ["--images-per-class", "8", "--batch-size", "16", "--steps", "2", "--log-every", "1"]
    for name, more in (("plain", []), ("compiled", ["--compile", "aot_eager"])):
        commands.main([*words, *more, "--out", name])
    plain, compiled = (rows(f"{name}/cwbr/seed0/log.csv") for name in ("plain", "compiled"))
    for a, b in zip(plain[:2], compiled[:2], strict=True):
        for column in ("loss", "energy", "pull layer4"):
            assert float(a[column]) == pytest.approx(float(b[column]), rel=1e-3)


def test_head_has_a_learning_rate_of_its_own_and_adamw_spares_biases() -> None:
    model = SmallResNet(5, 1)
    asked = options("--optimizer", "adamw", "--lr", "0.1", "--head-lr", "1", "--warmup", "0")
    optimizer = Optimization(asked, model, 10, torch.device("cpu")).optimizer
    found = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert len(found) == len(list(model.parameters()))
    assert found[id(model.fc.weight)]["initial_lr"] == 1
    assert found[id(model.layer1.conv1.weight)]["initial_lr"] == 0.1
    assert found[id(model.fc.weight)]["weight_decay"] == 0.05
    assert found[id(model.fc.bias)]["weight_decay"] == 0
    assert found[id(model.layer1.bn1.weight)]["weight_decay"] == 0


def test_gradients_are_clipped_to_the_given_norm() -> None:
    model = nn.Linear(3, 2)
    before = [p.detach().clone() for p in model.parameters()]
    asked = options("--lr", "1", "--clip", "0.5", "--weight-decay", "0", "--warmup", "0")
    optimization = Optimization(asked, model, 10, torch.device("cpu"))
    optimization.backward(100 * model(torch.ones(1, 3)).sum())
    optimization.step()
    moved = [a - b for a, b in zip(model.parameters(), before, strict=True)]
    # Nesterov's momentum of 0.9 makes the first step 1.9 gradients long.
    assert float(torch.cat([m.flatten() for m in moved]).norm()) == pytest.approx(1.9 * 0.5)


def test_fp16_scales_the_loss_and_leaves_an_overflow_out() -> None:
    model = nn.Linear(3, 2)
    asked = options("--amp", "fp16", "--lr", "1", "--warmup", "0")
    optimization = Optimization(asked, model, 10, torch.device("cpu"))
    with optimization.autocast():
        assert model(torch.ones(1, 3)).dtype == torch.float16
    before = model.weight.detach().clone()
    optimization.backward(model(torch.ones(1, 3)).sum() * float("inf"))
    optimization.step()
    assert torch.equal(model.weight, before)
    optimization.backward(model(torch.ones(1, 3)).sum())
    assert model.weight.grad is not None
    assert float(model.weight.grad[0, 0]) > 1000
    optimization.step()
    assert not torch.equal(model.weight, before)


def test_weights_in_a_file_are_taken_but_for_another_head() -> None:
    old, new = SmallResNet(7, 3), SmallResNet(5, 3)
    head = classifier(new).weight.clone()  # type: ignore[operator, union-attr]
    state = {f"module.{name}": value for name, value in old.state_dict().items()}
    torch.save({"state_dict": state, "epoch": 3}, "weights.pt")
    taken = load_weights(new, Path("weights.pt"))
    assert taken.endswith("from weights.pt; new: fc.weight, fc.bias")
    assert torch.equal(new.layer3.conv1.weight, old.layer3.conv1.weight)
    assert torch.equal(new.fc.weight, head)


def test_file_without_weights_for_the_model_is_an_error() -> None:
    model = SmallResNet(5, 3)
    Path("text.pt").write_text("no weights")
    torch.save({"fc.weight": torch.zeros(5, 192)}, "head.pt")
    torch.save([1, 2], "list.pt")
    for name, words in (
        ("text.pt", "text.pt holds no weights"),
        ("head.pt", "has 1 of the 74 tensors of the model; stem.0.weight is missing"),
        ("list.pt", "list.pt holds no state_dict"),
    ):
        with pytest.raises(ValueError, match=words):
            load_weights(model, Path(name))


def test_weights_that_cannot_be_downloaded_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> nn.Module:
        raise OSError("We couldn't connect to the hub\nmany more lines")

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(ValueError, match=r"hub.*--init FILE") as caught:
        make_model("timm:test_vit", 5, 3, 32, pretrained=True)
    assert "many more lines" not in str(caught.value)
