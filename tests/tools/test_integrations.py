"""CWBR in the training loops of other libraries, against the real libraries.

An environment that lacks a library skips its tests; `make test` installs all of them.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from real_libraries import library, same_banks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import cwbr_fused
from cwbr_fused import CWBR
from cwbr_fused.integrations.metric_learning import CWBRLoss

LIBRARIES = ("timm", "torchvision", "pytorch_metric_learning", "lightning", "transformers")
LABELS = torch.arange(12) % 4
WEIGHT = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
# The classifier gets most of them right, not all: there is something to trust and to learn.
EMBEDDINGS = WEIGHT[LABELS] + 0.8 * torch.randn(12, 6, generator=torch.Generator().manual_seed(2))


def test_importing_the_package_imports_none_of_them() -> None:
    script = (
        "import sys, cwbr_fused, cwbr_fused.integrations.metric_learning\n"
        f"assert not set({[*LIBRARIES, 'pytorch_lightning']!r}) & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- PyTorch Metric Learning


def gradient_of(loss_func: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The gradient at the embeddings in the last of three equal steps, beside a plain loss."""
    for _ in range(3):
        embeddings = EMBEDDINGS.clone().requires_grad_()
        total = cross_entropy(embeddings @ WEIGHT.T, LABELS)
        total = total + loss_func(embeddings, *args, **kwargs)
        total.backward()
    assert embeddings.grad is not None
    return embeddings.grad


def gradient_of_cwbr(targets: Tensor) -> Tensor:
    cwbr = CWBR(5)

    def call(embeddings: Tensor) -> Tensor:
        cwbr(embeddings, (embeddings @ WEIGHT.T).detach(), targets)
        return embeddings.new_zeros(())

    return gradient_of(call)


def test_the_metric_learning_loss_adds_the_gradient_of_cwbr_and_nothing_to_the_value() -> None:
    linear = nn.Linear(6, 5, bias=False)
    linear.weight.data = WEIGHT
    wanted = gradient_of_cwbr(LABELS)
    plain = gradient_of(lambda embeddings: embeddings.new_zeros(()))
    assert not torch.allclose(wanted, plain)
    for classifier in (WEIGHT, linear):
        loss_func = CWBRLoss(classifier, num_classes=5)
        torch.testing.assert_close(gradient_of(loss_func, LABELS), wanted)
        assert loss_func(EMBEDDINGS, LABELS, None, None, None).item() == 0
        assert not list(loss_func.parameters())
    loss_func = CWBRLoss(num_classes=5)
    logits = EMBEDDINGS @ WEIGHT.T
    torch.testing.assert_close(gradient_of(loss_func, LABELS, logits=logits), wanted)


def test_samples_that_a_miner_leaves_out_are_unlabelled() -> None:
    miner = (torch.tensor([0, 1, 2]), torch.tensor([4, 5, 6]), torch.tensor([3, 7, 1]))
    targets = nn.functional.one_hot(LABELS, 5).float()
    targets[8:] = 0
    mined = gradient_of(CWBRLoss(WEIGHT, num_classes=5), LABELS, miner)
    torch.testing.assert_close(mined, gradient_of_cwbr(targets))
    none = tuple(torch.empty(0, dtype=torch.long) for _ in range(3))
    everything = gradient_of(CWBRLoss(WEIGHT, num_classes=5), LABELS, none)
    torch.testing.assert_close(everything, gradient_of_cwbr(LABELS))


