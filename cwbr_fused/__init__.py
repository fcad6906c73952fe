"""Confusion-weighted Bhattacharyya regularization (CWBR) for fine-grained classification.

    cwbr = cwbr_fused.CWBR(num_classes)
    features = cwbr.catch(model)
    for images, targets in loader:
        logits = model(images)
        loss = cross_entropy(logits, targets)
        cwbr(features, logits, targets)     # between forward and backward
        loss.backward()

`CWBR` is the recommended form. `loss`, `scale_match` and `ConfusionWeightedBhatReg` compute the
published form faithfully, for study and comparison: it lowers accuracy where it was measured.
`backends.explain()` says what runs on this machine.
"""

from cwbr_fused import backends, functional, reference
from cwbr_fused.balanced.module import CWBR
from cwbr_fused.inputs.features import FeatureCatcher
from cwbr_fused.inputs.pooling import to_vec
from cwbr_fused.operations.warning import CWBRWarning
from cwbr_fused.overlap.loss import loss, scale_match
from cwbr_fused.overlap.module import ConfusionWeightedBhatReg
from cwbr_fused.overlap.sampling import PKSampler
from cwbr_fused.warming import warm_up

__version__ = "0.1.0"

__all__ = [
    "CWBR",
    "CWBRWarning",
    "ConfusionWeightedBhatReg",
    "FeatureCatcher",
    "PKSampler",
    "backends",
    "functional",
    "loss",
    "reference",
    "scale_match",
    "to_vec",
    "warm_up",
]
