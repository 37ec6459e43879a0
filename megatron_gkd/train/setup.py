"""From a RunConfig to the parts of a run, on every rank: inputs are read and checked first (inputs.py), then process
groups, servers, weights and the optimizer are made.

`build(config)` gives each rank what it is: a `Run` where the student is, with or without a part of the teacher; a
`TeacherRun` on the ranks that the teacher has to itself (`--teacher_placement separate`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_gkd import platform
from megatron_gkd.architecture import Architecture
from megatron_gkd.config import RunConfig
from megatron_gkd.data.dataset import Rows
from megatron_gkd.dtypes import Dtype, chosen
from megatron_gkd.model.build import DTYPES, HiddenStateGPTModel, build_model
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.together import require_same
from megatron_gkd.teacher_pipeline import RemoteTeacher, Teacher, TeacherPipeline, signal_spec
from megatron_gkd.teacher_server.probes import PROBE_TOKENS, Needs, probe_tokens
from megatron_gkd.train.alike import row_facts, start_facts
from megatron_gkd.train.inputs import Inputs, read_inputs
from megatron_gkd.train.loss import DistillationLoss
from megatron_gkd.train.plans import StepPlans
from megatron_gkd.train.rollouts import Rollouts
from megatron_gkd.train.sampling import build_rollouts, check_servers, engine_length
from megatron_gkd.train.self_teacher import SelfTeacher
from megatron_gkd.train.server_teacher import ServerTeacher
from megatron_gkd.train.student import Student
from megatron_gkd.train.teacher_samples import TeacherSamples
from megatron_gkd.train.teacher_sampling import build_teacher_samples
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import load_hf_weights, load_vocab_shard

logger = get_logger(__name__)


@dataclass
class Run:
    """The parts of a run on a rank of the student's."""

    config: RunConfig
    platform: platform.Platform
    architecture: Architecture  # the student's
    student: Student
    teacher: Teacher
    loss: DistillationLoss
    plans: StepPlans | None  # None for an evaluation alone
    eval_rows: Rows | None
    stop_ids: tuple[int, ...]  # tokens that end a completion; () for an evaluation alone

    @property
    def train_iters(self) -> int:
        """Steps of the run."""
        return self.student.train_iters

    @property
    def is_writer(self) -> bool:
        """Whether this rank writes files and prints."""
        return dist.get_rank() == 0

    @property
    def teacher_samples(self) -> TeacherSamples | None:
        """None where nothing is sampled from the teacher."""
        return None if self.plans is None else self.plans.teacher_samples

    @property
    def rollouts(self) -> Rollouts | None:
        """None where nothing is sampled from the student."""
        return None if self.plans is None else self.plans.rollouts


@dataclass
class TeacherRun:
    """The parts of a run on a rank that the teacher has to itself."""

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
    """The configuration with `--dtype auto` decided by the device of this rank, and said."""
    if config.model.dtype != "auto":
        return config
    kind = platform.setup(config.parallel.device).kind
    dtype = chosen(config.model.dtype, kind)
    logger.info("--dtype is not given: %s, on %s", dtype, kind)
    return replace(config, model=replace(config.model, dtype=dtype))