def test_the_metric_learning_loss_goes_with_the_librarys_losses_and_miners() -> None:
    library("pytorch_metric_learning")
    from pytorch_metric_learning.losses import MultipleLosses, NormalizedSoftmaxLoss
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    softmax = NormalizedSoftmaxLoss(num_classes=5, embedding_size=6)
    softmax.W.data = WEIGHT.T.clone()
    cwbr = CWBRLoss(softmax, num_classes=5)
    losses, alone = MultipleLosses([softmax, cwbr]), MultipleLosses([softmax])
    miner = MultiSimilarityMiner()
    for _ in range(3):
        embeddings, twin = (EMBEDDINGS.clone().requires_grad_() for _ in range(2))
        mined = miner(EMBEDDINGS, LABELS)
        total, wanted = losses(embeddings, LABELS, mined), alone(twin, LABELS, mined)
        torch.testing.assert_close(total, wanted)
        total.backward()
        wanted.backward()
    assert not torch.allclose(embeddings.grad, twin.grad)
    # The published form is a term of the loss.
    published = CWBRLoss(softmax, num_classes=5, form="published", top_m=3)
    expected = cwbr_fused.loss(EMBEDDINGS, softmax.get_logits(EMBEDDINGS), LABELS, top_m=3)
    torch.testing.assert_close(published(EMBEDDINGS, LABELS), expected)


