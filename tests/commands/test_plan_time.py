"""The predicted seconds that `plan` prints beside the bytes follow the rates that are given and the bytes that ranks
hand over. Not covered: whether they are right (nothing has been timed on a GPU).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_gkd import cli
from megatron_gkd.commands.plan import _seconds
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.observe.allocations import Alive
from megatron_gkd.train.rehearsal import Rehearsed, architectures, planned_layouts
from tests.support.vision_models import write_tiny_vision

MODELS = Path(__file__).resolve().parents[2] / "examples" / "models"
ASKED = PlanConfig(world_size=8)


def seconds(asked: PlanConfig, handed: int, *flags: str) -> dict[str, float]:
    words = f"--model {MODELS / 'Qwen3-1.7B'} --dataset none --dtype bf16 --global_batch_size 64 --save none".split()
    config = parse_run_config([*words, "--tensor_model_parallel_size", "2", *flags])
    found = [Rehearsed(rank, 1, Alive({}), [], {"tp": handed // (rank + 1)}) for rank in range(2)]
    return _seconds(asked, config, architectures(config), found, *planned_layouts(config, asked.world_size))


TEACHER = ("--teacher_model", str(MODELS / "Qwen3-32B"), "--teacher_tensor_model_parallel_size", "8")


def test_they_follow_the_rates() -> None:
    before = seconds(ASKED, 7 * 10**9, *TEACHER)
    assert before["groups: tp"] == pytest.approx(7 / 350), "of the rank that hands over most"
    faster = seconds(replace(ASKED, matmul_tflops=2 * ASKED.matmul_tflops, node_gb_per_s=700.0), 7 * 10**9, *TEACHER)
    assert faster["teacher"] == pytest.approx(before["teacher"] / 2)
    assert faster["student"] == pytest.approx(before["student"] / 2)
    assert faster["groups: tp"] == pytest.approx(before["groups: tp"] / 2)
    assert before["teacher"] > 5 * seconds(ASKED, 0, "--teacher_model", str(MODELS / "Qwen3-1.7B"))["teacher"]


def test_a_student_that_teaches_itself_has_a_teachers_pass() -> None:
    itself = seconds(ASKED, 0)
    assert itself["teacher"] == pytest.approx(
        seconds(ASKED, 0, "--teacher_model", str(MODELS / "Qwen3-1.7B"))["teacher"], rel=1e-6
    )
    assert "teacher" not in seconds(ASKED, 0, "--objective", "sft")


def test_a_search_does_not_count_a_vision_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_vision(tmp_path / "model", "llava", decoder="llama", seed=1)
    models = f"--model {tmp_path / 'model'} --teacher_model {tmp_path / 'model'}"
    code = cli.main(["plan", *f"{models} --world_size 2 --lmbda 0 --save none --train_iters 1 --search".split()])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("megatron-gkd: error")]
    assert code == 2
    assert "plan --search with a vision tower" in line