def join(config: RunConfig) -> platform.Platform:
    """Meet the other ranks, and find that all were started alike. Collective over all ranks of the world.

    Raises ConfigError, the same on all ranks: which rank has another flag, file or package, with both values.
    """
    where = platform.setup(config.parallel.device)
    platform.init_distributed(where, timeout_minutes=config.parallel.distributed_timeout_minutes)
    require_same(start_facts(config), "started alike")
    return where


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
    needs = _server_needs(inputs) if config.teacher.servers else None
    teacher: Teacher | None = None if needs is None else _server_teacher(inputs, where, needs)
    samples = inputs.rows is not None and config.distillation.lmbda > 0
    if inputs.rows is not None and samples:
        check_servers(config, inputs.student_arch, inputs.rows)
    teacher_samples = _teacher_samples(inputs, needs)
    local = not (config.teacher.servers or config.teacher.is_student)
    teacher_groups = build_groups(inputs.teacher_layout) if local else None
    torch.manual_seed(config.training.seed)
    # The tracker's states are only drawn from with dropout, which is 0; sequence parallelism demands that they exist.
    tp_rank = groups.tp.rank() if here else 0
    model_parallel_cuda_manual_seed(config.training.seed, tp_rank=tp_rank, ep_rank=0, etp_rank=0)
    student = _build_student(inputs, where, groups) if here else None
    if teacher is None and config.teacher.is_student:
        assert student is not None, "RunConfig.validate refuses ranks of its own for a student that teaches itself"
        topk = config.distillation.gkd_logits_topk
        teacher = SelfTeacher(student, vocab_size=inputs.vocab_size, device=where.device, topk=topk)
    elif teacher is None:
        assert teacher_groups is not None
        teacher = _local_teacher(inputs, where, teacher_groups)
    # Ranks without a student have to be told what it samples.
    everyone = platform.new_group(range(dist.get_world_size())) if inputs.separate and samples else None
    if student is None:
        assert isinstance(teacher, TeacherPipeline)
        plans = _plans(inputs, None, teacher_samples, everyone)
        student_arch, layout = inputs.student_arch, inputs.student_layout
        return TeacherRun(config, where, student_arch, teacher, plans, layout, inputs.eval_rows, inputs.train_iters)
    head = _teacher_head(inputs, where, groups, teacher)
    loss = DistillationLoss(config.distillation, tp_group=groups.tp, vocab_size=inputs.vocab_size, teacher_head=head)
    logger.info("student %s, %s; teacher %s", inputs.student_arch.model_type, student.layout.describe(), _told(inputs))
    rollouts = None
    if inputs.rows is not None and samples:
        rollouts = build_rollouts(
            config, where, inputs.student_arch, student, inputs.tokenizer, inputs.rows, inputs.vocab_size
        )
    plans = _plans(inputs, rollouts, teacher_samples, everyone)
    return Run(config, where, inputs.student_arch, student, teacher, loss, plans, inputs.eval_rows, inputs.stop_ids)


def _plans(
    inputs: Inputs,
    rollouts: Rollouts | None,
    teacher_samples: TeacherSamples | None,
    everyone: dist.ProcessGroup | None,
) -> StepPlans | None:
    if inputs.rows is None:
        return None
    return StepPlans(
        inputs.config,
        inputs.rows,
        inputs.draws,
        inputs.student_layout,
        inputs.teacher_layout,
        clock=inputs.clock,
        max_model_len=engine_length(inputs.config, inputs.student_arch),
        rollouts=rollouts,
        teacher_samples=teacher_samples,
        everyone=everyone,
    )


def _build_student(inputs: Inputs, where: platform.Platform, groups: ProcessGroupCollection) -> Student:
    config, layout = inputs.config, inputs.student_layout
    chunks = load_model(
        config.model.model, inputs.student_arch, layout, groups, dtype=config.model.precision, where=where
    )
    return Student(
        chunks,
        layout,
        groups,
        config.training,
        train_iters=inputs.train_iters,
        use_distributed_optimizer=config.parallel.use_distributed_optimizer,
        freeze_embeddings=config.model.freeze_embeddings,
    )


def _teacher_samples(inputs: Inputs, needs: Needs | None) -> TeacherSamples | None:
    """Where the teacher samples: what the first window of steps needs is sampled here. Collective over all ranks."""
    if inputs.rows is None or not inputs.config.distillation.samples_teacher:
        return None
    assert dist.group.WORLD is not None
    return build_teacher_samples(
        inputs.config,
        inputs.rows,
        inputs.draws,
        inputs.tokenizer,
        inputs.vocab_size,
        needs,
        group=dist.group.WORLD,
    )


def _server_teacher(inputs: Inputs, where: platform.Platform, needs: Needs) -> Teacher:
    """Probed: a server that does not fit is an error within seconds."""
    config = inputs.config
    # The ranks that do not ask wait in a collective, so the requests have to end before it does.
    timeout_s = config.teacher.teacher_timeout_s or 0.8 * 60 * config.parallel.distributed_timeout_minutes
    return ServerTeacher(
        config.teacher.servers,
        needs,
        inputs.student_layout,
        device=where.device,
        timeout_s=timeout_s,
        tags=config.teacher.server_tags,
    )


