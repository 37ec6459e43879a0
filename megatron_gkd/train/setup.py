"""Builds the parts of a run from a RunConfig, on every rank: inputs are read and checked first (inputs.py), then
process groups, servers, weights and the optimizer are made.

`build(config)` returns a `Run` on the student's ranks, with or without a part of the teacher, and a `TeacherRun` on the
ranks that hold only the teacher (`--teacher_placement separate`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gkd import platform
from megatron_gkd.architecture import Architecture
from megatron_gkd.config.dtypes import chosen
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import NoTeacher
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.dataset import Rows
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.levers import optimizer_options, student_options
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.model.overlap_buffers import make_overlap_buffers
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.together import require_same
from megatron_gkd.teacher.completions import TeacherSamples
from megatron_gkd.teacher_pipeline import Teacher, TeacherPipeline
from megatron_gkd.train.adapting import put_adapters_on
from megatron_gkd.train.alike import row_facts, start_facts
from megatron_gkd.train.checkpoint.rng import seed_tracker
from megatron_gkd.train.generate import Generation, held_out_rows, read_prompts
from megatron_gkd.train.hub_files import HubFiles, asked_by, with_hub_files
from megatron_gkd.train.inputs import Inputs, read_inputs
from megatron_gkd.train.objective import DistillationLoss
from megatron_gkd.train.plans import StepPlans
from megatron_gkd.train.rollouts import Rollouts
from megatron_gkd.train.sampling import build_rollouts, check_servers
from megatron_gkd.train.student import Student
from megatron_gkd.train.supervised import SupervisedLoss
from megatron_gkd.train.teacher_identity import identity_of
from megatron_gkd.train.teacher_sampling import build_teacher_samples
from megatron_gkd.train.teachers import Taught, reach
from megatron_gkd.train.vision import prepare_towers
from megatron_gkd.weights.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)


@dataclass
class Run:
    """The parts of a run on a rank of the student."""

    config: RunConfig
    platform: platform.Platform
    architecture: Architecture  # the student's
    student: Student
    taught: Taught
    loss: DistillationLoss | SupervisedLoss
    plans: StepPlans | None  # None for an evaluation alone
    eval_rows: Rows | None
    stop_ids: tuple[int, ...]  # tokens that end a completion; () for an evaluation that samples none
    engines: Rollouts | None = None  # that sample from the student, in steps or in evaluations
    generation: Generation | None = None  # --eval_generate
    base: str = ""  # see Inputs

    @property
    def teacher(self) -> Teacher:
        return self.taught.teacher

    @property
    def train_iters(self) -> int:
        """Steps of the run."""
        return self.student.train_iters

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's tokenizer, loaded on first use. Raises CheckpointError."""
        return load_tokenizer(self.config.model.model)

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and prints."""
        return dist.get_rank() == 0

    @property
    def teacher_samples(self) -> TeacherSamples | None:
        """None if nothing is sampled from the teacher."""
        return None if self.plans is None else self.plans.teacher_samples

    @property
    def rollouts(self) -> Rollouts | None:
        """None if nothing is sampled from the student."""
        return None if self.plans is None else self.plans.rollouts


@dataclass
class TeacherRun:
    """The parts of a run on a rank that only holds the teacher."""

    config: RunConfig
    platform: platform.Platform
    architecture: Architecture  # the student's
    teacher: TeacherPipeline
    plans: StepPlans | None  # None for an evaluation alone
    student_layout: Layout
    eval_rows: Rows | None
    train_iters: int
    student: None = None


def with_dtype(config: RunConfig) -> RunConfig:
    """The configuration with `--dtype auto` resolved by this rank's device, which is logged."""
    if config.model.dtype != "auto":
        return config
    kind = platform.setup(config.parallel.device).kind
    dtype = chosen(config.model.dtype, kind)
    logger.info("--dtype is not given: %s, on %s", dtype, kind)
    return replace(config, model=replace(config.model, dtype=dtype))


def planned_dtype(config: RunConfig) -> RunConfig:
    """The same for a planned run: by the device of `--device`, or a GPU by default."""
    kind = "cuda" if config.parallel.device == "auto" else config.parallel.device
    return replace(config, model=replace(config.model, dtype=chosen(config.model.dtype, kind)))


def join(config: RunConfig, *, with_training_data: bool = True) -> HubFiles:
    """Meet the other ranks, fetch models and data named on a hub, and check that all ranks were started alike.
    Collective over all ranks of the world.

    Raises ConfigError, the same on all ranks, that names the rank with another flag, file or package, with both values.
    """
    where = platform.setup(config.parallel.device)
    student_options(config, where.kind)  # what this device does not do is refused before ranks wait for each other
    torch.use_deterministic_algorithms(config.kernels.deterministic_mode)
    platform.init_distributed(where, timeout_minutes=config.parallel.distributed_timeout_minutes)
    asked = asked_by(config, with_training_data=with_training_data)
    require_same({f"--{item.flag} {item.name.text}": "a name of a hub" for item in asked}, "started alike")
    found = with_hub_files(config, asked)
    require_same(start_facts(found.config, config), "started alike")
    return found


