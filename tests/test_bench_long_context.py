"""The benchmark of long contexts runs and writes what it promises; its bytes are the formula's. Not its times."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.effort import FULL, LIMIT_S

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1: it starts four interpreters")
def test_bench_long_context(tmp_path: Path) -> None:
    out = tmp_path / "long_context.json"
    command = [sys.executable, "-m", "benchmarks.bench_long_context", "--quick", "--json", str(out)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {"device", "threads", "commit", "versions"} <= set(report["environment"])
    steps = [row for row in report["rows"] if row["method"] != "memory"]
    assert [row["method"] for row in steps] == ["floor", "CP 1", "CP 2"]
    for row in steps:
        assert row["wall_s"]["p20"] <= row["wall_s"]["median"] <= row["wall_s"]["p80"]
        assert row["wire_bytes"] == row["formula_bytes"], row
        assert f"| {row['method']} |" in result.stdout
    memory = {(row["length"], row["context"]): row for row in report["rows"] if row["method"] == "memory"}
    assert list(memory) == [(64, 1), (64, 2), (128, 1), (128, 2)]
    for length in (64, 128):
        assert memory[length, 2]["activations_bytes"] < memory[length, 1]["activations_bytes"]
    assert memory[128, 1]["activations_bytes"] > memory[64, 1]["activations_bytes"]
