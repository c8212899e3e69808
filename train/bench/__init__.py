"""Benchmarks: `python -m train.bench NAME`."""