def build(config: RunConfig, *, with_training_data: bool = True) -> Run | TeacherRun:
    """Check, then build. Collective over all ranks, which have met (`join`)."""
    config = with_dtype(config)
    where = platform.setup(config.parallel.device)
    platform.init_distributed(where, timeout_minutes=config.parallel.distributed_timeout_minutes)
    inputs = read_inputs(config, dist.get_world_size(), with_training_data=with_training_data)
    require_same(row_facts(inputs.rows, inputs.eval_rows), "given the same rows")
    groups = build_groups(inputs.student_layout)
    here = inputs.student_layout.holds(dist.get_rank())
    # Servers and the teacher's engine come first: an error within seconds, and the devices' memory is free.
    reached = reach(inputs, where)
    rows, samples = inputs.rows, inputs.rows is not None and config.lmbda.most > 0
    prompts = read_prompts(inputs) if config.generates else None
    if samples or prompts is not None:
        check_servers(inputs, rows if samples else None)
    teacher_samples = None
    if rows is not None and config.distillation.samples_teacher:
        # What the first window of steps needs is sampled here.
        teacher_samples = build_teacher_samples(inputs, reached.needs)
    # Ranks without a student have to be told what it samples.
    everyone = platform.new_group(range(dist.get_world_size())) if inputs.separate and samples else None
    torch.manual_seed(config.training.seed)
    # The tracker's states are only drawn from with dropout, which is 0; sequence parallelism demands that they exist.
    seed_tracker(config.training.seed, groups if here else None)
    student = _build_student(inputs, where, groups) if here else None
    if student is not None and inputs.teacher_arch is not None:
        student.leave_device()  # what is offloaded leaves its room to a teacher that is loaded now
    taught, arch, layout = reached.make(student), inputs.student_arch, inputs.student_layout
    if student is not None:
        logger.info("student %s, %s; teacher %s", arch.model_type, layout.describe(), reached.told)
    engines, generation = None, None
    if student is not None and (samples or prompts is not None):
        engines = build_rollouts(inputs, where, student, held_out_rows(inputs))
        if prompts is not None:
            generation = Generation(inputs, prompts, engines, student.groups.intra_dist_opt)
    rollouts = engines if samples else None
    plans = None
    if rows is not None:
        identity = identity_of(config.teacher.kind, taught.teacher)
        plans = StepPlans(
            inputs, rollouts=rollouts, teacher_samples=teacher_samples, everyone=everyone, teacher=identity
        )
    if student is None:
        assert isinstance(taught.teacher, TeacherPipeline)
        return TeacherRun(config, where, arch, taught.teacher, plans, layout, inputs.eval_rows, inputs.train_iters)
    loss = objective_of(config, groups, vocab_size=inputs.vocab_size, head=taught.head)
    eval_rows, stop_ids = inputs.eval_rows, inputs.stop_ids
    return Run(config, where, arch, student, taught, loss, plans, eval_rows, stop_ids, engines, generation, inputs.base)


def objective_of(
    config: RunConfig,
    groups: ProcessGroupCollection,
    *,
    vocab_size: int,
    head: torch.Tensor | Callable[[], torch.Tensor] | None,
) -> DistillationLoss | SupervisedLoss:
    """The training objective. `groups`: the student's; `head`: the teacher's (teachers.Taught)."""
    distillation = config.distillation
    if isinstance(config.teacher.kind, NoTeacher):
        return SupervisedLoss(fuse=distillation.fuse_loss, tp_group=groups.tp, vocab_size=vocab_size)
    return DistillationLoss(distillation, tp_group=groups.tp, vocab_size=vocab_size, teacher_head=head)


def _build_student(inputs: Inputs, where: platform.Platform, groups: ProcessGroupCollection) -> Student:
    config, layout = inputs.config, inputs.student_layout
    source, options = ModelSource(config.model.model, inputs.student_arch), student_options(config, where.kind)
    if options.tp_comm_overlap:
        make_overlap_buffers(layout, options, inputs.student_arch.hidden_size)
    chunks = source.build(layout, groups, options, dtype=config.model.precision)
    source.load(chunks, groups)
    prepare_towers(chunks, inputs.sight.student)
    if config.tuner.is_lora:
        put_adapters_on(chunks, config, inputs.student_arch, groups)
    return student_of(config, chunks, layout, groups, options, train_iters=inputs.train_iters)


def student_of(
    config: RunConfig,
    chunks: list[HiddenStateGPTModel],
    layout: Layout,
    groups: ProcessGroupCollection,
    options: ModelOptions,
    *,
    train_iters: int,
) -> Student:
    """The Student of a configuration, with its optimizer."""
    return Student(
        chunks,
        layout,
        groups,
        config.training,
        options,
        train_iters=train_iters,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        freeze_embeddings=config.model.freeze_embeddings,
        freeze_router=config.model.freeze_router,
        freeze_vision=config.model.freeze_vision,
        freeze_projector=config.model.freeze_projector,
        optimizer_options=optimizer_options(config),
        empty_unused_memory_level=config.kernels.empty_unused_memory_level,
        offload=config.offload,
    )
