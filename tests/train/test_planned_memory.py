"""A run beside its plan.json: the summary at the start, one warning from a rank that holds more, nothing from others;
a run that starts with the file says what is in it, one without what the formula says. Not covered: what an allocator
counts on CUDA.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.planned_memory import PlannedMemory, by_formula
from tests.support.checkpoint_runs import FLAGS, write_inputs
from tests.support.program import run
from tests.support.runs import command_line

LAYOUT = Layout(tensor=1, pipeline=2, data=1)


def record(stage: int, gigabytes: float) -> dict[str, Any]:
    """Of `plan --output json`: 4 GB are reserved, 10 are a sampler's."""
    peaks = [{"loss": 1e9}, {"loss": 2e9, "teacher: weights": gigabytes * 1e9 - 2e9}]
    return {
        "rank": stage,
        "student_stage": stage,
        "peak_bytes": peaks,
        "sampler_bytes": 10e9,
        "needed_bytes": (gigabytes + 14) * 1e9,
    }


PLAN = [record(0, 20.0), record(1, 30.0)]


def planned(path: Path, plan: Any, rank: int, seen: list[float] | None) -> PlannedMemory:
    (path / "plan.json").write_text(plan if isinstance(plan, str) else json.dumps(plan))
    with patch.object(dist, "get_rank", lambda: rank):
        return PlannedMemory(path, LAYOUT, None if seen is None else lambda: int(seen[-1] * 1e9))


def test_a_rank_that_holds_more_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each by the plan of its own stage: what is reserved is foreseen, a sampler's part is not this process's."""
    caplog.set_level(logging.INFO, logger="megatron_gkd")
    seen = [23.9]
    first = planned(tmp_path, PLAN, 0, seen)
    assert [entry.message for entry in caplog.records] == [
        "planned (plan.json): 44.0 GB on the fullest rank at the peak of a step: teacher: weights 28.0, loss 2.0"
    ]
    caplog.clear()
    other = planned(tmp_path, PLAN, 1, [33.9])
    first.check(1)
    other.check(1)
    assert not caplog.records
    seen.append(24.1)
    first.check(2)
    first.check(3)
    (warning,) = caplog.records
    assert warning.levelname == "WARNING"
    assert warning.message.startswith("step 2: rank 0 has held 24.1 GB, and the plan (plan.json) foresaw 24.0: ")
    planned(tmp_path, PLAN, 1, None).check(1)  # on a CPU nothing is compared
    assert len(caplog.records) == 1


@pytest.mark.parametrize("text", ["{", "{}", '[{"flags": "--x", "needed_bytes": 1}]', "[1]"])
def test_what_is_no_plan_is_named_and_left(tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str) -> None:
    planned(tmp_path, text, 0, [1.0]).check(1)
    (warning,) = caplog.records
    assert str(tmp_path / "plan.json") in warning.message


MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"


def test_without_a_plan_the_formula_is_one(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With what `plan` reserves by itself, and by stage: the last one has the loss."""
    caplog.set_level(logging.INFO, logger="megatron_gkd")
    words = f"--model {MODELS / 'Qwen3-1.7B'} --teacher_model {MODELS / 'Qwen3-8B'} --dataset none --dtype bf16"
    words += " --pipeline_model_parallel_size 2 --global_batch_size 4 --max_length 1024 --save none"
    config = parse_run_config(words.split())
    said = by_formula(config, read_architecture(MODELS / "Qwen3-1.7B"), LAYOUT, LAYOUT)
    first, last = (record["needed_bytes"] for record in said())
    assert last > first > 4e9
    with patch.object(dist, "get_rank", lambda: 0):
        run = PlannedMemory(tmp_path, LAYOUT, lambda: round(first) + 1, said)
    (entry,) = caplog.records
    assert entry.message.startswith(f"planned (by formula, of rows as long as --max_length): {last / 1e9:.1f} GB on ")
    run.check(1)
    assert "the plan (by formula, of rows as long as --max_length) foresaw" in caplog.records[-1].message
    adapters = parse_run_config([*words.split(), "--tuner_type", "lora"])
    assert by_formula(adapters, read_architecture(MODELS / "Qwen3-1.7B"), LAYOUT, LAYOUT)() == []


def test_without_a_plan_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="megatron_gkd")
    PlannedMemory(tmp_path, LAYOUT, lambda: 10**12).check(1)
    assert not caplog.records


@pytest.mark.slow
def test_a_run_says_what_was_planned(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    (directory / "plan.json").write_text(json.dumps([record(0, 20.0)]))
    given = write_inputs(tmp_path) | FLAGS | dict(train_iters=1, save_hf=False, save=directory)
    done = run(["train", *command_line(**given)], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("planned (plan.json): 34.0 GB on the fullest rank") == 1