def test_a_copied_metric_learning_loss_keeps_its_classifier_and_class_means() -> None:
    loss_func = CWBRLoss(WEIGHT, num_classes=5)
    gradient_of(loss_func, LABELS)
    twins = copy.deepcopy(loss_func), pickle.loads(pickle.dumps(loss_func))
    assert all(same_banks(twin.regularizer, loss_func.regularizer) for twin in twins)
    wanted = gradient_of(loss_func, LABELS)
    for twin in twins:
        torch.testing.assert_close(gradient_of(twin, LABELS), wanted)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: CWBRLoss("head", num_classes=5), TypeError, "classifier: .*'head'"),
        (lambda: CWBRLoss(num_classes=5, top=3), TypeError, "unexpected keyword argument 'top'"),
        (lambda: CWBRLoss(num_classes=0), ValueError, "num_classes: .*>= 1"),
        (lambda: CWBRLoss(num_classes=5, form="plain"), ValueError, "form: .*'plain'"),
        (lambda: CWBRLoss(num_classes=5)(EMBEDDINGS, LABELS), ValueError, "logits: .*None"),
        (
            lambda: CWBRLoss(WEIGHT, num_classes=5)(EMBEDDINGS, LABELS, None, EMBEDDINGS),
            ValueError,
            "ref_emb: expected None",
        ),
        (
            lambda: CWBRLoss(WEIGHT, num_classes=5)(EMBEDDINGS, LABELS[:3]),
            ValueError,
            r"labels: .*\(12,\).*\(3,\)",
        ),
    ],
)
def test_the_metric_learning_loss_names_what_is_wrong(
    call: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()


# ---- Lightning

BATCHES = [(EMBEDDINGS * scale, LABELS) for scale in (1.0, 0.5, 2.0)]


def lightning_model(fail_at: int = -1) -> Any:
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))

        def training_step(self, batch: Any, index: int) -> Tensor:
            if index == fail_at:
                raise RuntimeError("out of luck")
            return cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, index: int) -> None:
            self.net(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier()


def lightning_fit(folder: Path, model: Any, callback: Any, epochs: int, **options: Any) -> Any:
    from lightning.pytorch import Trainer

    loader = torch.utils.data.DataLoader(BATCHES, batch_size=None)
    trainer = Trainer(
        default_root_dir=folder,
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        **{name: value for name, value in options.items() if name != "ckpt_path"},
    )
    trainer.fit(model, loader, loader, ckpt_path=options.get("ckpt_path"))
    return trainer


def by_hand(model: nn.Module, epochs: int, accumulate: int = 1) -> CWBR:
    """What the callback should do, written as a plain loop."""
    cwbr = CWBR(4)
    features = cwbr.catch(model, ["net.0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(epochs * len(BATCHES)):
        inputs, targets = BATCHES[step % len(BATCHES)]
        logits = model.net(inputs)
        cwbr(features, logits, targets)
        (cross_entropy(logits, targets) / accumulate).backward()
        last = (step + 1) % len(BATCHES) == 0
        if (step % len(BATCHES) + 1) % accumulate == 0 or last:
            optimizer.step()
            optimizer.zero_grad()
    features.remove()
    return cwbr


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_lightning_callback_trains_as_a_loop_by_hand(tmp_path: Path, accumulate: int) -> None:
    library("lightning")
    from cwbr_fused.integrations.lightning import CWBRCallback

    model = lightning_model()
    twin = copy.deepcopy(model)
    callback = CWBRCallback(4, logits="net", layers=["net.0"])
    options = {"accumulate_grad_batches": accumulate, "enable_checkpointing": False}
    trainer = lightning_fit(tmp_path, model, callback, 2, **options)
    assert same_banks(callback.cwbr, by_hand(twin, 2, accumulate))
    for parameter, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted)
    assert trainer.callback_metrics["cwbr/energy"].isfinite()


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_callback_resumes_with_its_class_means(tmp_path: Path) -> None:
    library("lightning")
    from cwbr_fused.integrations.lightning import CWBRCallback

    def callback() -> Any:
        return CWBRCallback(4, logits="net", layers=["net.0"])

    whole, half, rest = callback(), callback(), callback()
    through, stopped, resumed = lightning_model(), lightning_model(), lightning_model()
    lightning_fit(tmp_path / "whole", through, whole, 2)
    trainer = lightning_fit(tmp_path / "half", stopped, half, 1)
    path = tmp_path / "half.ckpt"
    trainer.save_checkpoint(path)
    lightning_fit(tmp_path / "rest", resumed, rest, 2, ckpt_path=path)
    assert same_banks(whole.cwbr, rest.cwbr)
    for parameter, wanted in zip(resumed.parameters(), through.parameters(), strict=True):
        assert torch.equal(parameter, wanted)


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_callback_leaves_no_hook_behind(tmp_path: Path) -> None:
    library("lightning")
    from cwbr_fused.integrations.lightning import CWBRCallback

    for fail_at, outcome in ((-1, nullcontext()), (1, pytest.raises(RuntimeError, match="luck"))):
        model = lightning_model(fail_at)
        callback = CWBRCallback(4, logits="net", layers=["net.0"])
        with outcome:
            lightning_fit(tmp_path, model, callback, 1, enable_checkpointing=False)
        assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_the_published_form_in_lightning_is_the_scale_matched_loss(tmp_path: Path) -> None:
    library("lightning")
    from cwbr_fused.integrations.lightning import CWBRCallback

    model = lightning_model()
    twin = copy.deepcopy(model)
    callback = CWBRCallback(4, logits="net", layers=["net.0"], form="published", top_m=3)
    lightning_fit(tmp_path, model, callback, 1, enable_checkpointing=False)
    optimizer = twin.configure_optimizers()
    for inputs, targets in BATCHES:
        feature = twin.net[0](inputs)
        logits = twin.net[2](feature.relu())
        reg = cwbr_fused.loss(feature, logits, targets, top_m=3)
        optimizer.zero_grad()
        cwbr_fused.scale_match(cross_entropy(logits, targets), reg).backward()
        optimizer.step()
    for parameter, wanted in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted)
    with pytest.raises(ValueError, match="layers: expected names"):
        CWBRCallback(4, logits="net", form="published")


# ---- accelerate


@pytest.mark.filterwarnings("ignore")
def test_accelerate_saves_and_loads_the_class_means(tmp_path: Path) -> None:
    library("accelerate")
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    cwbr = CWBR(4)
    features = cwbr.catch(model, ["0"])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.register_for_checkpointing(cwbr)
    for inputs, targets in BATCHES:
        logits = model(inputs)
        cwbr(features, logits, targets)
        accelerator.backward(cross_entropy(logits, targets))
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(tmp_path / "state"))
    kept = copy.deepcopy(cwbr)
    logits = model(EMBEDDINGS)
    cwbr(features, logits, LABELS)
    assert not same_banks(cwbr, kept)
    accelerator.load_state(str(tmp_path / "state"))
    assert same_banks(cwbr, kept)
