"""The order of a run's events, for all of its ranks: steps, evaluations, checkpoints, a stop, the export.

Ranks of the student and ranks that hold only the teacher (`--teacher_placement separate`) must make the same
collectives in the same order, or they wait for each other forever. So the order is written here, once:
`carry_out(span, part)` runs on every rank, and each kind of rank defines only what it does at an event (`Part`: the
student's in loop.py, the teacher's in teacher_ranks.py).

Pure except for what the part does: no rank, no tensor and no file is needed to test it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from megatron_gkd.errors import RunStoppedError

if TYPE_CHECKING:
    from megatron_gkd.train.checkpoint import Checkpoints


@dataclass(frozen=True)
class Span:
    """The part of a run that is left, the same on all ranks. Steps are counted from 1, by their end."""

    done_steps: int
    train_iters: int
    save_steps: int
    eval_steps: int | None
    held_out: bool  # whether there are rows to evaluate on
    exports: bool

    def evaluates_after(self, step: int) -> bool:
        """Whether held-out rows are evaluated after `step` steps."""
        return self.held_out and (step == self.train_iters or bool(self.eval_steps and step % self.eval_steps == 0))

    def saves_after(self, step: int) -> bool:
        """Whether a checkpoint is saved after `step` steps."""
        return step == self.train_iters or step % self.save_steps == 0


class Part(Protocol):
    """What a rank does at each event: collective over all ranks of the run, each with its own part."""

    checkpoints: Checkpoints

    def listening(self) -> AbstractContextManager[object]:
        """Entered for the length of the steps; signals are handled in it. Collective over the ranks of one kind: the
        student's compare their weights."""

    def train(self, step: int) -> bool:
        """One step. Returns whether the run is asked to stop after it, the same on all ranks."""

    def evaluate(self, step: int) -> None:
        """One pass over the held-out rows."""

    def save(self, step: int) -> None:
        """Start a checkpoint."""

    def stopped(self, step: int) -> RunStoppedError:
        """The exception that ends a run that was asked to stop. Not collective."""

    def trained(self) -> None:
        """All steps are done."""

    def export(self) -> None:
        """Write the student."""

    def measure_export(self) -> None:
        """One pass over the held-out rows with the exported weights, if all ranks see them."""


def carry_out(span: Span, part: Part) -> None:
    """All events of the run. Collective over all ranks. Raises RunStoppedError where it was asked to stop."""
    if span.held_out and span.done_steps == 0:
        part.evaluate(0)
    with part.listening():
        for step in range(span.done_steps + 1, span.train_iters + 1):
            # After the last step there is nothing to stop.
            stop = part.train(step) and step < span.train_iters
            part.checkpoints.poll()
            if not stop and span.evaluates_after(step):
                part.evaluate(step)
            if stop or span.saves_after(step):
                part.save(step)
            if stop:  # nobody knows how much time is left: the checkpoint comes first
                part.checkpoints.finish()
                if span.evaluates_after(step):
                    part.evaluate(step)
                raise part.stopped(step)
    part.checkpoints.finish()
    part.trained()
    if not span.exports:
        return
    if span.held_out and span.done_steps >= span.train_iters:
        part.evaluate(span.train_iters)
    part.export()
    if span.held_out:
        part.measure_export()
