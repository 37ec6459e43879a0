"""The part in a run of a rank that only holds the teacher (`--teacher_placement separate`).

It makes the same plans as the student's ranks, in the order of timeline.py. Its only other contacts with them are the
signals that it sends, checkpoints, and requests to stop (stopping.py). So it works ahead: while the student trains on a
step, the teacher forwards the next one, unless that must be sampled from the student first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Self

from megatron_gkd.errors import RunStoppedError
from megatron_gkd.train.checkpoint import TrainerState
from megatron_gkd.train.export_record import is_seen_by_all
from megatron_gkd.train.plans import evaluation_plans
from megatron_gkd.train.resume import open_checkpoints
from megatron_gkd.train.setup import TeacherRun
from megatron_gkd.train.step import teacher_signals
from megatron_gkd.train.stopping import StopAgreement, StopSignals, stopped


class TeacherPart:
    """What such a rank does at the events of timeline.py; as a context, it closes the teacher."""

    def __init__(self, run: TeacherRun, state: TrainerState) -> None:
        """`state`: where the run starts or continues."""
        self.run, self._state = run, state
        self._signals, self._agreement, self.checkpoints = StopSignals(), StopAgreement(), open_checkpoints(run)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or kind is RunStoppedError:  # it waits for what was sent to arrive
            self.run.teacher.close()

    def listening(self) -> StopSignals:
        return self._signals

    def train(self, step: int) -> bool:
        assert self.run.plans is not None
        plan = self.run.plans.plan(step - 1)
        teacher_signals(self.run.teacher, plan)
        consumed = self._state.consumed_samples + len(plan.samples)
        self._state = replace(self._state, step=step, consumed_samples=consumed)
        return self._agreement.after_step(self._signals.received is not None)

    def evaluate(self, step: int) -> None:
        serve_evaluation(self.run)

    def save(self, step: int) -> None:
        self.checkpoints.save(None, self._state)

    def stopped(self, step: int) -> RunStoppedError:
        return stopped(step, self.run.config.checkpoint.save, self._signals.received)

    def trained(self) -> None:
        self._agreement.close()

    def export(self) -> None:
        """Done by the student's ranks."""

    def measure_export(self) -> None:
        if is_seen_by_all(Path(self.run.config.checkpoint.save) / self.run.config.exports[0]):
            serve_evaluation(self.run)


def serve_evaluation(run: TeacherRun) -> None:
    """One pass over the held-out rows, if there are any. Collective over all ranks."""
    if run.eval_rows is None:
        return
    for plan in evaluation_plans(run.config, run.eval_rows, run.student_layout, run.teacher.layout):
        teacher_signals(run.teacher, plan)
