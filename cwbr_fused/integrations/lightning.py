"""The regularizer in Lightning.

What a Lightning callback can do decides the form. It sees the loss but cannot replace it, for the
return values of its hooks are ignored; so the loss is put together in `training_step`, where the
logits are. All else is the callback's: the hooks that catch the features, when they are forgotten,
and logging. The module owns the callback and gives it to the trainer:

```python
import torch
from lightning.pytorch import LightningModule
from torch.nn.functional import cross_entropy
from cwbr_fused.integrations.lightning import RegularizerCallback

class Classifier(LightningModule):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 16), torch.nn.Linear(16, 4)
        self.cwbr = RegularizerCallback(["body"], top_m=64)

    def configure_callbacks(self):
        return [self.cwbr]

    def training_step(self, batch, batch_idx):
        inputs, targets = batch
        logits = self.head(self.body(inputs).relu())
        return self.cwbr.total(cross_entropy(logits, targets), logits, targets)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
```

Lightning replaces the sampler of a distributed run: for `PKSampler`, which shards itself, pass
`Trainer(use_distributed_sampler=False)`. For statistics over all processes: `group="world"`.

Needs the package `lightning` or `pytorch_lightning`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cwbr_fused.inputs.features import FeatureCatcher
from cwbr_fused.overlap.loss import scale_match
from cwbr_fused.overlap.module import ConfusionWeightedBhatReg

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ModuleNotFoundError:
        from pytorch_lightning import Callback, LightningModule, Trainer

__all__ = ["RegularizerCallback"]

SCALE_EPS = 1e-6


class RegularizerCallback(Callback):
    """Catches the features of chosen layers while `Trainer.fit` runs, and regularizes them.

    Args:
        layers: dotted names of modules in the LightningModule, e.g. `["model.layer4"]`. Their
            names are looked up when fitting starts, after `setup` and `configure_model`.
        options: keywords of `cwbr_fused.ConfusionWeightedBhatReg`: top_m, min_count, eps,
            objective, backend, group.

    Logs after each training batch, on the module's behalf: `cwbr/reg`, the regularizer, and
    `cwbr/scale`, its weight against the cross-entropy.
    """

    def __init__(self, layers: Sequence[str], **options: Any) -> None:
        self.regularizer = ConfusionWeightedBhatReg(layers, **options)
        self.catcher = FeatureCatcher()
        self.metrics: dict[str, Tensor] = {}

    def total(self, ce: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss for `training_step` to return: `scale_match(ce, reg)`.

        Args:
            ce: scalar cross-entropy.
            logits: (B, C), of the forward that just ran.
            targets: (B,) integer classes.

        Raises:
            ValueError: the layers have not run, also because the trainer does not know the
                callback; and as `cwbr_fused.loss` and `cwbr_fused.scale_match`.
        """
        reg = self.regularizer(self.catcher.feats, logits, targets)
        objective = self.regularizer.objective
        value = reg.detach()
        scale = ce.detach() if objective == "log_overlap" else ce.detach() / (value + SCALE_EPS)
        self.metrics = {"cwbr/reg": value, "cwbr/scale": scale}
        return scale_match(ce, reg, SCALE_EPS, objective=objective)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.catcher = FeatureCatcher(pl_module, self.regularizer.layer_names)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        self.catcher.clear()
        pl_module.log_dict(self.metrics)
        self.metrics = {}

    def on_validation_batch_end(self, *args: Any, **kwargs: Any) -> None:
        self.catcher.clear()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._release()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._release()

    def _release(self) -> None:
        self.catcher.remove()
        self.catcher.clear()
