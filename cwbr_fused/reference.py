"""The operations and the published form in pure PyTorch: what every kernel must compute."""

from cwbr_fused.operations import reference as _operations
from cwbr_fused.operations.reference import *  # noqa: F403
from cwbr_fused.overlap import reference as _published
from cwbr_fused.overlap.reference import *  # noqa: F403

__all__ = _operations.__all__ + _published.__all__
