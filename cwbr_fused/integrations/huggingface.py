"""CWBR in the Trainer of Hugging Face `transformers`.

    trainer = CWBRTrainer(model=model, args=args, train_dataset=dataset)

Needs the package `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from cwbr_fused.balanced.module import CWBR
from cwbr_fused.inputs import validation
from cwbr_fused.inputs.features import FeatureCatcher
from cwbr_fused.integrations import FORMS, Form
from cwbr_fused.overlap.loss import loss, scale_match

__all__ = ["CWBRTrainer"]

FILE = "cwbr.pt"


class _SaveBanks(TrainerCallback):
    """Writes the class means into each checkpoint."""

    def __init__(self, cwbr: CWBR) -> None:
        self.cwbr = cwbr

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            torch.save(self.cwbr.state_dict(), folder / FILE)


class CWBRTrainer(Trainer):
    """A Trainer that trains a classifier with `CWBR`.

    The loss is what the Trainer computes, label smoothing and `compute_loss_func` included; CWBR
    adds its gradient at the features. Evaluation and prediction are untouched. Each checkpoint
    holds the class means in `cwbr.pt`, and `train(resume_from_checkpoint=...)` loads them.

    Args:
        layers: what `CWBR.catch` takes; None lets it choose.
        form: "cwbr", or "published" for the published form, which lowers accuracy where it was
            measured: the loss is then `scale_match(ce, cwbr_fused.loss(hidden states, ...))`.
        options: keywords of `cwbr_fused.CWBR`, or of `cwbr_fused.loss` for the published form. With
            several processes give `{"group": "world"}`.
        hidden_states: of the published form only: which of `outputs.hidden_states`, by index.
        args, kwargs: of `transformers.Trainer`. The model must return logits (B, C), with
            C = `config.num_labels`.

    Raises:
        ValueError: `form` is unknown.
    """

    def __init__(
        self,
        *args: Any,
        layers: Sequence[str] | None = None,
        form: Form = "cwbr",
        options: Mapping[str, Any] | None = None,
        hidden_states: Sequence[int] = (-1,),
        **kwargs: Any,
    ) -> None:
        validation.check_choice("form", form, FORMS)
        super().__init__(*args, **kwargs)
        self.layers, self.form, self.options = layers, form, dict(options or {})
        self.hidden_states = tuple(hidden_states)
        self._caught: tuple[nn.Module, FeatureCatcher] | None = None
        if form == "cwbr":
            config: Any = getattr(self.model, "config", None)
            self.cwbr = CWBR(config.num_labels, **self.options)
            self.add_callback(_SaveBanks(self.cwbr))

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """See `transformers.Trainer.train`; resumes with the class means of the checkpoint."""
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        if folder and self.form == "cwbr":
            state = torch.load(Path(folder) / FILE, map_location="cpu", weights_only=True)
            self.cwbr.load_state_dict(state)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See `transformers.Trainer.compute_loss`; calls CWBR while the model trains.

        Raises:
            ValueError: `inputs` has no "labels"; and as `CWBR`.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise ValueError(f"inputs: expected 'labels', (B,) classes, got only {sorted(inputs)}")
        # The Trainer may take the labels out of the inputs that it is given.
        targets, given = inputs["labels"], dict(inputs)
        if self.form == "published":
            given["output_hidden_states"] = True
        features = self._features(model)
        total, outputs = super().compute_loss(model, given, True, num_items_in_batch)
        if features is not None:
            self.cwbr(features, outputs["logits"], targets)
            features.clear()
        else:
            states = [outputs["hidden_states"][index] for index in self.hidden_states]
            reg = loss(states, outputs["logits"], targets, **self.options)
            objective = self.options.get("objective", "overlap")
            total = scale_match(total.mean(), reg, objective=objective)  # DataParallel: many losses
        return (total, outputs) if return_outputs else total

    def _features(self, model: nn.Module) -> FeatureCatcher | None:
        """The catcher of the model that is trained now; `model_init` may have made a new one."""
        if self.form == "published":
            return None
        plain = self.accelerator.unwrap_model(model, keep_torch_compile=False)
        if self._caught is None or self._caught[0] is not plain:
            self._caught = plain, self.cwbr.catch(plain, self.layers)
        return self._caught[1]
