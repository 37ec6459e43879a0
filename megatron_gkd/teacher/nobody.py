"""No teacher (`--objective sft`), with the face of one: nothing is loaded, forwarded or sent.

What comes in place of its signals is the empty `NoSignal`, which only an objective that needs no teacher takes.
"""

from __future__ import annotations

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.signals import NoSignal, Signal, SignalStore
from megatron_gkd.teacher_pipeline import Collate


class Nobody:
    """`signals(plan, ...)`, with the face of TeacherPipeline; not collective."""

    def __init__(self, layout: Layout) -> None:
        """Args: layout: the student's, over which the steps are planned."""
        self.layout = layout

    def signals(self, plan: StepPlan, micro_batches: Collate) -> tuple[SignalStore, int]:
        """A store that has nothing to give, and 0 bytes."""
        return _Empty(), 0

    def close(self) -> None:
        """Nothing is held."""


class _Empty(SignalStore):
    def __init__(self) -> None:
        """Nothing is kept."""

    def gather(self, micro_batch: MicroBatch) -> Signal:
        return NoSignal()
