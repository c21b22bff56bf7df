"""Checks and timings of the kernels on a GPU: `python benchmarks/gpu`, see __main__.py."""
