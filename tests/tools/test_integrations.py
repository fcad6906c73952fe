"""Other libraries' training loops: against the real library where it can be imported, and always
against a stand-in with the same calls."""

from __future__ import annotations

import copy
import importlib
import pickle
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cwbr_fused
from cwbr_fused.integrations.metric_learning import ConfusionWeightedBhatLoss

LIBRARIES = ("timm", "torchvision", "pytorch_metric_learning", "lightning", "transformers")


def forget(*names: str) -> None:
    """Take libraries, and the modules here that were built on them, out of sys.modules."""
    for name in list(sys.modules):
        if name.split(".")[0] in names or re.search(r"integrations\.(lightning|hugg)", name):
            del sys.modules[name]


@pytest.fixture(params=["stand-in", "real"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Calls with the name of a library: makes it importable or skips."""

    def provide(name: str) -> None:
        if request.param == "real":
            # An installed library that does not go with this torch is as good as none.
            pytest.importorskip(name, exc_type=Exception)
            return
        forget(name)
        for module_name, module in stand_ins.modules().items():
            if module_name.split(".")[0] == name:
                monkeypatch.setitem(sys.modules, module_name, module)

    yield provide
    if request.param == "stand-in":
        monkeypatch.undo()
        forget(*LIBRARIES)


def snippets() -> list[tuple[str, str]]:
    """(library, code) of every example in the docstrings."""
    guides = Path(cwbr_fused.__file__).parent / "integrations"
    text = "".join(path.read_text() for path in sorted(guides.glob("*.py")))
    code = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(next(name for name in LIBRARIES if name in example), example) for example in code]


@pytest.mark.parametrize(("name", "code"), snippets(), ids=lambda s: s.splitlines()[0])
def test_example_in_the_docstring_runs(
    name: str, code: str, library: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    library(name)
    torch.manual_seed(0)
    exec(compile(code, name, "exec"), {"__name__": "example"})


def test_importing_the_package_imports_none_of_them() -> None:
    script = (
        "import sys, cwbr_fused, cwbr_fused.integrations.metric_learning\n"
        f"assert not set({[*LIBRARIES, 'pytorch_lightning']!r}) & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- PyTorch Metric Learning

EMBEDDINGS = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(12) % 4
WEIGHT = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))


def test_the_adapter_is_the_loss_of_its_classifiers_logits() -> None:
    logits = EMBEDDINGS @ WEIGHT.T
    linear = nn.Linear(6, 5, bias=False)
    linear.weight.data = WEIGHT
    softmax = stand_ins.NormalizedSoftmaxLoss(5, 6)
    for classifier, expected in (
        (WEIGHT, logits),
        (linear, logits),
        (softmax, softmax.get_logits(EMBEDDINGS)),
    ):
        loss_func = ConfusionWeightedBhatLoss(classifier, top_m=3, objective="log_overlap")
        wanted = cwbr_fused.loss(EMBEDDINGS, expected, LABELS, top_m=3, objective="log_overlap")
        assert torch.equal(loss_func(EMBEDDINGS, LABELS), wanted)
        assert torch.equal(loss_func(EMBEDDINGS, LABELS, None, None, None), wanted)
        assert not list(loss_func.parameters())
    without = ConfusionWeightedBhatLoss(top_m=3, objective="log_overlap")
    assert torch.equal(without(EMBEDDINGS, LABELS, logits=expected), wanted)


def test_the_adapter_gives_gradients_to_the_embeddings_alone() -> None:
    embeddings, weight = EMBEDDINGS.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    ConfusionWeightedBhatLoss(weight)(embeddings, LABELS).backward()
    assert embeddings.grad is not None
    assert embeddings.grad.abs().sum() > 0
    assert weight.grad is None


def test_a_copied_adapter_keeps_its_classifier_and_options() -> None:
    loss_func = ConfusionWeightedBhatLoss(WEIGHT, top_m=2)
    for twin in (copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))):
        assert torch.equal(twin(EMBEDDINGS, LABELS), loss_func(EMBEDDINGS, LABELS))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ConfusionWeightedBhatLoss("head"), TypeError, "classifier: .*'head'"),
        (lambda: ConfusionWeightedBhatLoss(top=3), TypeError, "unexpected keyword argument 'top'"),
        (lambda: ConfusionWeightedBhatLoss(top_m=0), ValueError, "top_m: .*>= 1"),
        (lambda: ConfusionWeightedBhatLoss()(EMBEDDINGS, LABELS), ValueError, "logits: .*None"),
        (
            lambda: ConfusionWeightedBhatLoss(WEIGHT)(EMBEDDINGS, LABELS, (LABELS,)),
            ValueError,
            "indices_tuple: .*does not support",
        ),
        (
            lambda: ConfusionWeightedBhatLoss(WEIGHT)(EMBEDDINGS, LABELS[:3]),
            ValueError,
            r"labels: .*\(12,\).*\(3,\)",
        ),
        (
            lambda: ConfusionWeightedBhatLoss(WEIGHT)(EMBEDDINGS, LABELS.tolist()),
            TypeError,
            "labels: .*list",
        ),
    ],
)
def test_the_adapter_names_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- Lightning


def lightning_parts(fail_at: int = -1) -> tuple[Any, Any, Any]:
    """A module, its batches, and a trainer, from whichever `lightning` is importable now."""
    lightning = importlib.import_module("lightning.pytorch")
    callback = importlib.import_module("cwbr_fused.integrations.lightning").RegularizerCallback

    class Classifier(lightning.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 4)
            self.cwbr = callback(["body"], top_m=3)
            self.totals: list[Tensor] = []
            self.features_left: list[int] = []

        def configure_callbacks(self) -> list[Any]:
            return [self.cwbr]

        def training_step(self, batch: Any, index: int) -> Tensor:
            self.features_left.append(len(self.cwbr.catcher.feats))
            if index == fail_at:
                raise RuntimeError("out of luck")
            inputs, targets = batch
            logits = self.head(self.body(inputs).relu())
            total: Tensor = self.cwbr.total(cross_entropy(logits, targets), logits, targets)
            self.totals.append(total.detach())
            return total

        def validation_step(self, batch: Any, index: int) -> None:
            self.features_left.append(len(self.cwbr.catcher.feats))
            self.head(self.body(batch[0]).relu())

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    batches = [(EMBEDDINGS * scale, LABELS) for scale in (1.0, 0.5, 2.0)]
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", enable_model_summary=False, **quiet
    )
    return Classifier(), torch.utils.data.DataLoader(batches, batch_size=None), trainer


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_on_the_total_loss_and_logs_it(library: Any) -> None:
    library("lightning")
    model, batches, trainer = lightning_parts()
    twin = copy.deepcopy(model)
    trainer.fit(model, batches, batches)

    optimizer = twin.configure_optimizers()
    for total, (inputs, targets) in zip(model.totals, list(batches) * 2, strict=True):
        feature = twin.body(inputs)
        logits = twin.head(feature.relu())
        ce, reg = cross_entropy(logits, targets), cwbr_fused.loss(feature, logits, targets, top_m=3)
        expected = cwbr_fused.scale_match(ce, reg)
        torch.testing.assert_close(total, expected.detach())
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    for parameter, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted)

    logged = trainer.callback_metrics
    torch.testing.assert_close(logged["cwbr/reg"], reg.detach())
    torch.testing.assert_close(logged["cwbr/scale"], (ce / (reg + 1e-6)).detach())


@pytest.mark.filterwarnings("ignore")
def test_lightning_keeps_no_feature_and_no_hook(library: Any) -> None:
    library("lightning")
    model, batches, trainer = lightning_parts()
    trainer.fit(model, batches, batches)
    assert set(model.features_left) == {0}
    assert not model.body._forward_hooks

    model, batches, trainer = lightning_parts(fail_at=1)
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer.fit(model, batches)
    assert not model.body._forward_hooks
    assert not model.cwbr.catcher.feats


def test_a_callback_that_the_trainer_does_not_know_is_an_error(library: Any) -> None:
    library("lightning")
    model, batches, _ = lightning_parts()
    with pytest.raises(ValueError, match=r"features: expected layers \['body'\]"):
        model.training_step(next(iter(batches)), 0)


# ---- transformers


def test_hugging_face_trains_on_the_total_loss_and_evaluates_on_the_plain_one(
    library: Any, tmp_path: Any
) -> None:
    library("transformers")
    transformers = importlib.import_module("transformers")
    integration = importlib.import_module("cwbr_fused.integrations.huggingface")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.ViTConfig(
        **sizes,
        intermediate_size=8,
        image_size=8,
        patch_size=4,
        num_labels=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = transformers.ViTForImageClassification(config)
    trainer = integration.RegularizedTrainer(
        model=model,
        args=transformers.TrainingArguments(output_dir=str(tmp_path), max_steps=1),
        train_dataset=[],
        hidden_states=[1, -1],
        regularizer={"top_m": 2, "objective": "log_overlap"},
    )
    inputs = {"pixel_values": torch.randn(12, 3, 8, 8), "labels": LABELS}
    model.train()
    total = trainer.compute_loss(model, inputs)
    output = model(**inputs, output_hidden_states=True)
    features = [output["hidden_states"][index] for index in (1, -1)]
    options = {"objective": "log_overlap"}
    reg = cwbr_fused.loss(features, output["logits"], LABELS, top_m=2, **options)
    expected = cwbr_fused.scale_match(output["loss"], reg, **options)
    parameters = list(model.parameters())
    for actual, wanted in zip(
        (total, *torch.autograd.grad(total, parameters, allow_unused=True)),
        (expected, *torch.autograd.grad(expected, parameters, allow_unused=True)),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted)

    model.eval()
    plain, outputs = trainer.compute_loss(model, inputs, return_outputs=True)
    torch.testing.assert_close(plain, output["loss"])
    assert outputs.get("hidden_states") is None
    with pytest.raises(ValueError, match=r"inputs: expected 'labels'.*pixel_values"):
        trainer.compute_loss(model.train(), {"pixel_values": inputs["pixel_values"]})
