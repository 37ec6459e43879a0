"""A training step of one rank of a job that does not exist: the run's own code on fake tensors, which have shapes and
no memory, over process groups without peers. What it would allocate is counted, operation by operation.

    found = rehearse(config, world_size=16, rank=0, lengths=[(512, 1536)] * 32)
    found.built.by_category, found.peaks[1].by_category, found.traffic

Real: models, DDP, the distributed optimizer, the schedule with its micro-batches in flight, the teacher's pass, the
fused loss, the student's step. Two steps, since what is born in the first one may be alive at the peak of the second.

Different from a run on that machine, on purpose:

* Fake tensors are on a "cpu", so layers are those of a run without Transformer Engine: activations are an upper bound
  for a run with it. The loss takes the chunks of a GPU, but torch's operations in place of the Triton kernels.
* All micro-batches of the rehearsal have lengths that are told; pipelines exchange no shapes.
* A number that is read from a fake tensor is 1 (there are no values): the norm of the gradient, for instance. Tokens
  and lengths of micro-batches are real.
* Every expert gets as many tokens as the others (rehearsed_experts.py).

`Communication`: none. What would be sent is counted by the group that it would be sent over (`traffic`).
"""

from __future__ import annotations

import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import random as megatron_random
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_gkd import platform
from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import LocalTeacher, NoTeacher, ServerTeachers
from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.errors import NotBuiltError
from megatron_gkd.loss import sharded_softmax
from megatron_gkd.loss.fused import task as fused_task
from megatron_gkd.model import context_attention
from megatron_gkd.model.build import DTYPES, build_model
from megatron_gkd.model.levers import rehearsed_options
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.observe.allocations import Alive, AllocationCounter
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample, StepPlan
from megatron_gkd.teacher.itself import SelfTeacher
from megatron_gkd.teacher.nobody import Nobody
from megatron_gkd.teacher_pipeline import Teacher, TeacherPipeline
from megatron_gkd.train.adapting import check_adapters, prepare
from megatron_gkd.train.batches import Collator
from megatron_gkd.train.fit import layouts, without_borrowed_experts
from megatron_gkd.train.objective import TrainingObjective
from megatron_gkd.train.plans import plan_of
from megatron_gkd.train.rehearsed_experts import even_loads
from megatron_gkd.train.rehearsed_pictures import RehearsedSight, Shown
from megatron_gkd.train.setup import objective_of, student_of
from megatron_gkd.train.step import distill
from megatron_gkd.train.student import Student

NUM_STEPS = 2


@dataclass(frozen=True)
class Rehearsed:
    """What one rank would hold and send. Bytes."""

    rank: int
    num_parameters: int  # of the student, on this rank
    built: Alive  # between steps, before the first
    peaks: list[Alive]  # of each step
    traffic: dict[str, int]  # of the last step: by the group's name, e.g. "tp"


def rehearse(
    config: RunConfig,
    *,
    world_size: int,
    rank: int,
    lengths: Sequence[tuple[int, int]],
    lines: bool = False,
    archs: tuple[Architecture, Architecture | None] | None = None,
    num_steps: int = NUM_STEPS,
    shown: Shown | None = None,
) -> Rehearsed:
    """See the module docstring. Not collective; no process group may exist yet in this process.

    Args:
        lengths: (prompt, completion) tokens of the samples of a global batch.
        lines: tell the lines of code apart that hold memory.
        num_steps: what is born in the first one may be alive at the peak of the second.
        archs: in place of those of the configuration's models: the student's, and a local teacher's.
        shown: the images of every sample, where the student sees images.

    Raises LayoutError or ConfigError for what `train` would refuse.
    """
    student_layout, teacher_layout = planned_layouts(config, world_size)
    # Read before tensors are fake: rotary frequencies are computed with values.
    archs = archs or architectures(config)
    check_adapters(config, archs[0], student_layout)
    sight = None if shown is None or archs[0].vision is None else RehearsedSight(config, archs, shown)
    counter = AllocationCounter(lines=lines)
    with ExitStack() as stack:
        if sight is not None:
            stack.enter_context(sight.fake_towers())
        peers = stack.enter_context(_without_peers(world_size, rank))
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), counter, peers, even_loads()):
            stack.enter_context(mode)
        parts = _Parts.build(config, archs, student_layout, teacher_layout, counter, sight)
        if isinstance(parts.teacher, TeacherPipeline):
            peers.name_groups(parts.teacher.groups, "teacher's ")
        peers.name_groups(parts.student.groups)
        gc.collect()  # what a cycle still holds of the building
        built, peaks = counter.now, []
        for step in range(num_steps):
            counter.restart()
            peers.sent.clear()
            parts.step(_plan(step, config, lengths, student_layout, teacher_layout, sight), counter)
            peaks.append(counter.peak)
        num_parameters = sum(p.numel() for chunk in parts.student.chunks for p in chunk.parameters())
        return Rehearsed(rank, num_parameters, built, peaks, dict(peers.sent))


