"""The recommended form: `CWBR`."""
