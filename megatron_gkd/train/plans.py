"""The plan of every step of a run, the same on every rank before any tensor exists.

    for each step:  rows -> sources -> completions -> samples -> plan

Everything random is a function of (seed, step, sample), so a resumed run needs only the step and the data position. If
the student samples, the completions also depend on its weights: they come from `Rollouts` on the student's ranks and,
if the teacher has its own ranks, the first rank sends them to all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch.distributed as dist

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.dataset import Rows
from megatron_gkd.model.pipeline import common_shape
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.together import from_first
from megatron_gkd.records import Sample, StepPlan
from megatron_gkd.rollout.protocol import Completion, Request
from megatron_gkd.rollout.requests import make_requests
from megatron_gkd.schedule import Sampled, make_samples, plan_step
from megatron_gkd.teacher.completions import TeacherSamples
from megatron_gkd.train.batches import plan_forward
from megatron_gkd.train.checkpoint import TrainerState
from megatron_gkd.train.fit import max_tokens, teacher_max_tokens
from megatron_gkd.train.inputs import Inputs
from megatron_gkd.train.rollouts import Rollouts
from megatron_gkd.train.sampling import engine_length, seeing


def plan_of(config: RunConfig, step: int, samples: Sequence[Sample], student: Layout, teacher: Layout) -> StepPlan:
    """The plan of a step's samples in these layouts, with micro-batches sized by the flags. `step` counts from 0."""
    plan = plan_step(
        step,
        samples,
        data_parallel_size=student.data,
        micro_batch_size=config.training.micro_batch_size,
        teacher_data_parallel_size=teacher.data,
        teacher_micro_batch_size=config.teacher.teacher_micro_batch_size,
        teacher_max_tokens=teacher_max_tokens(config),
        packing=config.data.packing,
        max_tokens=max_tokens(config, student),
        multiple_of=student.row_multiple,
        segment_multiple=student.segment_multiple,
        one_shape=common_shape(student),
    )
    return replace(plan, values=config.values_at(step + 1))


class StepPlans:
    """The plans of a run's steps. `plan` is collective over the ranks that sample; over all ranks if the teacher
    samples or `everyone` is given."""

    def __init__(
        self,
        inputs: Inputs,
        *,
        rollouts: Rollouts | None = None,
        teacher_samples: TeacherSamples | None = None,
        everyone: dist.ProcessGroup | None = None,
        teacher: str = "",
    ) -> None:
        """Args:
        rollouts: on the student's ranks, if the student samples.
        teacher_samples: on all ranks, if the teacher samples.
        everyone: all ranks, if the student samples and some ranks do not hold it: they are sent the completions.
        teacher: its identity (teacher_identity.py), for checkpoints.
        """
        self._inputs, self._draws, self._everyone = inputs, inputs.draws, everyone
        self.rollouts, self.teacher_samples, self._teacher = rollouts, teacher_samples, teacher

    def before_training(self, student: Architecture) -> TrainerState:
        """The initial state of a run without a checkpoint; a checkpoint's state is compared with it."""
        sharded = self._inputs.config.parallel.use_distributed_optimizer
        rows, clock = self._draws.rows.fingerprint(), self._inputs.clock.time
        base = self._inputs.base
        return TrainerState(0, 0, rows, repr(student), sharded, teacher=self._teacher, clock=clock, base=base)

    def requests(self, step: int) -> list[Request]:
        """The requests to the sampling engines for a step."""
        config, (_, rows, sources) = self._inputs.config, self._draws[step]
        requests = make_requests(
            {position: rows[position].prompt_ids for position, source in enumerate(sources) if source == "student"},
            run_seed=config.training.seed,
            step=step,
            max_completion_length=config.values_at(step + 1).max_completion_length,
            max_length=config.data.max_length,
            max_model_len=engine_length(config, self._inputs.student_arch),
        )
        images = self._inputs.sight.student
        return [seeing(request, rows[request.key], images) for request in requests]

    def plan(self, step: int) -> StepPlan:
        """The plan of step `step`, counted from 0. A pure function of the configuration, the data, the step and, if the
        student samples, its weights."""
        return self._with(step, self._completions(step))

    def plan_ahead(self, step: int) -> StepPlan | None:
        """The plan of a later step, if its samples do not depend on the student's next weights: nothing is sampled, or
        its completions exist already (--steps_per_generation). Not collective."""
        if self.teacher_samples is not None:
            return None
        waiting = {} if self.rollouts is None else self.rollouts.waiting(step)
        return None if waiting is None else self._with(step, _sampled(waiting))

    def _with(self, step: int, sampled: Mapping[int, Sampled]) -> StepPlan:
        inputs, (indices, rows, sources) = self._inputs, self._draws[step]
        samples = make_samples(indices, rows, sources, sampled=sampled)
        return plan_of(inputs.config, step, samples, inputs.student_layout, inputs.teacher_layout)

    def _completions(self, step: int) -> dict[int, Sampled]:
        sampled: dict[int, Sampled] = {}
        if self.rollouts is not None:
            sampled = _sampled(self.rollouts.for_step(step, self.requests))
        if self._everyone is not None:
            sampled = from_first(sampled, self._everyone)
        if self.teacher_samples is not None:
            # The cache does not keep log-probabilities.
            sampled |= {position: Sampled(ids, None) for position, ids in self.teacher_samples.for_step(step).items()}
        return sampled


def _sampled(completions: Mapping[int, Completion]) -> dict[int, Sampled]:
    return {position: Sampled(c.token_ids, c.version, c.logprobs) for position, c in completions.items()}


def evaluation_plans(config: RunConfig, rows: Rows, student: Layout, teacher: Layout) -> Iterator[StepPlan]:
    """Forward passes over held-out rows, in batches of the training batch size; only the last may be smaller."""
    training, batch_size = config.training, config.training.global_batch_size
    for start in range(0, len(rows), batch_size):
        indices = range(start, min(start + batch_size, len(rows)))
        samples = make_samples(indices, [rows[i] for i in indices], ["dataset"] * len(indices))
        yield StepPlan(
            0,
            samples,
            plan_forward(
                [s.num_inputs for s in samples],
                student,
                micro_batch_size=training.micro_batch_size,
                max_tokens=None if training.max_tokens_per_gpu is None else max_tokens(config, student),
            ),
            plan_forward(
                [sample.for_teacher.num_inputs for sample in samples],
                teacher,
                micro_batch_size=config.teacher.teacher_micro_batch_size or training.micro_batch_size,
                max_tokens=teacher_max_tokens(config),
            ),
            config.data.packing,
        )
