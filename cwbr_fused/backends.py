"""Which implementation runs, and why not another; see `cwbr_fused.operations.backends`."""

from cwbr_fused.operations.backends import *  # noqa: F403
from cwbr_fused.operations.backends import __all__ as __all__
