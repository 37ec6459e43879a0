"""No teacher (`--objective sft`), with a teacher's interface: nothing is loaded, forwarded or sent.

Its signals are the empty `NoSignal`, which only an objective without a teacher accepts.
"""

from __future__ import annotations

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.signals import NoSignal, Signal, SignalStore
from megatron_gkd.teacher_pipeline import Collate


class Nobody:
    """`signals(plan, ...)`, with the interface of TeacherPipeline; not collective."""

    def __init__(self, layout: Layout) -> None:
        """Args: layout: the student's, over which the steps are planned."""
        self.layout = layout

    def signals(self, plan: StepPlan, micro_batches: Collate) -> tuple[SignalStore, int]:
        """An empty store, and 0 bytes."""
        return _Empty(), 0

    def close(self) -> None:
        """Nothing to close."""


class _Empty(SignalStore):
    def __init__(self) -> None:
        """Nothing is kept."""

    def gather(self, micro_batch: MicroBatch) -> Signal:
        return NoSignal()
