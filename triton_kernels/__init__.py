"""The operations as Triton kernels: NVIDIA and AMD GPUs, or the CPU under TRITON_INTERPRET=1.

One module per operation, with the signature of the operation's schema. `cwbr_fused` registers them
as the library `cwbr_fused_triton`; import this package through it.
"""

from .all_pair_distance import all_pair_distance, all_pair_distance_backward
from .class_attraction import class_attraction
from .class_moments import class_moments, class_moments_backward
from .confusion_weights import confusion_weights
from .follow_classes import follow_classes
from .group_by_class import group_by_class
from .observe_classes import observe_classes
from .pair_distance import pair_distance, pair_distance_backward
from .plan import plan
from .regularizer import regularizer, regularizer_backward
from .top_confusions import top_confusions
from .top_pairs import top_pairs
from .weighted_overlap import (
    weighted_overlap,
    weighted_overlap_backward,
    weighted_overlap_with_gradient,
)

__all__ = [
    "all_pair_distance",
    "all_pair_distance_backward",
    "class_attraction",
    "class_moments",
    "class_moments_backward",
    "confusion_weights",
    "follow_classes",
    "group_by_class",
    "observe_classes",
    "pair_distance",
    "pair_distance_backward",
    "plan",
    "regularizer",
    "regularizer_backward",
    "top_confusions",
    "top_pairs",
    "weighted_overlap",
    "weighted_overlap_backward",
    "weighted_overlap_with_gradient",
]
