"""Benchmarks: see NOTES.md, and the targets bench, plots and bench-* of the Makefile."""
