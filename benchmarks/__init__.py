"""Benchmarks: each `bench_<what>.py` writes rows of data (see README.md)."""