def _local_teacher(inputs: Inputs, where: platform.Platform, groups: ProcessGroupCollection) -> Teacher:
    """This rank's part of it, or what receives its signals. Collective over all ranks."""
    config, arch = inputs.config, inputs.teacher_arch
    assert arch is not None, "RunConfig.validate refuses a run without a teacher"
    topk, dtype = config.distillation.gkd_logits_topk, config.model.precision
    max_signal_bytes = int(config.teacher.signal_memory_gb * 1e9)
    if not inputs.teacher_layout.holds(dist.get_rank()):
        spec = signal_spec(
            topk=topk,
            vocab_size=inputs.vocab_size,
            hidden_size=arch.hidden_size,
            dtype=DTYPES[dtype],
            device=where.device,
        )
        return RemoteTeacher(inputs.teacher_layout, inputs.student_layout, spec, max_signal_bytes=max_signal_bytes)
    assert config.teacher.teacher_model is not None
    chunks = load_model(config.teacher.teacher_model, arch, inputs.teacher_layout, groups, dtype=dtype, where=where)
    return TeacherPipeline(
        chunks,
        inputs.teacher_layout,
        groups,
        inputs.student_layout,
        vocab_size=inputs.vocab_size,
        device=where.device,
        topk=topk,
        placement=config.teacher.teacher_placement,
        max_signal_bytes=max_signal_bytes,
        offload=config.teacher.offload_teacher_model,
    )


def _teacher_head(
    inputs: Inputs, where: platform.Platform, groups: ProcessGroupCollection, teacher: Teacher
) -> torch.Tensor | Callable[[], torch.Tensor] | None:
    """For hidden-state signals, on the student's last stage: the teacher's head, cut at the student's shard borders."""
    config, layout = inputs.config, inputs.student_layout
    if config.teacher.servers or config.distillation.gkd_logits_topk or groups.pp.rank() != layout.pipeline - 1:
        return None
    if isinstance(teacher, SelfTeacher):
        return teacher.head
    assert inputs.teacher_arch is not None
    assert config.teacher.teacher_model is not None
    with HFCheckpoint(config.teacher.teacher_model) as checkpoint:
        return load_vocab_shard(
            checkpoint,
            inputs.teacher_arch,
            "head",
            rank=groups.tp.rank(),
            size=layout.tensor,
            padded_vocab=inputs.student_arch.padded_vocab_size(layout.tensor),
            dtype=DTYPES[config.model.precision],
            num_rows=inputs.vocab_size,
        ).to(where.device)


def _told(inputs: Inputs) -> str:
    """The teacher, for the log."""
    if inputs.config.teacher.servers:
        return f"at {', '.join(inputs.config.teacher.servers)}"
    if inputs.teacher_arch is None:
        return "the student itself"
    own = f" on {inputs.teacher_layout.world_size} ranks of its own" if inputs.separate else ""
    return f"{inputs.teacher_arch.model_type}, {inputs.teacher_layout.describe()}{own}"


def _server_needs(inputs: Inputs) -> Needs:
    """What the run asks of its teacher servers."""
    config, distillation, tokenizer = inputs.config, inputs.config.distillation, inputs.tokenizer
    topk = distillation.gkd_logits_topk
    assert topk is not None, "RunConfig.validate refuses a server without --gkd_logits_topk"
    data = [dataset for dataset in (inputs.rows, inputs.eval_rows) if dataset is not None]
    longest = max((dataset.longest for dataset in data), default=2)
    if inputs.rows is not None and (distillation.lmbda > 0 or distillation.samples_teacher):
        longest = max(longest, config.data.max_length)
    largest_id = len(tokenizer) - 1
    first = [dataset[index] for dataset in data for index in range(min(len(dataset), PROBE_TOKENS))]
    probe = probe_tokens([(*row.prompt_ids_for_teacher, *(row.completion_ids or ())) for row in first], largest_id)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return Needs(topk, inputs.vocab_size, largest_id, longest, probe, encode)


def load_model(
    path: str,
    arch: Architecture,
    layout: Layout,
    groups: ProcessGroupCollection,
    *,
    dtype: Dtype,
    where: platform.Platform,
) -> list[HiddenStateGPTModel]:
    """A model with its weights, this rank's chunks."""
    chunks = build_model(arch, layout, groups, dtype=dtype, use_cpu=where.kind == "cpu")
    with HFCheckpoint(path) as checkpoint:
        load_hf_weights(chunks, checkpoint, arch, tp_rank=groups.tp.rank(), tp_size=layout.tensor)
    return chunks
