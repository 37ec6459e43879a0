"""One GPU, bare, checked within nine minutes: `benchmarks/gpu_check.sh` (see __main__.py)."""
