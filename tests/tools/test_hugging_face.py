"""CWBR in the Trainer of Hugging Face transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from real_libraries import library, same_banks
from torch.nn.functional import cross_entropy

import cwbr_fused


def hugging_face_trainer(folder: Path, steps: int, **options: Any) -> Any:
    import transformers

    from cwbr_fused.integrations.huggingface import CWBRTrainer

    torch.manual_seed(0)
    # Not a ViT, whose weights this version saves under names that its resumption does not know.
    config = transformers.ConvNextConfig(
        patch_size=2, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_labels=4
    )
    generator = torch.Generator().manual_seed(0)
    images = [
        {"pixel_values": torch.randn(3, 16, 16, generator=generator), "labels": i % 4}
        for i in range(16)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    model = transformers.ConvNextForImageClassification(config)
    return CWBRTrainer(model=model, args=arguments, train_dataset=images, **options)


@pytest.mark.filterwarnings("ignore")
def test_the_hugging_face_trainer_resumes_with_its_class_means(tmp_path: Path) -> None:
    library("transformers")
    whole, half = (hugging_face_trainer(tmp_path / name, 4) for name in ("whole", "half"))
    whole.train()
    assert whole.cwbr.health()
    half.args.max_steps = 2
    half.train()
    rest = hugging_face_trainer(tmp_path / "half", 4)
    rest.train(resume_from_checkpoint=True)
    assert same_banks(whole.cwbr, rest.cwbr)
    pairs = zip(whole.model.parameters(), rest.model.parameters(), strict=True)
    for parameter, wanted in pairs:
        torch.testing.assert_close(parameter, wanted)


@pytest.mark.filterwarnings("ignore")
def test_the_hugging_face_trainer_acts_on_the_gradient_and_leaves_evaluation_alone(
    tmp_path: Path,
) -> None:
    library("transformers")
    from transformers import Trainer

    trainer = hugging_face_trainer(tmp_path, 2, layers=["convnext.encoder.stages.1"])
    model = trainer.model
    batch = trainer.train_dataset[:8]
    inputs = {
        "pixel_values": torch.stack([row["pixel_values"] for row in batch]),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }
    assert torch.equal(
        trainer.compute_loss(model.eval(), inputs), Trainer.compute_loss(trainer, model, inputs)
    )
    model.train()
    gradients = []
    for call in (
        trainer.compute_loss,
        trainer.compute_loss,
        super(type(trainer), trainer).compute_loss,
    ):
        model.zero_grad()
        call(model, inputs).backward()
        gradients.append(model.convnext.embeddings.patch_embeddings.weight.grad.clone())
    first, second, plain = gradients
    torch.testing.assert_close(first, plain)  # no class mean is known yet
    assert not torch.allclose(second, plain)
    with pytest.raises(ValueError, match=r"inputs: expected 'labels'.*pixel_values"):
        trainer.compute_loss(model, {"pixel_values": inputs["pixel_values"]})


@pytest.mark.filterwarnings("ignore")
def test_the_published_form_in_the_hugging_face_trainer_is_the_scale_matched_loss(
    tmp_path: Path,
) -> None:
    library("transformers")
    trainer = hugging_face_trainer(
        tmp_path, 1, form="published", hidden_states=[-1], options={"top_m": 3}
    )
    batch = trainer.train_dataset[:8]
    inputs = {
        "pixel_values": torch.stack([row["pixel_values"] for row in batch]),
        "labels": torch.tensor([row["labels"] for row in batch]),
    }
    total, outputs = trainer.compute_loss(trainer.model.train(), inputs, return_outputs=True)
    ce = cross_entropy(outputs["logits"], inputs["labels"])
    state = outputs["hidden_states"][-1]
    reg = cwbr_fused.loss(state, outputs["logits"], inputs["labels"], top_m=3)
    torch.testing.assert_close(total, cwbr_fused.scale_match(ce, reg))
    with pytest.raises(ValueError, match=r"form: .*'plain'"):
        hugging_face_trainer(tmp_path, 1, form="plain")
