"""benchmarks/gpu_check.sh on a CPU: every part that runs there is carried out in small shapes, a part that fails or
hangs costs its own results alone, and the file on disk has what is done. Says nothing about CUDA.

(Its name puts it beside test_benchmarks.py, whose zygote forks its processes.)
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_check import __main__ as gpu_check
from benchmarks.gpu_check import machine
from benchmarks.gpu_check.part import Result
from benchmarks.gpu_check.parts import PARTS, Part
from tests.support.effort import LIMIT_S
from tests.support.vllm_zygote import forked_programs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
NAMES = [part.name for part in PARTS]
# The others are benchmarks with tests of their own (test_benchmarks.py); the nightly run has all.
GATE = ("machine", "exact", "kernels", "commands", "models", "memory", "topk")


def check(path, *options):
    """The exit code, and the parts by name."""
    code = gpu_check.main(
        ["--device", "cpu", "--quick", "--dir", str(path), "--json", str(path / "gpu.json"), *options]
    )
    return code, {part["name"]: part for part in json.loads((path / "gpu.json").read_text())["parts"]}


def test_every_part_runs_on_a_cpu_or_says_that_it_needs_cuda(tmp_path):
    wanted = NAMES if os.environ.get("GKD_TEST_FULL") == "1" else GATE
    with forked_programs():
        code, parts = check(tmp_path, "--parts", *wanted, "--seconds", str(LIMIT_S), "--patience", "100")
    told = {name: part.get("output") for name, part in parts.items() if part["status"] not in ("ok", "left out")}
    assert code == 0, told
    assert {name for name, part in parts.items() if part["status"] == "left out"} == {"kernels"}
    assert parts["kernels"]["why"] == "needs CUDA"
    assert parts["machine"]["result"]["bf16_tflop_per_s"] > 0
    assert parts["memory"]["result"]["plain"]["found_bytes"] > 0
    for name, part in parts.items():
        assert name == "kernels" or part["result"]["ok" if name in GATE else "rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"], "models are gone"


def test_a_part_that_fails_or_hangs_costs_its_own_results_alone(tmp_path, monkeypatch):
    """The second never ends by itself, and has written something before."""

    def script(text):
        return lambda device, quick, directory, out: [text, str(out)]

    commands = {
        "bad": "raise SystemExit(3)",
        "hangs": "import sys, time; open(sys.argv[1], 'w').write('{\"half\": 1}'); time.sleep(1000)",
        "well": "print('here')",
    }
    parts = [Part(name, 2.0 if name == "hangs" else LIMIT_S, name, script(text)) for name, text in commands.items()]
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "RUN", "-c")
    code, found = check(tmp_path)
    assert code == 1
    assert {name: part["status"] for name, part in found.items()} == {"bad": "failed", "hangs": "cut", "well": "ok"}
    assert found["hangs"]["result"] == {"half": 1}, "what it had written before it was cut"
    code, found = check(tmp_path, "--seconds", "0")
    assert {part["status"] for part in found.values()} == {"left out"}
    assert code == 0


def test_a_comparison_that_does_not_agree_fails_its_part(tmp_path):
    result = Result(tmp_path / "part.json")
    result.holds("near", 0.5, 1.0)
    assert result["ok"]
    result.holds("not a number", float("nan"), 1.0)
    assert not result["ok"]
    result.holds("near again", 0.5, 1.0)
    written = json.loads((tmp_path / "part.json").read_text())
    assert not written["ok"]
    assert [check["ok"] for check in written["checks"]] == [True, False, True]


def test_a_module_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron_gkd.topk_jsd", None)
    assert "megatron_gkd.topk_jsd" in machine.imports()


def test_the_script_names_what_is_wrong(tmp_path):
    done = subprocess.run(
        ["bash", "benchmarks/gpu_check.sh", "--wheels", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "there is no wheel in it" in done.stderr


def test_all_parts_together_fit_nine_minutes():
    """The parts that matter most are within the time even where each of them needs all of its own."""
    seconds = gpu_check._parse(["--json", "x"]).seconds
    assert seconds <= 540 - 20, "installing and describing take some"
    assert sum(part.limit_s for part in PARTS[:7]) <= seconds + 60
