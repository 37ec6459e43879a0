"""Steps whose numbers are not finite: no bit of the student changes, later steps go on, the samples are on disk, and
the run ends after too many.

Real ranks; NaN is put into one sample's teacher signal. Not covered: fp16 and its loss scale on a GPU.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import TrainingConfig
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.faults import MOST_SAMPLES, LossSpikes, describe_bad_step
from megatron_gkd.train.student import StepResult, Student
from tests.support.checkpoint_runs import FLAGS, checkpoint_of, write_inputs
from tests.support.faulty_runs import everything, train_with_nan
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import groups_of, load_model, megatron
from tests.support.runs import command_line, exported, metrics
from tests.support.trainers import make_samples

pytestmark = pytest.mark.slow

LAYOUTS: dict[str, dict[str, Any]] = {
    "DP2": {},
    "DP2, whole optimizer": dict(sharded=False),
    "TP2": dict(tensor=2),
    "PP2": dict(pipeline=2),
}
RUN = FLAGS | dict(train_iters=4, save_steps=2, eval_steps=4, micro_batch_size=2, save_hf=False)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_bad_step_changes_nothing_and_the_next_ones_go_on(
    inputs: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    flags = inputs | RUN | LAYOUTS[layout] | dict(save=tmp_path / "run")
    for unchanged, error in run_ranks(train_with_nan, command_line(**flags), [2, 3], 3, world=2):
        assert error is None
        assert unchanged == [False, True, True, False]
    rows = metrics(tmp_path / "run")
    assert [row["bad_steps"] for row in rows] == [0, 1, 2, 2]
    assert [row["loss"] is None for row in rows] == [False, True, True, False]
    assert [math.isfinite(row["grad_norm"] or math.nan) for row in rows] == [True, False, False, True]
    assert json.loads((checkpoint_of(tmp_path / "run", 4) / "state.json").read_text())["bad_steps"] == 2
    files = sorted((tmp_path / "run" / "bad_steps").iterdir())
    assert [file.name for file in files] == ["step_00000002.json", "step_00000003.json"]
    record = json.loads(files[0].read_text())
    assert record["problem"] == "the loss is not finite"
    (sample,) = record["samples"]
    assert (sample["position"], sample["loss_sum"], record["num_samples"]) == (3, "nan", 4)
    row = json.loads(Path(inputs["dataset"][0]).read_text().splitlines()[sample["row"]])
    assert row["prompt"] in sample["prompt"]
    assert row["completion"] in sample["completion"]


def test_too_many_in_a_row_end_the_run_with_the_last_checkpoint_intact(inputs: dict[str, Any], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = inputs | RUN | dict(save=run_dir, max_bad_steps=2, train_iters=6, tensor=2)
    for unchanged, error in run_ranks(train_with_nan, command_line(**flags), [1, 3, 4], 0, world=2):
        assert unchanged == [True, False, True, True]
        assert error is not None
        assert "step 4: the loss is not finite, the 2. such step in a row (--max_bad_steps 2)" in error
        assert f"--load {run_dir}" in error
    assert [path.name for path in sorted((run_dir / "checkpoints").iterdir())] == ["latest", "step_00000002"]
    # What was wrong is mended: the resumed run is the one that had one bad step, its first.
    resumed = command_line(**flags | dict(load=run_dir, save_hf=True))
    run_ranks(train_with_nan, resumed, [], 0, world=2)
    other = command_line(**flags | dict(save=tmp_path / "other", save_hf=True))
    run_ranks(train_with_nan, other, [1], 0, world=2)
    assert metrics(run_dir) == metrics(tmp_path / "other")
    ours, theirs = exported(run_dir), exported(tmp_path / "other")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def spoilt_gradient(inputs: dict[str, Any], value: float, finite_loss: bool) -> tuple[StepResult, bool]:
    """One update whose gradient is `value` in one place."""
    with megatron():
        layout = Layout()
        chunks = load_model(inputs["model"], layout).chunks
        student = Student(
            chunks, layout, groups_of(layout), TrainingConfig(lr=1e-2), ModelOptions.on("cpu"), train_iters=4
        )
        student.scheduler.step(increment=1)
        for parameter in student.chunks[0].parameters():
            parameter.main_grad.fill_(1e-3)
        next(iter(student.chunks[0].parameters())).main_grad.view(-1)[0] = value
        before = everything(student)
        norm, updated, problem = student._update(finite_loss)
        same = all(torch.equal(a, b) for a, b in zip(before, everything(student), strict=True))
        return StepResult([], norm, 0.0, not updated, problem), same


@pytest.mark.parametrize(
    ("value", "finite_loss", "problem"),
    [
        (1e-3, True, None),
        (1e-3, False, "the loss is not finite"),
        (math.inf, True, "the gradient's norm is inf"),
        (math.nan, True, "the gradient's norm is nan"),
    ],
)
def test_either_of_loss_and_norm_is_enough(
    inputs: dict[str, Any], value: float, finite_loss: bool, problem: str | None
) -> None:
    ((result, same),) = run_ranks(spoilt_gradient, inputs, value, finite_loss, world=1)
    assert result.problem == problem
    assert result.skipped == same == (problem is not None)


def test_a_record_without_a_guilty_sample_holds_them_all_up_to_a_limit() -> None:
    samples = make_samples([(2, 3)] * (MOST_SAMPLES + 6))
    losses = {sample.position: float(sample.position) for sample in samples}
    record = describe_bad_step(7, samples, StepResult([], math.inf, 0.0, True, "why"), 1.0, losses)
    assert (record["left_out"], record["grad_norm"], record["loss"]) == (6, "inf", 1.0)
    assert [s["position"] for s in record["samples"]] == list(range(MOST_SAMPLES + 5, 5, -1))
    json.dumps(record, allow_nan=False)


def test_a_spike_is_a_loss_far_above_the_median() -> None:
    spikes = LossSpikes(3.0)
    assert [spikes.ratio(9.0 if step == 3 else 1.0) for step in range(10)] == [None] * 10
    assert spikes.ratio(2.9) is None
    assert spikes.ratio(math.nan) is None
    assert spikes.ratio(4.0) == 4.0
    assert LossSpikes(None).ratio(1e9) is None
