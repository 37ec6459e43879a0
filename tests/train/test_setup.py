"""What the trainer refuses for the models it is given, before any weight is read. Layouts and data: elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_gkd.errors import NotBuiltError
from megatron_gkd.flags import parse_run_config
from megatron_gkd.train.fit import layouts
from tests.checkpoints import MOE_FAMILIES, write_tiny_checkpoint
from tests.ranks import run_ranks
from tests.train.runs import command_line
from tests.train.trainers import build_run, write_rows
from tests.weights.ranks_at_work import megatron


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
