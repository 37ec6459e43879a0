"""Makes the teacher of a run, by its kind (config/models.py, `TeacherConfig.kind`).

    LocalTeacher      TeacherPipeline on the ranks that hold a part of it, RemoteTeacher on the others
    ServerTeachers    ServerTeacher
    SelfTeaching      SelfTeacher
    NoTeacher         Nobody

In two parts. `reach` runs before a weight is read, so that an unsuitable server is an error within seconds and the
devices' memory is free for the teacher's engine. `Reached.make` runs once there is a student.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.servers import LocalTeacher, NoTeacher, SelfTeaching, ServerTeachers
from megatron_gkd.model.build import DTYPES
from megatron_gkd.model.levers import teacher_options
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.platform import Platform
from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.itself import SelfTeacher
from megatron_gkd.teacher.nobody import Nobody
from megatron_gkd.teacher.served import ServerTeacher
from megatron_gkd.teacher.servers.probes import PROBE_TOKENS, ServerRequirements, probe_tokens
from megatron_gkd.teacher_pipeline import RemoteTeacher, Teacher, TeacherPipeline, signal_spec
from megatron_gkd.train.inputs import Inputs
from megatron_gkd.train.student import Student
from megatron_gkd.train.vision import prepare_towers
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.load import load_vocab_shard
from megatron_gkd.weights.source import ModelSource


class Taught(NamedTuple):
    """A rank's part of the teacher."""

    teacher: Teacher
    # Of hidden-state signals, on the student's last stage: the teacher's head, cut at the student's shard borders.
    head: torch.Tensor | Callable[[], torch.Tensor] | None = None
    prefetch: Callable[[StepPlan], None] | None = None  # ask for a later step's signals, where that can be


class Reached(NamedTuple):
    """What is known of a teacher before a weight is read."""

    told: str  # for the log
    needs: ServerRequirements | None  # what the run asks of teacher servers
    make: Callable[[Student | None], Taught]  # collective over all ranks, each with its student


def reach(inputs: Inputs, where: Platform) -> Reached:
    """Probe servers, or make the process groups of a local teacher. Collective over all ranks."""
    match inputs.config.teacher.kind:
        case ServerTeachers() as servers:
            needs = server_needs(inputs)
            taught = _at_servers(inputs, where, servers, needs)
            return Reached(f"at {', '.join(servers.urls)}", needs, lambda student: taught)
        case SelfTeaching():
            told = "the student's base, without its adapter" if inputs.config.base_teaches else "the student itself"
            return Reached(told, None, functools.partial(_itself, inputs, where))
        case NoTeacher():
            return Reached("none", None, lambda student: Taught(Nobody(inputs.student_layout)))
        case LocalTeacher() if inputs.config.base_teaches:
            return Reached("the student's base, without its adapter", None, functools.partial(_itself, inputs, where))
        case LocalTeacher() as local:
            arch, layout = inputs.teacher_arch, inputs.teacher_layout
            assert arch is not None, "read from the same directory"
            told = f"{arch.model_type}, {layout.describe()}"
            own = f" on {layout.world_size} ranks of its own" if local.separate else ""
            return Reached(
                told + own, None, functools.partial(_local, inputs, where, local.path, arch, build_groups(layout))
            )


def _has_head(inputs: Inputs, student: Student) -> bool:
    """Whether this rank applies the teacher's head to its hidden states."""
    hidden = inputs.config.distillation.gkd_logits_topk is None
    return hidden and student.groups.pp.rank() == student.layout.pipeline - 1


def _itself(inputs: Inputs, where: Platform, student: Student | None) -> Taught:
    assert student is not None, "it is on all ranks"
    topk = inputs.config.distillation.gkd_logits_topk
    teacher = SelfTeacher(student, vocab_size=inputs.vocab_size, device=where.device, topk=topk)
    return Taught(teacher, teacher.head if _has_head(inputs, student) else None)


def _at_servers(inputs: Inputs, where: Platform, servers: ServerTeachers, needs: ServerRequirements) -> Taught:
    config = inputs.config
    # The ranks that do not ask wait in a collective, so the requests have to end before it does.
    timeout_s = config.teacher.teacher_timeout_s or 0.8 * 60 * config.parallel.distributed_timeout_minutes
    teacher = ServerTeacher(
        servers.urls,
        needs,
        inputs.student_layout,
        device=where.device,
        timeout_s=timeout_s,
        tags=servers.tags,
        images=inputs.sight.student,
    )
    return Taught(teacher, None, teacher.prefetch)


def _local(
    inputs: Inputs,
    where: Platform,
    path: str,
    arch: Architecture,
    groups: ProcessGroupCollection,
    student: Student | None,
) -> Taught:
    """This rank's part of a local teacher, or the receiver of its signals."""
    config, layout = inputs.config, inputs.teacher_layout
    topk, dtype = config.distillation.gkd_logits_topk, config.model.precision
    max_signal_bytes = int(config.teacher.signal_memory_gb * 1e9)
    teacher: Teacher
    if layout.holds(dist.get_rank()):
        source = ModelSource(path, arch)
        chunks = source.build(layout, groups, teacher_options(config, where.kind), dtype=dtype)
        source.load(chunks, groups)
        prepare_towers(chunks, inputs.sight.teacher)
        teacher = TeacherPipeline(
            chunks,
            layout,
            groups,
            inputs.student_layout,
            vocab_size=inputs.vocab_size,
            device=where.device,
            topk=topk,
            placement=config.teacher.teacher_placement,
            max_signal_bytes=max_signal_bytes,
            offload=config.teacher.offload_teacher_model,
        )
    else:
        spec = signal_spec(
            topk=topk,
            vocab_size=inputs.vocab_size,
            hidden_size=arch.hidden_size,
            dtype=DTYPES[dtype],
            device=where.device,
        )
        teacher = RemoteTeacher(layout, inputs.student_layout, spec, max_signal_bytes=max_signal_bytes)
    if student is None or not _has_head(inputs, student):
        return Taught(teacher)
    size = student.layout.tensor
    with HFCheckpoint(path) as checkpoint:
        head = load_vocab_shard(
            checkpoint,
            arch,
            "head",
            rank=student.groups.tp.rank(),
            size=size,
            padded_vocab=inputs.student_arch.padded_vocab_size(size),
            dtype=DTYPES[dtype],
            num_rows=inputs.vocab_size,
        )
    return Taught(teacher, head.to(where.device))


def server_needs(inputs: Inputs) -> ServerRequirements:
    """What the run requires of its teacher servers."""
    config, distillation, tokenizer = inputs.config, inputs.config.distillation, inputs.tokenizer
    topk = distillation.gkd_logits_topk
    assert topk is not None, "config/validate.py refuses servers without it"
    data = [dataset for dataset in (inputs.rows, inputs.eval_rows) if dataset is not None]
    longest = max((dataset.longest for dataset in data), default=2)
    if inputs.rows is not None and (config.lmbda.most > 0 or distillation.samples_teacher):
        longest = max(longest, config.data.max_length)
    largest_id = len(tokenizer) - 1
    first = [dataset[index] for dataset in data for index in range(min(len(dataset), PROBE_TOKENS))]
    probe = probe_tokens([(*row.prompt_ids_for_teacher, *(row.completion_ids or ())) for row in first], largest_id)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    return ServerRequirements(topk, inputs.vocab_size, largest_id, longest, probe, encode)
