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
from megatron_gkd.errors import NotBuiltError, RolloutError
from megatron_gkd.train import sampling
from megatron_gkd.train.fit import layouts
from megatron_gkd.train.setup import with_dtype
from megatron_gkd.weights import source
from tests.support.checkpoints import MOE_FAMILIES, write_tiny_checkpoint
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line
from tests.support.trainers import build_run, write_rows


def refusal(argv: list[str]) -> str:
    config = parse_run_config(argv, command="train")
    with megatron():
        try:
            build_run(config)
        except NotBuiltError as error:
            return str(error)
    return "accepted"


@pytest.mark.parametrize("role", ["model", "teacher_model"])
@pytest.mark.parametrize("family", MOE_FAMILIES)
def test_distilling_with_experts_is_refused_by_flag_and_name(tmp_path: Path, family: str, role: str) -> None:
    dense = write_tiny_checkpoint(tmp_path / "dense", "llama", layers=2)
    routed = write_tiny_checkpoint(tmp_path / "routed", family, layers=2)
    (routed / "model.safetensors").unlink()  # refused before a weight is looked for
    models = {"model": str(dense), "teacher_model": str(dense)} | {role: str(routed)}
    rows = write_rows(tmp_path / "rows.jsonl", 4)
    argv = command_line(**models, dataset=rows, lmbda=0, report_to="none", device="cpu", train_iters=1)
    (message,) = run_ranks(refusal, argv, world=1)
    assert message.startswith(f"--{role}: distillation with a mixture of experts ({family}) is not built yet")


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
