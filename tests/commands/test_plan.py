"""`megatron-gkd plan`: what it prints is what a rehearsal finds; what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_gkd import cli
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.fit import kinds
from tests.support.effort import FULL
from tests.support.ranks_at_work import megatron
from tests.support.trainers import write_pair
from tests.train.test_rehearsal import config_of, rehearsed


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("plan")


def test_a_rank_of_each_kind() -> None:
    assert kinds(Layout(tensor=2, pipeline=2, data=2), Layout(tensor=4, data=2)) == [0, 4]
    assert kinds(Layout(pipeline=4), Layout(pipeline=2, data=2)) == [0, 1, 2, 3]
    assert kinds(Layout(data=8), Layout(tensor=8)) == [0]
    assert kinds(Layout(context=4, data=2), Layout(data=8)) == [0, 3]  # of four, the first and the last
    assert kinds(Layout(context=2, pipeline=2), Layout(context=4)) == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_command(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = write_pair(root, "llama")
    argv = (
        f"plan --model {student} --teacher_model {teacher} --save {root / 'run'} --world_size 2 --lmbda 0 --dtype fp32"
    )
    argv += " --pipeline_model_parallel_size 2 --global_batch_size 4 --micro_batch_size 2 --train_iters 2"
    argv += " --max_length 45 --prompt_tokens 5 --gpu_memory_gb 0.0025 --reserved_gb 0 --lines 1"
    assert cli.main([*argv.split(), "--output", "json"]) == 0, capsys.readouterr().err
    ranks = json.loads(capsys.readouterr().out)
    found = rehearsed(config_of(root, pipeline=2), 2, () if FULL else (1,))
    assert [one["rank"] for one in ranks] == [0, 1]
    for one in ranks:
        assert one["needed_bytes"] == max(sum(parts.values()) for parts in one["phases_bytes"].values())
        assert one["fits"] == (one["needed_bytes"] <= 2.5e6)
        assert sum(one["sent_bytes_a_step"].values()) > 0
        peak = max(sum(parts.values()) for name, parts in one["formula_bytes"].items() if name != "load")
        rehearsed_peak = max(sum(parts.values()) for parts in one["peak_bytes"])
        assert one["formula_difference"] == pytest.approx(peak / rehearsed_peak - 1, abs=1e-4)
        assert one["lines"]
        for line in (line for lines in one["lines"].values() for line, _ in lines):
            assert line.split(":")[0].endswith(".py")
            assert "rehearsed_experts" not in line, "of the model, not of what stands between"
        assert list(one["phases_bytes"]) == ["load", "teacher", "forward", "backward", "step 1", "step 2", "save"]
        steps = [sum(parts.values()) for name, parts in one["phases_bytes"].items() if name not in ("load", "save")]
        for expected in found:
            assert expected.rank != one["rank"] or max(steps) == max(peak.total for peak in expected.peaks)
    alone = ["--world_size", "1", "--pipeline_model_parallel_size", "1", "--global_batch_size", "2"]
    assert cli.main([*argv.split(), *alone]) == 0
    text = capsys.readouterr().out
    assert "rank 0: stage 0 of the student" in text
    assert "reserved (--reserved_gb)" in text


def test_the_formula_alone(capsys: pytest.CaptureFixture[str]) -> None:
    """Of models that nothing here could hold, at once; a rank of each kind."""
    models = Path(__file__).resolve().parents[2] / "examples" / "models"
    argv = f"plan --model {models / 'Qwen3-30B-A3B'} --teacher_model {models / 'Qwen3-235B-A22B'} --save none --lmbda 0"
    argv += " --world_size 16 --expert_model_parallel_size 8 --pipeline_model_parallel_size 2 --global_batch_size 16"
    argv += " --teacher_tensor_model_parallel_size 4 --rehearse false --max_length 2048 --dtype bf16"
    argv += " --expert_tensor_parallel_size 1"
    with megatron():
        assert cli.main([*argv.split(), "--output", "json"]) == 0, capsys.readouterr().err
    ranks = json.loads(capsys.readouterr().out)
    assert [one["rank"] for one in ranks] == [0, 8]
    for one in ranks:
        assert one["formula_difference"] == 0
        assert one["peak_bytes"] == [max(one["formula_bytes"].values(), key=lambda parts: sum(parts.values()))]
        assert set(one["formula_bytes"]) < set(one["phases_bytes"])
    with megatron():
        assert cli.main(argv.split()) == 0
    text = capsys.readouterr().out
    assert "nothing was rehearsed" in text
    assert "by the formula" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--tuner_type lora --rehearse false", "not built yet: plan --rehearse false with adapters"),
        ("--teacher_placement separate --teacher_nodes 1", "nothing says how many ranks a node has"),
        ("--search --offload_model true", "not built yet: plan --search with --offload_model"),
        ("--tensor_model_parallel_size 3", "3"),
        ("--global_batch_size 7 --micro_batch_size 2", "global_batch_size 7"),
    ],
)
def test_what_it_refuses(root: Path, capsys: pytest.CaptureFixture[str], flags: str, message: str) -> None:
    student, teacher = write_pair(root, "llama")
    argv = f"plan --model {student} --teacher_model {teacher} --save {root / 'run'} --world_size 2 --lmbda 0 {flags}"
    assert cli.main(argv.split()) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert message in line
