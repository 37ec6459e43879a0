"""Runs support/interpreted_kernels.py and support/interpreted_topk_kernels.py, the kernels under Triton's interpreter,
in a process of their own (see there)."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.effort import LIMIT_S
from tests.support.forkserver import PRELOAD, SHARED

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent.parent


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_kernels_under_the_interpreter():
    # The ranks need the losses alone, and so does pytest: megatron-core would be 15 CPU-seconds.
    preload = "tests.support.interpreted_kernels"
    env = {name: value for name, value in os.environ.items() if name != SHARED}
    env |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", PRELOAD: preload}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "--noconftest",
        "tests/support/interpreted_kernels.py",
        "tests/support/interpreted_topk_kernels.py",
    ]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed, result.stdout[-2000:]
    assert int(passed[1]) >= 10, result.stdout[-2000:]
    assert "skipped" not in result.stdout, result.stdout[-2000:]
