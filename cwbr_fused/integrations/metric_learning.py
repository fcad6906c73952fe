"""CWBR in the call form of PyTorch Metric Learning, `loss_func(embeddings, labels)`.

    loss_func = MultipleLosses([softmax, CWBRLoss(softmax, num_classes=200)])

Nothing of that library is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cwbr_fused.balanced.module import CWBR
from cwbr_fused.inputs import validation
from cwbr_fused.integrations import FORMS, Form
from cwbr_fused.overlap.module import ConfusionWeightedBhatReg

__all__ = ["CWBRLoss"]


class CWBRLoss(nn.Module):
    """`CWBR` on embeddings, called as `loss_func(embeddings, labels)` beside another loss.

    Its value is 0: it adds its gradient to that of the other losses at the embeddings, at its own
    strength, whatever its weight in `MultipleLosses`. The class means are in its state_dict.

    Args:
        classifier: what gives (B, C) logits for (B, D) embeddings. A loss with `get_logits`, as
            the classification losses of PyTorch Metric Learning have it; a (C, D) weight matrix,
            for `embeddings @ weight.T`; or any callable, such as an `nn.Linear`. None: every call
            passes `logits`. It is *not* registered as a submodule: its parameters belong to
            whoever owns it. It runs once more per call, without gradient; one that changes by
            being run, as BatchNorm and Dropout do, wants its logits passed instead.
        num_classes: C.
        form: "cwbr", or "published" for the published form, which lowers accuracy where it was
            measured: the value is then that of `cwbr_fused.loss`.
        options: keywords of `cwbr_fused.CWBR`, or of `cwbr_fused.ConfusionWeightedBhatReg`.

    Raises:
        TypeError: `classifier` is none of these, or an option has another name.
        ValueError: an option out of range, or `form` is unknown.
    """

    def __init__(
        self,
        classifier: Tensor | Callable[..., Any] | None = None,
        *,
        num_classes: int,
        form: Form = "cwbr",
        **options: Any,
    ) -> None:
        super().__init__()
        if not (classifier is None or isinstance(classifier, Tensor) or callable(classifier)):
            raise TypeError(
                "classifier: expected a (C, D) weight tensor, a callable or None, "
                f"got {validation.describe(classifier)}"
            )
        validation.check_choice("form", form, FORMS)
        self.form, self.num_classes = form, num_classes
        self.regularizer: nn.Module = (
            CWBR(num_classes, **options)
            if form == "cwbr"
            else ConfusionWeightedBhatReg(["embeddings"], **options)
        )
        # A tuple hides the classifier from nn.Module, which would list its parameters twice.
        self._classifier = (classifier,)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: object = None,
        ref_labels: object = None,
        *,
        logits: Tensor | None = None,
    ) -> Tensor:
        """Acts on the gradient at `embeddings`; returns 0, or the published regularizer.

        Args:
            embeddings: (B, D).
            labels: (B,) integer classes in [0, C), on any device.
            indices_tuple: of a miner: samples that it does not name are left out, unless it names
                none, as in the library's own classification losses.
            ref_emb, ref_labels: positions that the library passes; class statistics know no
                second set, so they must be None.
            logits: (B, C), in place of the classifier's.

        Raises:
            TypeError, ValueError: as `CWBR`; or neither `logits` nor a classifier, or an argument
                that must be None.
        """
        for name, given in (("ref_emb", ref_emb), ("ref_labels", ref_labels)):
            if given is not None:
                raise ValueError(f"{name}: expected None, got {validation.describe(given)}")
        validation.check_float_tensor("embeddings", embeddings, "(B, D)")
        batch = embeddings.shape[0]
        what = f"(B,) = ({batch},), as embeddings has B = {batch}"
        validation.check_index_tensor("labels", labels, batch, what)
        if logits is None:
            logits = self._logits(embeddings)
        targets = self._mined(labels.to(embeddings.device), indices_tuple)
        value: Tensor = self.regularizer({"embeddings": embeddings}, logits, targets)
        return value if self.form == "published" else embeddings.new_zeros(())

    def _mined(self, labels: Tensor, indices_tuple: tuple[Tensor, ...] | None) -> Tensor:
        """The labels, or soft targets with rows of zeros for samples that a miner left out."""
        if indices_tuple is None or all(len(indices) == 0 for indices in indices_tuple):
            return labels
        named = torch.zeros(len(labels), device=labels.device)
        named[torch.cat(indices_tuple).to(labels.device)] = 1
        one_hot = nn.functional.one_hot(labels.long(), self.num_classes)
        return one_hot * named[:, None]

    @torch.no_grad()
    def _logits(self, embeddings: Tensor) -> Tensor:
        (classifier,) = self._classifier
        if classifier is None:
            raise ValueError("logits: expected (B, C) logits, as there is no classifier, got None")
        if isinstance(classifier, Tensor):
            return embeddings @ classifier.T
        logits: Tensor = getattr(classifier, "get_logits", classifier)(embeddings)
        return logits
