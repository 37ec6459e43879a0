"""What the trainer refuses for the models it is given, before any weight is read. Layouts and data: elsewhere."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.config.checks import CheckConfig
from megatron_gkd.config.dtypes import chosen
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import ModelConfig
from megatron_gkd.config.sample import SampleConfig
from megatron_gkd.errors import LayoutError, RolloutError
from megatron_gkd.model.divisible import check_fit
from megatron_gkd.train import sampling
from megatron_gkd.train.fit import layouts, refuse_student, without_borrowed_experts
from megatron_gkd.train.setup import with_dtype
from megatron_gkd.weights import source
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.models import small
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line
from tests.support.trainers import build_run, write_rows


def test_a_mixture_is_trained_over_tensor_ranks_with_sequence_parallelism_alone() -> None:
    """As a teacher it may do without; so may a dense student."""
    config = parse_run_config(["--model", "S", "--dataset", "d", "--tensor_model_parallel_size", "2"])
    student, _ = layouts(config, 2)
    with pytest.raises(LayoutError, match=r"--tensor_model_parallel_size 2 without --sequence_parallel: .*qwen3_moe"):
        refuse_student(config, small("qwen3_moe"), student)
    refuse_student(config, small("llama"), student)
    refuse_student(config, small("qwen3_moe"), replace(student, sequence_parallel=True))


def test_the_splits_of_experts_of_student_and_teacher() -> None:
    """null is the student's, but a dense teacher takes none that it was not given."""
    words = "--model S --teacher_model T --dataset d --expert_model_parallel_size 4 --expert_tensor_parallel_size 1"

    def of_teacher(more: str, family: str) -> tuple[int, int]:
        config = parse_run_config(f"{words} {more}".split())
        student, teacher = layouts(config, 8)
        assert (student.expert, student.expert_tensor_size) == (4, 1)
        teacher = without_borrowed_experts(config, small(family), teacher)
        check_fit("teacher_model", small(family), teacher)
        return teacher.expert, teacher.expert_tensor_size

    tensor = "--teacher_tensor_model_parallel_size 2"
    assert of_teacher("", "qwen3_moe") == (4, 1)
    assert of_teacher("--teacher_expert_model_parallel_size 2", "mixtral") == (2, 1)
    assert of_teacher(f"{tensor} --teacher_expert_tensor_parallel_size 2", "mixtral") == (4, 2)
    assert of_teacher(tensor, "llama") == (1, 2)
    for own, size in (("model", 2), ("tensor", 1)):
        with pytest.raises(LayoutError, match=f"^--teacher_model: expert-.*size {size}: a llama model has no experts"):
            of_teacher(f"{tensor} --teacher_expert_{own}_parallel_size {size}", "llama")


def test_a_split_of_experts_that_does_not_fit_is_the_students_or_the_teachers() -> None:
    own = "--teacher_placement separate --teacher_world_size 1"
    for words, whose in (("", "student"), (own, "teacher")):
        argv = f"--model S --teacher_model T --dataset d --expert_model_parallel_size 2 {words}".split()
        with pytest.raises(LayoutError, match=rf"^the {whose}'s layout: .*size 2 does not divide the 1 ranks"):
            layouts(parse_run_config(argv), 1 if whose == "student" else 3)


def test_one_model_chunk_per_stage_is_no_virtual_pipeline() -> None:
    """As in Megatron: 1 means none, with or without pipeline stages."""
    for pipeline in (1, 2):
        words = (
            f"--virtual_pipeline_model_parallel_size 1 --pipeline_model_parallel_size {pipeline} --model S --dataset d"
        )
        student, _ = layouts(parse_run_config(words.split()), pipeline)
        assert (student.pipeline, student.virtual_pipeline) == (pipeline, None)


def test_the_device_decides_the_precision_that_was_left_open() -> None:
    config = parse_run_config(["--model", "S", "--dataset", "d", "--device", "cpu"])
    with megatron():
        assert with_dtype(config).model.precision == "fp32"
        given = replace(config, model=replace(config.model, dtype="bf16"))
        assert with_dtype(given) is given
    assert (chosen("auto", "cuda"), chosen("auto", "cpu"), chosen("fp32", "cuda")) == ("bf16", "fp32", "fp32")


def test_all_commands_leave_it_open() -> None:
    for section in (ModelConfig, SampleConfig, CheckConfig):
        (item,) = (item for item in fields(section) if item.name == "dtype")
        assert item.default == "auto", section


def refused_by_a_server(argv: list[str]) -> str:
    """The error of a run whose rollout server has another type, and that must not read a weight before it is found."""

    def refuse(*args: Any, **options: Any) -> None:
        raise RolloutError("computes in float32")

    def load(*args: Any, **options: Any) -> None:
        raise AssertionError("a model is loaded")

    with pytest.MonkeyPatch.context() as patch, megatron():
        patch.setattr(sampling, "probe_servers", refuse)
        patch.setattr(source, "build_model", load)
        try:
            build_run(parse_run_config(argv, command="train"))
        except RolloutError as error:
            return str(error)
    return "accepted"


def test_a_rollout_server_is_looked_at_before_a_model_is_loaded(tmp_path: Path) -> None:
    model = str(write_tiny_checkpoint(tmp_path / "model", "llama", layers=2))
    flags = dict(model=model, teacher_model=model, dataset=write_rows(tmp_path / "rows.jsonl", 4), lmbda=1)
    flags |= dict(vllm_mode="server", vllm_server_host="h", max_completion_length=8, max_length=99, device="cpu")
    assert run_ranks(refused_by_a_server, command_line(**flags, train_iters=1), world=2) == ["computes in float32"] * 2
