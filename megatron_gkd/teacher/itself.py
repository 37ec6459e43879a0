"""The student as its own teacher: its current weights, given the teacher's prompt, produce the signals of a step.

Used without `--teacher_model` and `--teacher_model_server`. Before each update the student's chunks forward the step's
teacher sequences (records.py, `Sample.for_teacher`: the same completions after another prompt), in eval mode without
autograd, through the student's own schedule, layout and process groups. The signals travel like any teacher's
(signals.py): the two plans order the samples by different lengths, so the replica that forwards a sample need not be
the one that trains on it.

    loss = D(P, Q),   P = softmax(stop_gradient(logits(teacher's prompt))),   Q = softmax(logits(prompt))

The teacher's head is the student's own, read for each micro-batch and detached, so it is always current, and no
gradient flows through the teacher's side. Where a row's two prompts are equal its divergence is 0, so data without any
`teacher_prompt` are refused (data/rows.py).

A student with adapters (model/lora.py) is taught by its base: the same pass with the adapters off, and with the base's
values of modules that are trained whole, which are kept for it.

Costs one more forward pass and no memory for weights. Not here: a teacher with older weights, or with their average.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.lora import base_value, switched_off
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.platform import new_group
from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.signals import Columns, SignalStore, exchange, step_routes
from megatron_gkd.teacher_pipeline import forward_signals, signal_spec


class Student(Protocol):
    """What is used of the student (train/student.py)."""

    layout: Layout
    groups: ProcessGroupCollection
    config: TransformerConfig

    @property
    def models(self) -> list[HiddenStateGPTModel]: ...


class SelfTeacher:
    """`signals(plan, ...)`, with the interface of TeacherPipeline."""

    def __init__(self, student: Student, *, vocab_size: int, device: torch.device, topk: int | None = None) -> None:
        """Collective over all ranks: makes a process group."""
        self.layout, self._student = student.layout, student
        self._vocab_size, self._device, self._topk = vocab_size, device, topk
        config = student.config
        self.spec = signal_spec(
            topk=topk, vocab_size=vocab_size, hidden_size=config.hidden_size, dtype=config.params_dtype, device=device
        )
        self.signal_group = new_group(range(dist.get_world_size()))

    @torch.no_grad()
    def signals(self, plan: StepPlan, micro_batches: Callable[[Sequence[int]], MicroBatch]) -> tuple[SignalStore, int]:
        """See TeacherPipeline.signals. Leaves the student's weights, gradients and mode unchanged."""
        student = self._student
        batches = [micro_batches(positions) for positions in plan.teacher[student.groups.dp.rank()]]
        local: dict[int, Columns] = {}
        was_training = [model.training for model in student.models]
        try:
            for model in student.models:
                model.eval()
            with switched_off(student.models):
                # The chunks without their DDP wrappers: nothing here is to be reduced.
                forward_signals(
                    student.models, self.layout, student.groups, batches, local.__setitem__, device=self._device,
                    topk=self._topk, vocab_size=self._vocab_size,
                )  # fmt: skip
        finally:
            for model, training in zip(student.models, was_training, strict=True):
                model.train(training)
        return exchange(self.spec, step_routes(plan, self.layout, self.layout), local, self.signal_group)

    def head(self) -> torch.Tensor:
        """The current head [V/tp, H] (with adapters, the base's), detached; on the last stage. For
        DistillationLoss.teacher_head."""
        return base_value(self._student.models[-1].head_weight())

    def close(self) -> None:
        """Nothing to close."""
