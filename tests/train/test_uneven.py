"""Uneven pipelines of the student and of the teacher: the numbers of one process, and checkpoints from one split to
another.

Two steps each; loss, gradient norm and the weights by their Hugging Face names are those of one process. The split's
arithmetic is in parallel/test_pipeline_split.py. Not covered: experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import LayoutError
from megatron_gkd.model.levers import check_student
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.pipeline_split import PipelineSplit
from megatron_gkd.train.checkpoint.saving import Save
from megatron_gkd.train.checkpoint.sharded import restore
from megatron_gkd.train.checkpoint.state import TrainerState, describe_run
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.models import small
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_rows

SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (8, 4)])
BOTH = dict(account_for_embedding_in_pipeline_split=True, account_for_loss_in_pipeline_split=True)

# Ranks; sizes; the student's split, of 6 layers; the teacher's, of 4.
CELLS: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "first": (2, {}, dict(decoder_first_pipeline_num_layers=2), dict(decoder_last_pipeline_num_layers=1)),
    "written, VPP": (
        2,
        dict(virtual=2),
        dict(pipeline_model_parallel_layout="Et|tt|tt|tL"),
        dict(pipeline_model_parallel_layout="E|t*4L"),
    ),
    "the loss alone": (2, {}, dict(pipeline_model_parallel_layout="Et*6|L"), dict(decoder_first_pipeline_num_layers=3)),
    "both counted": (4, dict(pipeline=4), BOTH, dict(pipeline_model_parallel_layout="Et|tt|t|L")),
    "written, PP4": (4, dict(pipeline=4), dict(pipeline_model_parallel_layout="Et|tt|ttt|L"), dict(BOTH, pipeline=2)),
    "TP2": (4, dict(tensor=2), dict(decoder_last_pipeline_num_layers=1), dict(decoder_last_pipeline_num_layers=3)),
}
GATE = ["first", "written, VPP", "the loss alone"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    root = tmp_path_factory.mktemp("uneven")
    sizes: dict[str, Any] = dict(hidden_size=32, ffn_hidden_size=48)
    student = write_tiny_checkpoint(root / "student", "qwen3", tied=True, vocab_size=340, layers=6, seed=1, **sizes)
    teacher = write_tiny_checkpoint(root / "teacher", "llama", vocab_size=300, layers=4, seed=2, **sizes)
    return str(student), str(teacher), write_rows(root / "rows.jsonl", 4)


def config_of(models: tuple[str, str, str], name: str | None) -> RunConfig:
    flags: dict[str, Any] = {}
    if name is not None:
        _, sizes, student, teacher = CELLS[name]
        # Both pipelines have the student's number of stages where the teacher's own is not given.
        flags = {T[size]: value for size, value in {"pipeline": 2, **sizes}.items()} | student
        own = dict(teacher)
        stages = own.pop("pipeline", None)
        flags |= {f"teacher_{flag}": value for flag, value in own.items()}
        if stages is not None:
            flags[T["teacher_pipeline"]] = stages
    # With a small epsilon Adam's first update is the sign of a gradient, also of one that is rounding alone.
    numbers: dict[str, Any] = dict(lr=0.01, adam_eps=1e-4, lr_decay_style="constant", lr_warmup_fraction=0.0)
    return run_config(*models, global_batch_size=4, train_iters=9, **numbers, **flags)


def steps(trainer: Trainer, number: int) -> list[StepOutcome]:
    return [trainer.step(SAMPLES, trainer.config.distillation, micro_batch_size=1) for _ in range(number)]


def train(config: RunConfig) -> tuple[list[StepOutcome], tuple[int, ...], int]:
    """The outcomes, the layers of this rank's chunks, and of its part of the teacher."""
    with megatron():
        trainer = Trainer(config)
        layers = tuple(len(model.decoder.layers) for model in trainer.run.student.models)
        teacher: Any = trainer.run.teacher
        return steps(trainer, 2), layers, sum(len(chunk.decoder.layers) for chunk in teacher.chunks)


def assert_same(found: list[StepOutcome], expected: list[StepOutcome], name: str) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one.loss, one.grad_norm) == pytest.approx((other.loss, other.grad_norm), rel=1e-6), name
        if one.weights is not None:
            assert other.weights is not None
            assert max(float((one.weights[n] - w).abs().max()) for n, w in other.weights.items()) < 3e-6, name


@pytest.mark.slow
def test_the_numbers_are_those_of_one_process(models: tuple[str, str, str]) -> None:
    ((expected, layers, of_teacher),) = run_ranks(train, config_of(models, None), world=1)
    assert (layers, of_teacher) == ((6,), 4)
    held = {}
    for name in CELLS if FULL else GATE:
        ranks = run_ranks(train, config_of(models, name), world=CELLS[name][0])
        for found, _, _ in ranks:
            assert_same(found, expected, name)
        held[name] = [(layers, of_teacher) for _, layers, of_teacher in ranks]
    assert held["first"] == [((2,), 3), ((4,), 1)]
    assert held["written, VPP"] == [((1, 2), 0), ((2, 1), 4)]
    assert held["the loss alone"] == [((6,), 3), ((0,), 1)]
    if FULL:
        assert held["both counted"] == [((1,), 1), ((2,), 2), ((2,), 1), ((1,), 0)]


def save_and_go_on(configs: list[RunConfig], run_dir: str) -> tuple[list[StepOutcome], list[list[StepOutcome]]]:
    """A step, a save, and the next step: of the run that saved, and of one per other configuration that reads it."""
    with megatron():
        one, *others = (Trainer(config) for config in configs)
        steps(one, 1)
        student = one.run.student
        state = TrainerState(1, 4, "rows", "student", True)
        saved = Save(run_dir, student, state, description=describe_run(one.config, student, "cpu")).finish()
        expected = steps(one, 1)
        found = []
        for other in others:
            with torch.no_grad():
                for parameter in other._parameters():
                    parameter.fill_(torch.nan)
            restore(saved, other.run.student)
            found.append(steps(other, 1))
        return expected, found


@pytest.mark.slow
def test_a_checkpoint_goes_on_in_another_split(models: tuple[str, str, str], tmp_path: Path) -> None:
    names = ["first", "the loss alone", "written, VPP"]
    for expected, found in run_ranks(save_and_go_on, [config_of(models, n) for n in names], str(tmp_path), world=2):
        for name, outcomes in zip(names[1:], found, strict=True):
            assert_same(outcomes, expected, name)


def test_a_stage_with_nothing_to_train(models: tuple[str, str, str]) -> None:
    config = run_config(*models, freeze_embeddings=True)
    with pytest.raises(LayoutError, match="--freeze_embeddings leaves the first stage, which has no layer"):
        check_student(config, small(), Layout(pipeline=2, split=PipelineSplit(layers=(0, 4))), "cpu")
    check_student(config, small(), Layout(pipeline=2, split=PipelineSplit(layers=(4, 0))), "cpu")