def architectures(config: RunConfig) -> tuple[Architecture, Architecture | None]:
    """The student's, and a local teacher's."""
    kind = config.teacher.kind
    return read_architecture(config.model.model), read_architecture(kind.path) if isinstance(
        kind, LocalTeacher
    ) else None


def _refuse_offload(config: RunConfig) -> None:
    for flag in ("offload_model", "offload_optimizer"):
        if config.get(flag):
            raise NotBuiltError(
                f"not built yet: plan with --{flag} true (leave it out: the step's peak is the same, and what the "
                "flag frees between two uses is the line of the weights or of the optimizer)"
            )


def planned_layouts(config: RunConfig, world_size: int, *, ranks_per_node: int | None = None) -> tuple[Layout, Layout]:
    """(student's, teacher's), of a run that can be rehearsed. Raises NotBuiltError for one that cannot yet."""
    student, teacher = layouts(config, world_size, ranks_per_node=ranks_per_node)
    _refuse_offload(config)
    match config.teacher.kind:
        case ServerTeachers() | LocalTeacher(separate=True):
            raise NotBuiltError(
                "not built yet: plan with a teacher that is not on the student's ranks (give --teacher_model alone, "
                "without --teacher_placement separate: the student's ranks hold at most as much)"
            )
        case LocalTeacher() if config.base_teaches:
            return student, student
        case LocalTeacher() as local:
            if config.teacher.offload_teacher_model:
                raise NotBuiltError(
                    "not built yet: plan with --offload_teacher_model true (leave it out: outside of the teacher's "
                    "pass the run holds less, by the teacher's weights)"
                )
            return student, without_borrowed_experts(config, read_architecture(local.path), teacher)
    return student, student


@dataclass
class _Parts:
    """What a rank of a run has, as train/setup.py makes it, without weights, rows or servers."""

    config: RunConfig
    student: Student
    teacher: Teacher
    loss: TrainingObjective

    @classmethod
    def build(
        cls,
        config: RunConfig,
        archs: tuple[Architecture, Architecture | None],
        student_layout: Layout,
        teacher_layout: Layout,
        counter: AllocationCounter,
        sight: RehearsedSight | None = None,
    ) -> _Parts:
        """Made in the order of a run. `archs`: the student's, and a local teacher's."""
        arch, groups = archs[0], build_groups(student_layout)
        options = rehearsed_options(config)
        with counter.category("student: weights, gradients, optimizer"):
            chunks = build_model(arch, student_layout, groups, options, dtype=config.model.precision)
            if sight is not None:
                sight.prepare(chunks, sight.sight.student)
            if config.tuner.is_lora:
                prepare(chunks, config, arch, groups)
            student = student_of(config, chunks, student_layout, groups, options, train_iters=NUM_STEPS)
        student.config.variable_seq_lengths = False  # shapes are values, and there are none
        with counter.category("teacher: weights"):
            teacher, loss = _teacher_and_loss(config, archs, student, teacher_layout, sight)
        return cls(config, student, teacher, loss)

    def step(self, plan: StepPlan, counter: AllocationCounter) -> None:
        """`distill`, with what it does told apart."""
        optimizer: Any = self.student.optimizer
        for member in (optimizer, *getattr(optimizer, "chained_optimizers", ())):
            member.get_grad_norm = lambda: 1.0
        with patch.object(optimizer, "step", _under(counter, "update", optimizer.step)):
            distill(
                self.student,
                self.teacher,
                _Counted(self.loss, counter),
                plan,
                device=torch.device("cpu"),
                timers=_Phases(counter),  # type: ignore[arg-type]
            )


def _teacher_and_loss(
    config: RunConfig,
    archs: tuple[Architecture, Architecture | None],
    student: Student,
    teacher_layout: Layout,
    sight: RehearsedSight | None,
) -> tuple[Teacher, TrainingObjective]:
    """By the kind of teacher, as train/teachers.py makes it, and the run's objective."""
    arch, of_teacher = archs
    topk, device, dtype = config.distillation.gkd_logits_topk, torch.device("cpu"), config.model.precision
    has_head = topk is None and student.groups.pp.rank() == student.layout.pipeline - 1
    vocab_size = arch.vocab_size
    teacher: Teacher
    head: torch.Tensor | Callable[[], torch.Tensor] | None = None
    match config.teacher.kind:
        case NoTeacher():
            teacher = Nobody(student.layout)
        case LocalTeacher() if not config.base_teaches:
            assert of_teacher is not None
            groups = build_groups(teacher_layout)
            vocab_size = min(arch.vocab_size, of_teacher.vocab_size)
            chunks = build_model(of_teacher, teacher_layout, groups, ModelOptions.on("cpu"), dtype=dtype)
            if sight is not None:
                sight.prepare(chunks, sight.sight.teacher)
            chunks[0].config.variable_seq_lengths = False
            teacher = TeacherPipeline(
                chunks, teacher_layout, groups, student.layout, vocab_size=vocab_size, device=device, topk=topk
            )
            columns = arch.padded_vocab_size(student.layout.tensor) // student.layout.tensor
            head = torch.empty(columns, of_teacher.hidden_size, dtype=DTYPES[dtype]) if has_head else None
        case _:
            teacher = itself = SelfTeacher(student, vocab_size=vocab_size, device=device, topk=topk)
            head = itself.head if has_head else None
    return teacher, objective_of(config, student.groups, vocab_size=vocab_size, head=head)


