"""The benchmarks run and write what they promise. Says nothing about the numbers."""

import contextlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.bench_layouts import kendall, order
from tests.support.effort import FULL, LIMIT_S
from tests.support.vllm_zygote import forked_programs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def _run(*arguments: str, forked: bool = False) -> subprocess.CompletedProcess[str]:
    """A benchmark, by a new interpreter or, with all that it starts, forked from a process that has imported vLLM."""
    with forked_programs() if forked else contextlib.nullcontext():
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_S
        )


@pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed")
def test_bench_loss(tmp_path):
    out = tmp_path / "loss.json"
    result = _run("benchmarks.bench_loss", "--quick", "--cpu", "--json", str(out), forked=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {"device", "threads", "commit", "versions"} <= set(report["environment"])
    rows = {row["method"]: row for row in report["rows"]}
    assert {"products", "naive", "chunked", "liger_eager", "unfused", "fused", "fused_tp2"} <= set(rows)
    for row in rows.values():
        assert {"tokens", "hidden", "vocab", "dtype", "beta"} <= set(row)
        assert row["wall_s"]["p20"] <= row["wall_s"]["median"] <= row["wall_s"]["p80"]
        assert row["peak_bytes"] >= row["gradient_bytes"] > 0
        if row["method"] != "products":
            assert row["head_grad_error"] < 1e-4
    assert all(f"| {name} |" in result.stdout for name in rows), "the table names every method"


def test_bench_convert(tmp_path):
    out = tmp_path / "convert.json"
    result = _run("benchmarks.bench_convert", "--quick", "--dir", str(tmp_path), "--json", str(out), forked=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert {"device", "threads", "commit", "versions"} <= set(report["environment"])
    methods = ["read", "load", "write", "export", "copy", "to_megatron", "to_hf"]
    assert [row["method"] for row in report["rows"]] == methods
    for row in report["rows"]:
        assert row["wall_s"]["p20"] <= row["wall_s"]["median"] <= row["wall_s"]["p80"]
        assert row["gb_per_s"]["median"] > 0
        assert ("of_plain" in row) == (row["method"] not in ("read", "write", "copy"))
        assert f"| {row['method']} |" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["convert.json"], "what was written is gone"


def test_two_orders_are_compared():
    values = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    assert kendall(values, values) == 1.0
    assert kendall(values, {name: -value for name, value in values.items()}) == -1.0
    assert kendall(values, values | {"a": 2.5}) == pytest.approx((5 - 1) / 6)
    assert order({"a": 3.0, "b": 1.0}) == ["b", "a"]


@pytest.mark.skipif(not FULL, reason="the night's: six layouts of four ranks")
def test_bench_layouts(tmp_path):
    out = tmp_path / "layouts.json"
    result = _run("benchmarks.bench_layouts", "--quick", "--limit_s", "0", "--json", str(out))
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(out.read_text(encoding="utf-8"))
    names = [row["layout"] for row in report["rows"]]
    assert len(names) == 6
    assert all(sorted(found) == sorted(names) for found in report["orders"].values())
    assert all(-1 <= tau <= 1 for tau in report["kendall_tau"].values())
    assert all(f"| {name} |" in result.stdout for name in names)
    phases = {row["layout"]: row["predicted_phases_s"] for row in report["rows"]}
    assert all(of_layout["operations"] > 0 for of_layout in phases.values())
    assert {name for name in names if "groups: pp" in phases[name]} == {name for name in names if "PP" in name}


def test_bench_rollout(tmp_path):
    out = tmp_path / "rollout.json"
    result = _run("benchmarks.bench_rollout", "--quick", "--json", str(out), forked=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = {row["method"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == ["copy", "load", "push", "gather", "push_load", "verify", "vllm", "generate"]
    assert rows["push"]["of_load"] > 0
    assert rows["vllm"]["of_generate"] > 0
    for row in rows.values():
        values = row.get("wall_s") or row["tokens_per_s"]
        assert 0 < values["p20"] <= values["median"] <= values["p80"]
    assert all(f"| {name} |" in result.stdout for name in rows)


def test_bench_checkpoint(tmp_path):
    out = tmp_path / "checkpoint.json"
    result = _run("benchmarks.bench_checkpoint", "--quick", "--dir", str(tmp_path), "--json", str(out), forked=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(out.read_text(encoding="utf-8"))
    assert [row["method"] for row in report["rows"]] == ["write", "save", "stop", "read", "hash", "verify", "load"]
    for row in report["rows"]:
        assert 0 < row["wall_s"]["p20"] <= row["wall_s"]["median"] <= row["wall_s"]["p80"]
        assert ("of_plain" in row) == (row["method"] not in ("read", "write"))
        assert f"| {row['method']} |" in result.stdout
    assert report["rows"][2]["of_save"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.json"], "what was written is gone"


def test_bench_teacher(tmp_path):
    out = tmp_path / "teacher.json"
    result = _run("benchmarks.bench_teacher", "--quick", "--json", str(out), forked=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = {row["method"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == ["forward", "hidden", "top64", "logits", "colocate", "separate", "local", "server"]
    assert rows["hidden"]["bytes_per_token"] == 64 * 4
    assert rows["logits"]["bytes_per_token"] == 300 * 4
    assert rows["separate"]["of_colocate"] > 0
    assert rows["server"]["of_local"] > 0
    assert all(f"| {name} |" in result.stdout for name in rows)


def test_bench_step(tmp_path):
    out = tmp_path / "step.json"
    levers = ["plain", "recompute full"]
    result = _run("benchmarks.bench_step", "--quick", "--levers", *levers, "--json", str(out), forked=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert [row["method"] for row in rows] == levers
    for row in rows:
        phases = {name: found["median"] for name, found in row["phases_s"].items()}
        assert all(phases[name] > 0 for name in ("teacher", "forward", "loss", "backward", "update"))
        assert sum(phases.values()) == pytest.approx(row["wall_s"]["median"]), "one round: they are its sum"
        assert row["of_products"] > 0
        assert row["reduced_bytes"] > 0
        assert all(row["operators_s"][kind] > 0 for kind in ("products", "exponentials", "arithmetic", "outside"))
    assert rows[1]["peak_bytes"] < rows[0]["peak_bytes"], "recomputation saves memory"
    assert all(result.stdout.count(f"| {name} |") == 2 for name in levers), "seconds by phase and by kind of operator"


def test_bench_data(tmp_path):
    out = tmp_path / "data.json"
    result = _run("benchmarks.bench_data", "--quick", "--dir", str(tmp_path), "--json", str(out), forked=True)
    assert result.returncode == 0, result.stderr[-3000:]
    rows = {row["method"]: row for row in json.loads(out.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == ["render", "library", "one", "batch", "batch_all", "hash", "first", "later", "map"]
    for row in rows.values():
        assert 0 < row["wall_s"]["p20"] <= row["wall_s"]["median"] <= row["wall_s"]["p80"]
        assert row["of_one"] > 0
    assert all(f"| {name} |" in result.stdout for name in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"], "what was written is gone"


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.name)
def test_recorded_results_can_be_read(path):
    report = json.loads(path.read_text(encoding="utf-8"))
    assert report["environment"]["commit"], "a recorded result names the code that made it"
    assert len(report["rows"]) > 3, "at the least two systems in two modes"
