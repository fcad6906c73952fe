"""The operations and the published form in pure PyTorch: what every kernel must compute."""

from cwbr_fused.operations.reference import *  # noqa: F403
from cwbr_fused.overlap.reference import *  # noqa: F403
