"""Runs that have trained nothing, or NaN, and so do not end well: an error on every rank, no export. And what errors
say of checkpoints that are not there.

Real ranks; NaN is put into a teacher's signal, or into a weight. That a bad step changes nothing: test_bad_steps.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gkd.errors import TrainingError
from megatron_gkd.observe.advice import go_on
from megatron_gkd.observe.writers import explain_write_errors
from megatron_gkd.train import loop
from megatron_gkd.train.checkpoint import TrainerState
from megatron_gkd.train.faults import BadSteps, lost_rank
from megatron_gkd.train.student import StepResult
from tests.support.checkpoint_runs import FLAGS, checkpoint_of, write_inputs
from tests.support.faulty_runs import train_with_nan
from tests.support.ranks import run_ranks
from tests.support.runs import command_line, train_on_this_rank

RUN = FLAGS | dict(train_iters=2, save_steps=1, eval_steps=9, micro_batch_size=4, save_hf=True, tensor=2)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_a_run_whose_steps_are_all_bad(inputs: dict[str, Any], tmp_path: Path) -> None:
    """Fewer of them than --max_bad_steps."""
    run_dir = tmp_path / "run"
    argv = command_line(**inputs | RUN, save=run_dir)
    for _, error in run_ranks(train_with_nan, argv, [1, 2], 0, world=2, timeout_s=240):
        assert error is not None
        assert "and the last of the run, which cannot end with it" in error
        assert "go on from step_00000001" in error
    assert not (run_dir / "hf").exists()
    assert not checkpoint_of(run_dir, 2).exists()
    state = json.loads((checkpoint_of(run_dir, 1) / "state.json").read_text())
    assert state["bad_steps_in_a_row"] == 1


def train_to_a_bad_weight(argv: list[str], value: float, rank: int) -> str | None:
    """One weight of one rank is `value` when all steps are done."""
    trained = loop.StudentPart.trained

    def spoilt(self: loop.StudentPart) -> None:
        trained(self)
        if dist.get_rank() == rank:
            list(self.run.student.models[0].parameters())[-1].data.view(-1)[0] = value

    loop.StudentPart.trained = spoilt  # type: ignore[method-assign]
    try:
        train_on_this_rank(argv)
    except TrainingError as error:
        return str(error)
    finally:
        loop.StudentPart.trained = trained  # type: ignore[method-assign]
    return None


def test_a_weight_that_is_not_finite_is_not_exported(inputs: dict[str, Any], tmp_path: Path) -> None:
    argv = command_line(**inputs | RUN | dict(train_iters=1), save=tmp_path / "run")
    for error in run_ranks(train_to_a_bad_weight, argv, float("-inf"), 1, world=2, timeout_s=240):
        assert error is not None
        assert "(rank 1): it is not exported" in error
        assert "final_layernorm" in error or "output_layer" in error
    assert not (tmp_path / "run" / "hf").exists()


# ---- the parts -------------------------------------------------------------------------------------------------------

GOOD, OVERFLOW, BAD = (
    StepResult([], 1.0, 0.0, skipped, problem) for skipped, problem in ((False, None), (True, None), (True, "NaN"))
)


def count(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, results: list[StepResult], *, done: int = 0, row: int = 0
) -> str | None:
    """The error of a run of six steps that goes on after `done` of them, with `row` bad ones at the end."""
    monkeypatch.setattr(BadSteps, "_sample_losses", lambda self, plan: {})
    monkeypatch.setattr(BadSteps, "_teacher_problem", lambda self, plan: None)
    training = SimpleNamespace(max_bad_steps=3)
    run: Any = SimpleNamespace(
        config=SimpleNamespace(training=training), student=SimpleNamespace(train_iters=6), is_writer=False
    )
    bad = BadSteps(run, run_dir, TrainerState(done, 0, "", "", False, row, row))
    plan: Any = None
    try:
        for step, result in enumerate(results, start=done + 1):
            bad.after_step(step, plan, result, 1.0)
    except TrainingError as error:
        return str(error)
    return None


def test_a_resume_goes_on_counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = count(monkeypatch, tmp_path, [BAD], done=2, row=2)
    assert error is not None
    assert "step 3: NaN, the 3. such step in a row (--max_bad_steps 3)" in error
    assert count(monkeypatch, tmp_path, [GOOD, BAD, BAD], done=2, row=2) is None


def test_a_run_that_never_updates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    error = count(monkeypatch, tmp_path, [OVERFLOW] * 6)
    assert error is not None
    assert "none of the 6 steps made an update" in error
    assert count(monkeypatch, tmp_path, [OVERFLOW, GOOD, *[OVERFLOW] * 4]) is None
    assert count(monkeypatch, tmp_path, [OVERFLOW], done=5) is None, "earlier steps did"
    assert count(monkeypatch, tmp_path, [*[GOOD] * 5, BAD]) is not None


def complete(run_dir: Path, step: int) -> None:
    checkpoint_of(run_dir, step).mkdir(parents=True)
    (checkpoint_of(run_dir, step) / "manifest.json").write_text("{}")


def test_nobody_is_sent_to_a_checkpoint_that_is_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "[gloo] Connection closed by peer [127.0.0.1]"
    messages = (
        lambda: go_on(tmp_path),
        lambda: str(lost_rank(RuntimeError(text), str(tmp_path), 10)),
        lambda: str(count(monkeypatch, tmp_path, [BAD] * 3)),
        lambda: written(tmp_path / "metrics.jsonl"),
    )
    checkpoint_of(tmp_path, 7).mkdir(parents=True)  # without a manifest: not complete
    for message in messages:
        assert f"there is no complete checkpoint in {tmp_path}: begin again" in message()
        assert "--load" not in message()
    complete(tmp_path, 9)
    complete(tmp_path, 10)
    for message in messages:
        assert f"--load {tmp_path}" in message()
    assert "go on from step_00000010" in go_on(tmp_path)


def written(path: Path) -> str:
    with pytest.raises(TrainingError) as error, explain_write_errors(path):
        raise OSError(28, "No space left on device")
    return str(error.value)