def _plan(
    step: int,
    config: RunConfig,
    lengths: Sequence[tuple[int, int]],
    student: Layout,
    teacher: Layout,
    sight: RehearsedSight | None = None,
) -> StepPlan:
    if sight is not None:
        return plan_of(config, step, sight.samples(lengths), student, teacher)
    samples = tuple(
        Sample(i, i, (0,) * prompt, (0,) * rest, "dataset", None) for i, (prompt, rest) in enumerate(lengths)
    )
    return plan_of(config, step, samples, student, teacher)


def _under(counter: AllocationCounter, category: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        with counter.category(category):
            return function(*args, **kwargs)

    return counted


class _Counted:
    """An objective whose memory is the loss's."""

    def __init__(self, loss: TrainingObjective, counter: AllocationCounter) -> None:
        self._loss, self._counter = loss, counter

    def names(self) -> tuple[str, ...]:
        return self._loss.names()

    def begin(self, plan: StepPlan) -> None:
        self._loss.begin(plan)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._counter.category("loss"):
            return self._loss(*args, **kwargs)


class _Phases:
    """Phases of a step as categories."""

    NAMES: Final = {"teacher": "teacher: activations, signals", "student": "student: activations"}

    def __init__(self, counter: AllocationCounter) -> None:
        self._counter = counter

    def phase(self, name: str) -> Any:
        return self._counter.category(self.NAMES[name])


class _NoPeers(TorchDispatchMode):
    """Answers what a fake tensor cannot: numbers, and collectives that torch's fake ones leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self._names: dict[str, str] = {}

    def name_groups(self, groups: Any, owner: str = "") -> None:
        """What the report calls the groups of a model."""
        for name in ("pp", "dp_cp", "ep", "cp", "tp"):
            if (group := getattr(groups, name, None)) is not None:
                self._names[group.group_name] = owner + name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].dtype.is_floating_point else 0
        if func.namespace == "c10d":
            self._count(func, args)
            if "coalesced" in func.__name__:
                return FakeWork().boxed()
        tensors = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        if tensors and not any(isinstance(t, FakeTensor) for t in tensors):
            with unset_fake_temporarily():  # numbers of micro-batches stay numbers
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Any) -> None:
        group = next((arg for arg in args if isinstance(arg, torch.ScriptObject)), None)
        name = "other"
        if group is not None:
            name = self._names.get(dist.ProcessGroup.unbox(group).group_name, "other")
        self.sent[name] += sum(t.nbytes for t in tree_iter(args) if isinstance(t, torch.Tensor))


@contextmanager
def _without_peers(world_size: int, rank: int) -> Iterator[_NoPeers]:
    """A world in which every collective returns at once, and what a fake world cannot do is left out."""

    def gather(found: list[Any], mine: Any, group: Any = None) -> None:
        found[:] = [mine] * len(found)

    def collate_real(self: Collator, positions: Sequence[int], collate: Any = Collator.__call__) -> MicroBatch:
        with unset_fake_temporarily():  # lengths of a pack are read by the model
            return collate(self, positions)

    assert not dist.is_initialized(), "a rehearsal needs a process of its own"
    platform.setup("cpu")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with ExitStack() as stack:
            for owner, name, value in (
                (dist, "all_gather_object", gather),
                (Collator, "__call__", collate_real),
                (context_attention, "places_of", functools.lru_cache(4)(context_attention.places_of.__wrapped__)),
                (parallel_state, "_GLOBAL_MEMORY_BUFFER", None),  # scratch, which each rank has for itself
                (megatron_random.CudaRNGStatesTracker, "fork", lambda self, name="": nullcontext()),
                (fused_task, "CHUNK_BYTES", fused_task.CHUNK_BYTES_CUDA),
                (fused_task, "MOST_TOKENS", fused_task.MOST_TOKENS_CUDA),
                (sharded_softmax, "_BLOCK_BYTES_CPU", 2**40),
            ):
                stack.enter_context(patch.object(owner, name, value))
            yield _NoPeers()
    finally:
        dist.destroy_process_group()
