"""The checks of `benchmarks/gpu_check.py`: a module each, with a function `check` that reports rows."""
