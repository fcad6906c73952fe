"""The published form, computed faithfully. Do not train with it: use `cwbr_fused.CWBR`."""
