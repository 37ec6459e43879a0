"""Whole runs with the teacher on ranks of its own: the numbers of a run on the same ranks, resumed runs bit for bit, a
teacher that works ahead, and completions that are sampled on the student's side alone.

One step in every pair of layouts: test_layout_pairs.py. Not covered: CUDA, several machines.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.observe.writers import read_rows
from megatron_gkd.teacher_pipeline import TeacherPipeline
from megatron_gkd.train.student import Student
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import LIMIT_S
from tests.support.ranks import run_ranks
from tests.support.runs import command_line, exported, metrics, train, train_on_this_rank
from tests.support.trainers import write_rows
from tests.support.vllm_zygote import forked_programs

pytestmark = pytest.mark.slow

STEPS = 4


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("separate")
    student = write_tiny_checkpoint(root / "student", "qwen3", tied=True, head_dim=32, layers=2, seed=1)
    teacher = write_tiny_checkpoint(root / "teacher", "llama", vocab_size=384, layers=4, seed=2)
    return dict(
        model=student,
        teacher_model=teacher,
        dataset=write_rows(root / "rows.jsonl", 24),
        eval_dataset=write_rows(root / "held_out.jsonl", 7, seed=5),
        lmbda=0,
        train_iters=STEPS,
        global_batch_size=8,
        micro_batch_size=2,
        eval_steps=2,
        lr=1e-2,
        lr_decay_style="constant",
        device="cpu",
        report_to="none",
    )


OWN = dict(tensor=2, teacher_placement="separate", teacher_world_size=2, teacher_tensor=1, teacher_pipeline=2)


@pytest.fixture(scope="module")
def whole(flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(world=4, **flags, **OWN, save=tmp_path_factory.mktemp("whole") / "run", save_steps=2)


def test_its_numbers_are_those_of_a_run_on_the_same_ranks(flags: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    together = train(world=2, **flags, tensor=2, teacher_tensor=1, teacher_pipeline=2, save=tmp_path / "run")
    for file in ("metrics.jsonl", "evaluation.jsonl"):
        ours, theirs = (metrics(run, first_step=0, file=file) for run in (whole, together))
        assert len(ours) == len(theirs) >= 3
        for mine, other in zip(ours, theirs, strict=True):
            assert mine == pytest.approx(other, rel=1e-5, abs=1e-7), file
    for name, tensor in exported(together).items():
        assert (exported(whole)[name] - tensor).abs().max() < 1e-5, name


def test_the_bytes_on_the_wire_are_counted(whole: Path) -> None:
    """Every sample's hidden states once to each of the student's two ranks: its loss tokens x width x 4 bytes."""
    for row in read_rows(whole / "metrics.jsonl"):
        assert row["signal_bytes"] == 2 * row["num_tokens"] * 64 * 4


def test_a_resumed_run_goes_on_bit_for_bit(flags: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    half = train(world=4, **(flags | dict(train_iters=2)), **OWN, save=tmp_path / "run", save_hf=False)
    train(world=4, **flags, **OWN, save=half, load=half, allow_changed_config=True)
    assert metrics(half) == metrics(whole)
    assert all(tensor.equal(exported(whole)[name]) for name, tensor in exported(half).items())


def train_and_wait_for_the_teacher(argv: list[str], marks: Path) -> None:
    """The student begins its first update only when the teacher has begun to forward the second step."""
    forward, update = TeacherPipeline._forward, Student.train_step
    number = {"forward": 0, "update": 0}

    def marked(self: TeacherPipeline, *args: Any) -> None:
        (marks / f"forward_{number['forward']}").touch()
        number["forward"] += 1
        forward(self, *args)

    def waiting(self: Student, *args: Any, **options: Any) -> Any:
        ahead, deadline = marks / f"forward_{number['update'] + 1}", time.monotonic() + LIMIT_S
        number["update"] += 1
        while number["update"] < STEPS and not ahead.exists():
            assert time.monotonic() < deadline, "the teacher waits for the student"
            time.sleep(0.01)
        return update(self, *args, **options)

    TeacherPipeline._forward, Student.train_step = marked, waiting  # type: ignore[method-assign]
    try:
        train_on_this_rank(argv)
    finally:
        TeacherPipeline._forward, Student.train_step = forward, update  # type: ignore[method-assign]


def test_the_teacher_works_ahead(flags: dict[str, Any], tmp_path: Path) -> None:
    own = dict(teacher_placement="separate", teacher_world_size=1, save=tmp_path / "run", save_hf=False)
    quiet = {name: value for name, value in flags.items() if name not in ("eval_dataset", "eval_steps")}
    run_ranks(train_and_wait_for_the_teacher, command_line(**quiet, **own), tmp_path, world=2)


def train_with_a_forked_server(argv: list[str]) -> None:
    with forked_programs():
        train_on_this_rank(argv)


@pytest.mark.slow
def test_sampled_completions_reach_the_teachers_ranks(flags: dict[str, Any], tmp_path: Path) -> None:
    """On-policy, with vLLM in a process of its own: it gets better, and the teacher saw what was sampled."""
    on_policy = dict(lmbda=1, beta=1, vllm_mode="subprocess", max_completion_length=8, max_length=64, save_hf=False)
    run_dir = tmp_path / "run"
    own = dict(tensor=2, teacher_placement="separate", teacher_world_size=1, teacher_tensor=1, save=run_dir)
    argv = command_line(**(flags | on_policy | own | dict(train_iters=3, micro_batch_size=1)))
    run_ranks(train_with_a_forked_server, argv, world=3, with_vllm=True)
    rows = metrics(run_dir)
    assert len(rows) == 3
    assert all(row["source/student/num_samples"] == 8 for row in rows)
    held_out = metrics(run_dir, first_step=0, file="evaluation.jsonl")
    assert held_out[-1]["reverse_kl"] < held_out[0]["reverse_kl"]


# ---- refusals --------------------------------------------------------------------------------------------------------


def refusal(argv: list[str]) -> str:
    try:
        train_on_this_rank(argv)
    except ValueError as error:
        return str(error)
    return "accepted"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(teacher_world_size=2), "--teacher_world_size 2 leaves none of the world's 2 ranks for the student"),
        (dict(teacher_nodes=1), "--teacher_nodes 1 counts nodes, and nothing says how many ranks a node has"),
        (dict(), "--teacher_placement separate needs the number of the teacher's ranks"),
        (
            dict(teacher_world_size=1, offload_teacher_model=True),
            "--offload_teacher_model frees memory for a student",
        ),
        (dict(teacher_world_size=1, lmbda=0.5), "--vllm_mode colocate places its engines on all ranks"),
        (
            dict(teacher_world_size=1, teacher_tensor=2),
            "the teacher's layout needs a multiple of tp 2 x cp 1 x pp 1 = 2 ranks, but it has 1: give it 2 ranks",
        ),
        (dict(teacher_world_size=1, tensor=2, teacher_tensor=1), "the student's layout needs a multiple of tp 2"),
        (dict(teacher_micro_batch_size=1, teacher_micro_batch_tokens=9), "both size a micro-batch"),
    ],
)
def test_what_cannot_be_is_refused_before_a_weight_is_read(
    flags: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = command_line(**(flags | dict(teacher_placement="separate", save=tmp_path / "run") | change))
    for text in run_ranks(refusal, argv, world=2):
        assert message in text
    assert not (tmp_path / "run").exists()
