"""Confusion-weighted Bhattacharyya regularization (CWBR) for fine-grained classification.

    reg = cwbr_fused.loss(features, logits, targets)
    total = cwbr_fused.scale_match(ce, reg)

See `cwbr_fused.reference` for the mathematics in plain PyTorch, `cwbr_fused.functional` for the
single steps, and `cwbr_fused.backends.explain()` for what runs on this machine.
"""

from cwbr_fused import backends, functional, health, reference
from cwbr_fused.cwbr import CWBR
from cwbr_fused.features import FeatureCatcher, to_vec
from cwbr_fused.losses import loss, scale_match
from cwbr_fused.modules import ConfusionWeightedBhatReg
from cwbr_fused.sampling import PKSampler

__version__ = "0.1.0"

__all__ = [
    "CWBR",
    "ConfusionWeightedBhatReg",
    "FeatureCatcher",
    "PKSampler",
    "backends",
    "functional",
    "health",
    "loss",
    "reference",
    "scale_match",
    "to_vec",
]
