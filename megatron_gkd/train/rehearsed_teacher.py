"""The teacher of a rehearsal (rehearsal.py), by its kind, as in train/teachers.py, without weights or servers.

    LocalTeacher      TeacherPipeline on the ranks that hold a part of it, RemoteTeacher on the others
    ServerTeachers    ServedOnPaper: answers of the right size, which travel as those of servers do
    SelfTeaching      SelfTeacher
    NoTeacher         Nobody

Memory that a run offloads to the host is subtracted afterwards (phases.py, `away`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import LocalTeacher, NoTeacher, ServerTeachers
from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.model.build import DTYPES, build_model
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.model.sequences import student_shares
from megatron_gkd.observe.allocations import AllocationCounter
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.platform import new_group
from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.itself import SelfTeacher
from megatron_gkd.teacher.nobody import Nobody
from megatron_gkd.teacher.served import server_routes
from megatron_gkd.teacher.signals import Columns, SignalStore, TopKSpec, exchange
from megatron_gkd.teacher_pipeline import RemoteTeacher, Teacher, TeacherPipeline, signal_spec
from megatron_gkd.train.phases import HEAD, WEIGHTS
from megatron_gkd.train.rehearsed_pictures import RehearsedSight
from megatron_gkd.train.student import Student

Head = torch.Tensor | Callable[[], torch.Tensor] | None


def rehearsed_teacher(
    config: RunConfig,
    archs: tuple[Architecture, Architecture | None],
    student: Student | None,
    layouts: tuple[Layout, Layout],
    counter: AllocationCounter,
    sight: RehearsedSight | None = None,
) -> tuple[Teacher, Head, int]:
    """(teacher, its head if this rank applies it, tokens that both models have).

    Args:
        archs: the student's, and a local teacher's.
        student: None on a rank that only holds the teacher.
        layouts: the student's and the teacher's.
        sight: how models see images, if they do.
    """
    arch, of_teacher = archs
    topk, device = config.distillation.gkd_logits_topk, torch.device("cpu")
    last = student is not None and student.groups.pp.rank() == student.layout.pipeline - 1
    has_head, vocab_size = topk is None and last, arch.vocab_size
    match config.teacher.kind:
        case NoTeacher():
            return Nobody(layouts[0]), None, vocab_size
        case ServerTeachers():
            assert topk is not None, "config/validate.py refuses servers without it"
            return ServedOnPaper(layouts[0], topk), None, vocab_size
        case LocalTeacher() if not config.base_teaches:
            assert of_teacher is not None
            vocab_size = min(arch.vocab_size, of_teacher.vocab_size)
            with counter.category(WEIGHTS):
                teacher = _local(config, of_teacher, layouts, vocab_size, sight)
            head = None
            if has_head:
                columns = arch.padded_vocab_size(layouts[0].tensor) // layouts[0].tensor
                with counter.category(HEAD):
                    head = torch.empty(columns, of_teacher.hidden_size, dtype=DTYPES[config.model.precision])
            return teacher, head, vocab_size
    assert student is not None, "it is on all ranks"
    itself = SelfTeacher(student, vocab_size=vocab_size, device=device, topk=topk)
    return itself, itself.head if has_head else None, vocab_size


def _local(
    config: RunConfig,
    arch: Architecture,
    layouts: tuple[Layout, Layout],
    vocab_size: int,
    sight: RehearsedSight | None,
) -> Teacher:
    student, layout = layouts
    topk, dtype, device = config.distillation.gkd_logits_topk, config.model.precision, torch.device("cpu")
    groups = build_groups(layout)
    limit = int(config.teacher.signal_memory_gb * 1e9)
    if not layout.holds(dist.get_rank()):
        width = arch.hidden_size
        spec = signal_spec(topk=topk, vocab_size=vocab_size, hidden_size=width, dtype=DTYPES[dtype], device=device)
        return RemoteTeacher(layout, student, spec, max_signal_bytes=limit)
    chunks = build_model(arch, layout, groups, ModelOptions.on("cpu"), dtype=dtype)
    if sight is not None:
        sight.prepare(chunks, sight.sight.teacher)
    chunks[0].config.variable_seq_lengths = False  # shapes are values, and there are none
    return TeacherPipeline(
        chunks,
        layout,
        groups,
        student,
        vocab_size=vocab_size,
        device=device,
        topk=topk,
        placement=config.teacher.teacher_placement,
    )


class ServedOnPaper:
    """Teacher servers that have answered: a driver has its samples' top K, and sends them on (teacher/served.py)."""

    def __init__(self, student: Layout, topk: int) -> None:
        """Collective: makes a process group."""
        self.layout, self.spec = student, TopKSpec(topk, torch.device("cpu"))
        self.signal_group = new_group(range(dist.get_world_size()))

    @torch.no_grad()
    def signals(self, plan: StepPlan, micro_batches: Callable[[Sequence[int]], MicroBatch]) -> tuple[SignalStore, int]:
        """See ServerTeacher.signals."""
        routes = server_routes(plan.student, self.layout, student_shares(plan, self.layout))
        asked = {route.position: route.held.num_tokens for route in routes if route.source == dist.get_rank()}
        local: dict[int, Columns] = {position: self.spec.empty(tokens) for position, tokens in asked.items()}
        return exchange(self.spec, routes, local, self.signal_group)

    def close(self) -> None:
        """Nothing to close."""
