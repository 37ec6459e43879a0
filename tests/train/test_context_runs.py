"""Runs under context parallelism: resumed bit for bit and in another layout, exported as the same bits, and what is
told of single samples.

One step against transformers: test_step_exact.py. Not covered: CUDA, sampling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.schedule import plan_step
from megatron_gkd.train.checkpoint import TrainerState
from megatron_gkd.train.faults import BadSteps
from megatron_gkd.train.score import student_logprobs
from tests.support.checkpoint_runs import FLAGS, SAVED_AT, STEPS, assert_same_bits, checkpoint_of, write_inputs
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import exported, metrics, train
from tests.support.trainers import Trainer, make_samples, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

CP2: dict[str, Any] = dict(context=2, packing=True)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("context")) | FLAGS


@pytest.fixture(scope="module")
def whole(inputs: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(world=2, **inputs, **CP2, save=tmp_path_factory.mktemp("whole") / "run")


def test_a_resumed_run_is_the_same_run(inputs: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    run_dir = train(world=2, **inputs, **CP2, save=tmp_path / "run", load=checkpoint_of(whole))
    assert_same_bits(run_dir, whole, SAVED_AT + 1)


OTHERS: dict[str, tuple[int, dict[str, Any]]] = {"DP2": (2, {})}
if FULL:
    OTHERS |= {"CP2 PP2": (4, dict(context=2, pipeline=2)), "TP2 SP CP2": (4, dict(tensor=2, sequence=True, context=2))}


@pytest.mark.parametrize("layout", OTHERS)
def test_a_run_goes_on_in_another_layout(inputs: dict[str, Any], whole: Path, tmp_path: Path, layout: str) -> None:
    world, sizes = OTHERS[layout]
    run_dir = train(world=world, **inputs, packing=True, **sizes, save=tmp_path / "run", load=checkpoint_of(whole))
    for mine, expected in zip(metrics(run_dir), metrics(whole, first_step=SAVED_AT + 1), strict=True):
        assert mine == pytest.approx(expected, rel=1e-6)
    ours, theirs = exported(run_dir), exported(whole)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


def test_the_export_is_that_of_one_rank(inputs: dict[str, Any], whole: Path, tmp_path: Path) -> None:
    """Loaded after the last step, nothing is left to train: what is exported is what was loaded."""
    source = checkpoint_of(whole, STEPS)
    run_dir = train(world=1, **inputs, packing=True, save=tmp_path / "run", load=source)
    ours, theirs = exported(run_dir), exported(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# ---- single samples -------------------------------------------------------------------------------------------------

# Sequences of 12 tokens, padding included, whose loss tokens are all in the middle: rank 1 has them.
SAMPLES = make_samples([(9, 1), (8, 2), (9, 0), (5, 1)])


def single_samples(config: Any, run_dir: Path) -> tuple[list[list[float]], dict[int, float], float, int]:
    """Log-probabilities of each sequence, losses of the samples, the step's loss, and this rank's loss tokens."""
    with megatron():
        trainer = Trainer(config)
        run, student = trainer.run, trainer.run.student
        logprobs = student_logprobs(
            student.chunks, student.layout, student.groups, [s.prompt_ids + s.completion_ids for s in SAMPLES],
            vocab_size=run.loss.vocab_size, device=run.platform.device,
        )  # fmt: skip
        plan = plan_step(0, SAMPLES, data_parallel_size=student.layout.data, micro_batch_size=4)
        counted: list[int] = []
        original = run.loss.__class__.__call__

        def call(self: Any, model: Any, hidden: Any, batch: Any, signal: Any) -> Any:
            counted.append(sum(batch.lengths))
            run.loss._sample_losses = self._sample_losses
            return original(self, model, hidden, batch, signal)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.loss.__class__, "__call__", call)
            outcome = trainer.carry_out(plan, config.distillation, with_weights=False)
        state = TrainerState(0, 0, "", "", True)
        losses = BadSteps(run, run_dir, state)._sample_losses(plan)
    return logprobs, losses, outcome.loss, sum(counted)


def test_single_samples_and_a_rank_without_loss_tokens(tmp_path: Path) -> None:
    student, teacher = write_pair(tmp_path, "qwen3")
    flags = dict(global_batch_size=4, micro_batch_size=4, train_iters=1)
    args = student, teacher, write_rows(tmp_path / "rows.jsonl", 4)
    (one,) = run_ranks(single_samples, run_config(*args, **flags), tmp_path, world=1)
    ranks = run_ranks(single_samples, run_config(*args, **flags, context_parallel_size=2), tmp_path, world=2)
    assert [tokens for *_, tokens in ranks] == [0, 4], "one rank has nothing to learn from"
    for logprobs, losses, loss, _ in ranks:
        assert loss == pytest.approx(one[2], rel=1e-6)
        assert losses == pytest.approx(one[1], rel=1e-5, abs=1e-6)
        for found, expected in zip(logprobs, one[0], strict=True):
            assert found == pytest.approx(expected, rel=1e-5)
