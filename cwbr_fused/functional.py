"""The steps of the published form one by one; see `cwbr_fused.overlap.functional`."""

from cwbr_fused.overlap.functional import *  # noqa: F403
from cwbr_fused.overlap.functional import __all__ as __all__
