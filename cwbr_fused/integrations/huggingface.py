"""The regularizer in the Trainer of Hugging Face `transformers`.

```python
import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification
from cwbr_fused.integrations.huggingface import RegularizedTrainer

config = ViTConfig(
    hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
    image_size=8, patch_size=4, num_labels=4,
)
images = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 4} for i in range(16)]
trainer = RegularizedTrainer(
    model=ViTForImageClassification(config),
    args=TrainingArguments(output_dir="runs", max_steps=2, report_to=[], use_cpu=True),
    train_dataset=images,
    hidden_states=[-2, -1],
    regularizer={"top_m": 64},
)
trainer.train()
```

Needs the package `transformers`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from cwbr_fused.overlap.loss import loss, scale_match

__all__ = ["RegularizedTrainer"]


class RegularizedTrainer(Trainer):
    """A Trainer whose training loss is `scale_match(ce, loss(hidden states, logits, labels))`.

    The loss that the Trainer itself computes, label smoothing, `compute_loss_func` and the division
    by `num_items_in_batch` included, is the cross-entropy here, and the regularizer follows its
    scale. Evaluation and prediction are untouched: they report the plain loss.

    The model must be a classifier that takes `output_hidden_states=True`. Hidden states are tokens
    (B, N, D), of which the first counts, or maps (B, C, H, W), which are averaged.

    Args:
        hidden_states: which of `outputs.hidden_states` to regularize, by index.
        regularizer: keywords of `cwbr_fused.loss`, such as `{"top_m": 64}`.
        args, kwargs: of `transformers.Trainer`.
    """

    def __init__(
        self,
        *args: Any,
        hidden_states: Sequence[int] = (-1,),
        regularizer: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.hidden_states = tuple(hidden_states)
        self.regularizer = dict(regularizer or {})

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """See `transformers.Trainer.compute_loss`; regularized while the model trains.

        Raises:
            ValueError: `inputs` has no "labels"; and as `cwbr_fused.loss`.
        """
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "labels" not in inputs:
            raise ValueError(f"inputs: expected 'labels', (B,) classes, got only {sorted(inputs)}")
        # The Trainer may take the labels out of the inputs that it is given.
        targets = inputs["labels"]
        ce, outputs = super().compute_loss(
            model, {**inputs, "output_hidden_states": True}, True, num_items_in_batch
        )
        features = [outputs["hidden_states"][index] for index in self.hidden_states]
        reg = loss(features, outputs["logits"], targets, **self.regularizer)
        objective = self.regularizer.get("objective", "overlap")
        total = scale_match(ce.mean(), reg, objective=objective)  # DataParallel: a loss per GPU
        return (total, outputs) if return_outputs else total
