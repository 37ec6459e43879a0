"""The predicted seconds that `plan` prints beside the bytes follow the rates that are given and the bytes that ranks
hand over. Not covered: whether they are right (nothing has been timed on a GPU).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_gkd import cli
from megatron_gkd.architecture import read_architecture
from megatron_gkd.commands.plan import _seconds
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.image_tokens import read_image_tokens
from megatron_gkd.data.pictures import striped_picture
from megatron_gkd.observe.allocations import Alive
from megatron_gkd.train.rehearsal import Rehearsed, architectures, planned_layouts
from megatron_gkd.train.step_time import Rates, Work, step_seconds
from megatron_gkd.train.tower_flops import tower_flops
from tests.support.dense_vision import load
from tests.support.effort import FULL
from tests.support.ranks_at_work import megatron
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


def words(model: Path, *more: str) -> list[str]:
    """Of a student that sees images, with two images in a prompt; its teacher is as large."""
    line = f"plan --model {model} --teacher_model {model} --world_size 2 --lmbda 0 --save none --train_iters 1 "
    line += "--global_batch_size 4 --dtype fp32 --images_per_sample 2 --image_width 80 --image_height 60 "
    return [*line.split(), "--prompt_tokens", "60", "--completion_tokens", "20", "--output", "json", *more]


@pytest.mark.parametrize(("family", "decoder"), [("internvl", "qwen2"), ("llava", "llama"), ("qwen2_5_vl", "qwen2")])
def test_the_products_of_a_tower_are_those_that_torch_counts(tmp_path: Path, family: str, decoder: str) -> None:
    """Within a quarter: a class token, windows and what both leave out are small."""
    from torch.utils.flop_counter import FlopCounterMode

    path = write_tiny_vision(tmp_path / "model", family, decoder=decoder, seed=1)
    vision = read_architecture(path).vision
    assert vision is not None
    tokenizer = load_tokenizer(path)
    rule = read_image_tokens(path, family, vision.image_token_id, tokenizer, max_tiles=None)
    _, (picture,) = rule.expand((vision.image_token_id,), [striped_picture(100, 80)])
    fed, tower = rule.inputs([picture]), load(path, torch.float32).model
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower.get_image_features(**fed, return_dict=True)
    assert tower_flops(vision, fed, picture.num_tokens) == pytest.approx(counter.get_total_flops(), rel=0.25)


@pytest.mark.slow
def test_a_towers_time_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, found = write_tiny_vision(tmp_path / "model", layers=2, seed=1), []
    for freeze in ("true", "false"):
        with megatron():
            assert cli.main(words(model, "--freeze_vision", freeze)) == 0
        (record,) = json.loads(capsys.readouterr().out)
        found.append(record["phases_s"])
    assert found[1]["vision tower"] == pytest.approx(3 * found[0]["vision tower"])
    assert found[0]["teacher's vision tower"] == pytest.approx(found[0]["vision tower"])


@pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1")
def test_a_search_counts_the_tower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_tiny_vision(tmp_path / "model", layers=8, seed=1)
    with megatron():
        assert cli.main(words(model, "--search")) == 0
    found = [one for one in json.loads(capsys.readouterr().out) if one["rehearsed_whole"]]
    assert found
    assert all(one["phases_s"]["vision tower"] > 0 for one in found)


def of_layout(rates: Rates, samples: int, *flags: str, work: Work | None = None) -> dict[str, float]:
    words = f"--model {MODELS / 'Qwen3-1.7B'} --dataset none --objective sft --save none --dtype fp32".split()
    config = parse_run_config([*words, "--global_batch_size", str(samples), *flags])
    pair = planned_layouts(config, 4)
    return step_seconds(
        config, architectures(config)[0], None, *pair, (64, 64), {"tp": 4e6}, rates, work=work or Work()
    )


PP4, TP4 = ("--pipeline_model_parallel_size", "4"), ("--tensor_model_parallel_size", "4")


def test_ranks_that_share_cores_wait_for_each_others_work() -> None:
    """A bubble costs nothing, and a head is work once; with a core for each rank both cost what they cost on GPUs."""
    alone, one_core = Rates(1e9, 1e9, 1e9, 8), Rates(1e9, 1e9, 1e9, 8, cores=1)
    assert of_layout(one_core, 8, *PP4)["student"] == pytest.approx(of_layout(one_core, 8)["student"])
    assert of_layout(one_core, 8)["student"] == pytest.approx(4 * of_layout(alone, 8)["student"])
    assert of_layout(alone, 8, *PP4)["student"] > 1.3 * of_layout(alone, 8)["student"]
    own = replace(one_core, cores=4)
    assert of_layout(own, 8, *PP4)["student"] == pytest.approx(of_layout(alone, 8, *PP4)["student"])
    assert of_layout(one_core, 8, *TP4)["groups: tp"] == pytest.approx(4 * of_layout(alone, 8, *TP4)["groups: tp"])


def test_messages_and_operations_cost_beside_their_bytes() -> None:
    """A collective of four ranks is six messages; two ranks share a core."""
    rates = Rates(1e9, 1e9, 1e9, 8, latency_s=1e-3, message_s=1e-4, operation_s=1e-5, memory_bytes=1e9, cores=2)
    assert of_layout(rates, 8, *TP4, work=Work(calls={"tp": 7}))["groups: tp"] == pytest.approx(2 * (4e-3 + 42e-3))
    work = Work(operations=500, written=2e6, handed={"pp": 6e6}, calls={"pp": 10})
    found = of_layout(rates, 8, *PP4, work=work)
    assert found["operations"] == pytest.approx(2 * (5e-3 + 2e-3))
    assert found["groups: pp"] == pytest.approx(2 * (1e-3 + 3e-3))
    assert of_layout(Rates(1e9, 1e9, 1e9, 8), 8, *PP4).keys() == {"student"}, "where no such work is told"
