"""One distillation step: plan -> teacher signals -> student's forward and backward -> metrics.

`distill` asks the teacher for the signals of all samples of the plan. Then it runs the student's schedule with a
forward step that, on the last stage, calls the objective with each micro-batch and its signals. `evaluate` in
evaluate.py does the same without gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.model.pipeline import ForwardStep, forward_hidden
from megatron_gkd.observe.metrics import Metrics
from megatron_gkd.observe.timers import Timers
from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.signals import NoSignal, SignalStore
from megatron_gkd.teacher_pipeline import Teacher, TeacherPipeline
from megatron_gkd.train.batches import Collator
from megatron_gkd.train.objective import Objective, TrainingObjective
from megatron_gkd.train.student import StepResult, Student
from megatron_gkd.weights.chunks import unwrap


def teacher_signals(teacher: Teacher, plan: StepPlan) -> tuple[SignalStore, int]:
    """Signals of every sample of the plan, and the bytes that this rank sent. Collective over all ranks."""
    samples, layout, rank = [sample.for_teacher for sample in plan.samples], teacher.layout, dist.get_rank()
    cp_rank = layout.coordinate(rank).cp if layout.holds(rank) else 0  # a rank without a part of it collates nothing
    return teacher.signals(plan, Collator(samples, plan.teacher, layout, packing=plan.packing, cp_rank=cp_rank))


def forward_step_with(objective: Objective, signals: SignalStore, device: torch.device) -> ForwardStep:
    """The `forward_step_func` that megatron-core's schedules call: hidden states, and as `loss_func` the objective,
    bound to the micro-batch. The schedules call that on the last stage only, the one that has signals."""

    def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch, chunk = next(batches), unwrap(model)
        output = forward_hidden(model, batch, device)
        signal = signals.gather(batch) if chunk.post_process else NoSignal()
        return output, partial(objective, chunk, batch=batch, signal=signal)

    return forward_step


def student_batches(plan: StepPlan, student: Student) -> list[MicroBatch]:
    """This rank's part of the micro-batches of its data-parallel replica."""
    layout, groups = student.layout, student.groups
    collate = Collator(plan.samples, plan.student, layout, packing=plan.packing, cp_rank=groups.cp.rank())
    return [collate(positions) for positions in plan.student[groups.dp.rank()]]


def distill(
    student: Student,
    teacher: Teacher,
    objective: TrainingObjective,
    plan: StepPlan,
    *,
    device: torch.device,
    timers: Timers,
    meanwhile: Callable[[], None] = lambda: None,
    loss_is_finite: Callable[[list[Any], int], bool] = lambda reports, num_bytes: True,
) -> StepResult:
    """One update of the student on the plan.

    Args:
        meanwhile: called between the teacher's part and the student's, to start work that overlaps the latter.
        loss_is_finite: decides, the same on every rank, from this rank's reports and signal bytes whether the update
            is made.
    """
    objective.begin(plan)
    with timers.phase("teacher"):
        if isinstance(teacher, TeacherPipeline):  # beside the student
            student.leave_device()
        signals, num_bytes = teacher_signals(teacher, plan)
    meanwhile()
    with timers.phase("student"):
        return student.train_step(
            forward_step_with(objective, signals, device),
            student_batches(plan, student),
            lambda reports: loss_is_finite(reports, num_bytes),
            num_loss_tokens=sum(sample.num_loss_tokens for sample in plan.samples),
        )


def add_reports(metrics: Metrics, reports: Sequence[dict[str, torch.Tensor]], student: Student) -> None:
    """Add the (sum, count) pairs of this rank's micro-batches. TP rank 0 of the last stage alone contributes: the
    other TP ranks computed the same numbers, the other stages have none. Context-parallel ranks each add their tokens.
    """
    if student.groups.tp.rank() == 0:
        for report in reports:
            for name, pair in report.items():
                metrics.add(name, *pair.unbind())


def reduce_reports(metrics: Metrics, student: Student, device: torch.device) -> Metrics:
    """Sum over ranks; the same result on every rank.

    Communication: one all-reduce of [2 * number of names] float64 over all ranks of the student's layout.
    """
    return metrics.reduce(lambda flat: dist.all_reduce(flat, group=student.groups.intra_dist_opt), device=device)
