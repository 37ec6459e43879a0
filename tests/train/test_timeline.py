"""The order of a run's events: what it is, and that the student's ranks and the teacher's go through the same one.

Pure: parts that write down what they are asked. The two real parts (loop.StudentPart, teacher_ranks.TeacherPart) run
with everything below them replaced by a note, so the order of their collectives is compared, not that of their names.
Not covered: what the events do; whole runs on ranks: test_separate_runs.py, test_stopping.py, test_exporting.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_gkd.errors import RunStoppedError
from megatron_gkd.train import loop, teacher_ranks
from megatron_gkd.train.checkpoint import TrainerState
from megatron_gkd.train.timeline import Span, carry_out

Events = list[str]
spans = st.builds(
    Span,
    done_steps=st.integers(0, 4),
    train_iters=st.integers(1, 6),
    save_steps=st.integers(1, 4),
    eval_steps=st.none() | st.integers(1, 4),
    held_out=st.booleans(),
    exports=st.booleans(),
)
stops = st.none() | st.integers(1, 6)  # the step with which the run is asked to stop


class Noted:
    """Writes down what is asked of it, and of its checkpoints."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.events: Events = []
        self.checkpoints: Any = self
        self._stop_at = stop_at

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *step: self.events.append(" ".join(map(str, (name, *step))))

    def train(self, step: int) -> bool:
        self.events.append(f"train {step}")
        return self._stop_at is not None and step >= self._stop_at

    def listening(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def stopped(self, step: int) -> RunStoppedError:
        return RunStoppedError(f"stopped {step}")


def events(span: Span, stop_at: int | None = None) -> Events:
    part = Noted(stop_at)
    try:
        carry_out(span, part)
    except RunStoppedError as error:
        part.events.append(str(error))
    return part.events


def test_a_run_from_beginning_to_end() -> None:
    assert events(Span(0, 3, save_steps=2, eval_steps=2, held_out=True, exports=True)) == [
        "evaluate 0",
        *("train 1", "poll"),
        *("train 2", "poll", "evaluate 2", "save 2"),
        *("train 3", "poll", "evaluate 3", "save 3"),
        *("finish", "trained", "export", "measure_export"),
    ]


def test_a_stop_saves_before_it_evaluates() -> None:
    span = Span(0, 9, save_steps=9, eval_steps=2, held_out=True, exports=True)
    wanted = ["evaluate 0", "train 1", "poll", "train 2", "poll", "save 2", "finish", "evaluate 2", "stopped 2"]
    assert events(span, stop_at=2) == wanted
    assert events(Span(8, 9, 9, 2, True, False), stop_at=9)[-2:] == ["finish", "trained"], "nothing is left to stop"


def test_a_run_that_has_nothing_left_to_train_measures_what_it_exports() -> None:
    wanted = ["finish", "trained", "evaluate 3", "export", "measure_export"]
    assert events(Span(3, 3, 1, None, held_out=True, exports=True)) == wanted
    assert events(Span(3, 3, 1, None, held_out=False, exports=True)) == ["finish", "trained", "export"]


@given(spans, stops)
def test_what_holds_in_every_run(span: Span, stop_at: int | None) -> None:
    found = events(span, stop_at)
    trained = [int(event.split()[1]) for event in found if event.startswith("train ")]
    last = trained[-1] if trained else span.done_steps
    is_stopped = found[-1] == f"stopped {last}"
    assert trained == list(range(span.done_steps + 1, span.done_steps + 1 + len(trained)))
    assert is_stopped or last >= span.train_iters
    assert not trained or f"save {last}" in found, "the last state is always saved"
    assert all(found[i + 1] == "poll" for i, event in enumerate(found) if event.startswith("train "))
    assert found.index("finish") > max((i for i, event in enumerate(found) if event.startswith("save")), default=-1)
    assert ("export" in found) == (span.exports and not is_stopped)
    assert span.held_out or not any(event.startswith(("evaluate", "measure")) for event in found)
    measured = [i for i, event in enumerate(found) if event.startswith("evaluate")]
    assert "measure_export" not in found or measured, "there is a number to compare it with"


def collectives(patch: pytest.MonkeyPatch, kind: str, span: Span, stop_at: int | None) -> Events:
    """What a part does over all ranks, in its order; the student's own work does nothing."""
    noted: Events = []

    def note(*events: str, answer: Any = None) -> Callable[..., Any]:
        return lambda *args, **options: noted.extend(events) or answer

    def plan(step: int) -> Any:
        noted.append(f"signals {step + 1}")
        return SimpleNamespace(step=step, samples=[1, 2])

    def after_step(requested: bool) -> bool:
        noted.append("agreement")
        return stop_at is not None and noted[-2] == f"signals {stop_at}"

    agreement = SimpleNamespace(after_step=after_step, close=note("agreement ends"))
    saves = SimpleNamespace(save=note("save"), poll=note("poll"), finish=note("finish"))
    for module in (loop, teacher_ranks):
        patch.setattr(module, "open_checkpoints", lambda run: saves)
        patch.setattr(module, "StopAgreement", lambda: agreement)
    for name in ("BadSteps", "LossSpikes", "Replicas", "Metrics", "Progress", "Timers", "TokenLog", "stopped"):
        patch.setattr(loop, name, MagicMock())
    loop.Metrics.return_value.sums.return_value = {"stop_requests": 0}  # type: ignore[attr-defined]
    patch.setattr(loop, "stopped", lambda *args: RunStoppedError())
    patch.setattr(loop, "distill", lambda *args, **options: None)
    patch.setattr(loop.StudentPart, "_account", note())
    patch.setattr(loop, "export", note())
    patch.setattr(loop, "evaluate", note("evaluate", answer={}))
    patch.setattr(loop, "measure_export", note("seen", "evaluate"))
    patch.setattr(teacher_ranks, "is_seen_by_all", note("seen", answer=True))
    patch.setattr(teacher_ranks, "serve_evaluation", note("evaluate"))
    patch.setattr(teacher_ranks, "teacher_signals", note())
    run = MagicMock(is_writer=False)
    run.plans.plan, run.loss.names.return_value, run.config.checkpoint.save = plan, [], "run"
    run.config.teacher.teacher_placement = "separate"
    state: Any = TrainerState(span.done_steps, 0, "", "", False)
    part: Any = (
        loop.StudentPart(run, state, MagicMock()) if kind == "student" else teacher_ranks.TeacherPart(run, state)
    )
    try:
        carry_out(span, part)
    except RunStoppedError:
        noted.append("stopped")
    return noted


@pytest.mark.parametrize(("done", "stop_at"), [(0, None), (0, 1), (2, None), (2, 3), (4, None)])
@pytest.mark.parametrize("held_out", [False, True])
def test_both_kinds_of_rank_make_the_same_collectives(
    monkeypatch: pytest.MonkeyPatch, done: int, held_out: bool, stop_at: int | None
) -> None:
    span = Span(done, 4, save_steps=2, eval_steps=1, held_out=held_out, exports=True)
    students, teachers = (collectives(monkeypatch, kind, span, stop_at) for kind in ("student", "teacher"))
    assert students == teachers
    assert ("stopped" in students) == (stop_at is not None)
    assert ("evaluate" in students) == held_out
    assert students.count("save") == (0 if done == 4 else 1 if done == 2 or stop_at else 2)
