"""The regularizer in the call form of PyTorch Metric Learning, `loss_func(embeddings, labels)`.

It goes beside that library's losses, alone or in its `MultipleLosses`:

```python
import torch
from pytorch_metric_learning.losses import MultipleLosses, NormalizedSoftmaxLoss
from cwbr_fused.integrations.metric_learning import ConfusionWeightedBhatLoss

trunk = torch.nn.Linear(16, 8)
softmax = NormalizedSoftmaxLoss(num_classes=5, embedding_size=8)
loss_func = MultipleLosses([softmax, ConfusionWeightedBhatLoss(softmax)], weights=[1, 0.1])

images, labels = torch.randn(12, 16), torch.arange(12) % 4
loss_func(trunk(images), labels).backward()
```

`MultipleLosses` weights by constants; for the weight that needs no tuning add the two yourself:
`scale_match(softmax(embeddings, labels), regularizer(embeddings, labels))`.

Nothing of that library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cwbr_fused.inputs import validation
from cwbr_fused.overlap.module import ConfusionWeightedBhatReg


class ConfusionWeightedBhatLoss(nn.Module):
    """`cwbr_fused.loss` of embeddings, called as `loss_func(embeddings, labels)`.

    The logits, which say what pairs of classes are confused and carry no gradient, are those of
    `classifier`, or the keyword `logits` of the call.

    Args:
        classifier: what gives (B, C) logits for (B, D) embeddings. A loss with `get_logits`, as
            the classification losses of PyTorch Metric Learning have it; a (C, D) weight matrix,
            for `embeddings @ weight.T`; or any callable, such as an `nn.Linear`. None: every call
            passes `logits`. It is *not* registered as a submodule: its parameters belong to
            whoever owns it. It runs once more per call, without gradient; one that changes by
            being run, as BatchNorm and Dropout do, wants its logits passed instead.
        options: keywords of `cwbr_fused.ConfusionWeightedBhatReg`: top_m, min_count, eps,
            objective, backend, group.

    Raises:
        TypeError: `classifier` is none of these, or an option has another name.
        ValueError: an option out of range.
    """

    def __init__(self, classifier: Tensor | Callable[..., Any] | None = None, **options: Any):
        super().__init__()
        if not (classifier is None or isinstance(classifier, Tensor) or callable(classifier)):
            raise TypeError(
                "classifier: expected a (C, D) weight tensor, a callable or None, "
                f"got {validation.describe(classifier)}"
            )
        self.regularizer = ConfusionWeightedBhatReg(["embeddings"], **options)
        # A tuple hides the classifier from nn.Module, which would list its parameters twice.
        self._classifier = (classifier,)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: object = None,
        ref_emb: object = None,
        ref_labels: object = None,
        *,
        logits: Tensor | None = None,
    ) -> Tensor:
        """The regularizer, a scalar; gradients flow to `embeddings`.

        Args:
            embeddings: (B, D).
            labels: (B,) integer classes in [0, C), on any device.
            indices_tuple, ref_emb, ref_labels: positions that the library passes; class statistics
                know no mined pairs and no second set, so they must be None.
            logits: (B, C), in place of the classifier's.

        Raises:
            TypeError, ValueError: as `cwbr_fused.loss`; or neither `logits` nor a classifier, or
                an argument that must be None.
        """
        unsupported = {"indices_tuple": indices_tuple, "ref_emb": ref_emb, "ref_labels": ref_labels}
        for name, given in unsupported.items():
            if given is not None:
                raise ValueError(
                    f"{name}: expected None, the regularizer does not support it, "
                    f"got {validation.describe(given)}"
                )
        validation.check_float_tensor("embeddings", embeddings, "(B, D)")
        batch = embeddings.shape[0]
        what = f"(B,) = ({batch},), as embeddings has B = {batch}"
        validation.check_index_tensor("labels", labels, batch, what)
        if logits is None:
            logits = self._logits(embeddings)
        value: Tensor = self.regularizer(
            {"embeddings": embeddings}, logits, labels.to(embeddings.device)
        )
        return value

    @torch.no_grad()
    def _logits(self, embeddings: Tensor) -> Tensor:
        (classifier,) = self._classifier
        if classifier is None:
            raise ValueError("logits: expected (B, C) logits, as there is no classifier, got None")
        if isinstance(classifier, Tensor):
            return embeddings @ classifier.T
        logits: Tensor = getattr(classifier, "get_logits", classifier)(embeddings)
        return logits
