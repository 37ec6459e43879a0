"""Rehearses a training step of one rank without the job: the run's own code on fake tensors, which have shapes and no
memory, over process groups without peers. Allocations are counted operation by operation.

    found = rehearse(config, world_size=16, rank=0, lengths=[(512, 1536)] * 32)
    found.built.by_category, found.peaks[1].by_category, found.traffic

Real: models, DDP, the distributed optimizer, the schedule with its micro-batches in flight, the teacher's pass, the
fused loss, the student's step. Two steps, because memory from the first can still be held at the peak of the second.

Intended differences from a run on that machine:

* Fake tensors are on a "cpu", so layers are those without Transformer Engine: activations are an upper bound for a run
  with it. The loss uses the chunk sizes of a GPU, but torch's operations instead of the Triton kernels.
* All micro-batches have the given lengths; pipelines exchange no shapes.
* A number that is read from a fake tensor is 1, because there are no values: the gradient norm, for instance. Tokens
  and lengths of micro-batches are real.
* Every expert gets the same number of tokens (rehearsed_experts.py).
* Offloaded memory (--offload_...) stays on the device; `Rehearsed.phases` has it subtracted.

Communication: none. What would be sent is counted by process group (`traffic`).
"""

from __future__ import annotations

import functools
import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Final
from unittest.mock import patch

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random as megatron_random
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter

from megatron_gkd import platform
from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.levers import OffloadConfig
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import LocalTeacher
from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.loss import sharded_softmax
from megatron_gkd.loss.fused import task as fused_task
from megatron_gkd.model import context_attention
from megatron_gkd.model.build import build_model
from megatron_gkd.model.levers import rehearsed_options
from megatron_gkd.observe.allocations import Alive, AllocationCounter, Done
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import Sample, StepPlan
from megatron_gkd.teacher_pipeline import Teacher, TeacherPipeline
from megatron_gkd.train.adapting import check_adapters, prepare
from megatron_gkd.train.batches import Collator
from megatron_gkd.train.fit import layouts, without_borrowed_experts
from megatron_gkd.train.objective import TrainingObjective
from megatron_gkd.train.phases import GRADIENTS, LOAD_TEACHER, OPTIMIZER, STUDENT_WEIGHTS, away
from megatron_gkd.train.plans import plan_of
from megatron_gkd.train.rehearsed_experts import even_loads
from megatron_gkd.train.rehearsed_pictures import RehearsedSight, Shown
from megatron_gkd.train.rehearsed_teacher import rehearsed_teacher
from megatron_gkd.train.setup import objective_of, student_of
from megatron_gkd.train.step import distill, teacher_signals
from megatron_gkd.train.student import Student, optimizer_tensors

NUM_STEPS = 2
Replacement = tuple[Any, str, Any]  # owner, name, value


@dataclass(frozen=True)
class Rehearsed:
    """What one rank would hold and send, in bytes."""

    rank: int
    num_parameters: int  # of the student, on this rank
    built: Alive  # between steps, before the first
    peaks: list[Alive]  # of each step
    traffic: dict[str, int]  # of the last step: by the group's name, e.g. "tp"
    phases: dict[str, Alive] = field(default_factory=dict)  # at the peak of each, without what is in host memory then
    ranks: dict[str, tuple[int, ...]] = field(default_factory=dict)  # of the groups, by name
    calls: dict[str, int] = field(default_factory=dict)  # of collectives in the last step, likewise
    work: dict[str, Done] = field(default_factory=dict)  # operations of the last step, by phase


def rehearse(
    config: RunConfig,
    *,
    world_size: int,
    rank: int,
    lengths: Sequence[tuple[int, int]],
    lines: bool = False,
    archs: tuple[Architecture, Architecture | None] | None = None,
    num_steps: int = NUM_STEPS,
    ranks_per_node: int | None = None,
    shown: Shown | None = None,
) -> Rehearsed:
    """See the module docstring. Not collective; this process must not have a process group yet.

    Args:
        lengths: (prompt, completion) tokens of the samples of a global batch.
        lines: count memory by line of code.
        num_steps: memory from the first step can still be held at the peak of the second.
        archs: replaces the architectures of the configuration's models: the student's, and a local teacher's.
        ranks_per_node: for --teacher_nodes.
        shown: the images of every sample, if the student sees images.

    Raises LayoutError or ConfigError where `train` would.
    """
    student_layout, teacher_layout = planned_layouts(config, world_size, ranks_per_node=ranks_per_node)
    # Read before tensors are fake: rotary frequencies are computed with values.
    archs = archs or architectures(config)
    check_adapters(config, archs[0], student_layout)
    sight = None if shown is None or archs[0].vision is None else RehearsedSight(config, archs, shown)
    counter = AllocationCounter(lines=lines)
    with ExitStack() as stack:
        if sight is not None:
            stack.enter_context(sight.fake_towers())
        platform.setup("cpu")
        stack.enter_context(without_peers(world_size, rank, *_as_on_a_gpu()))
        peers = _NoPeers()
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), counter, peers, even_loads()):
            stack.enter_context(mode)
        parts = _Parts.build(config, archs, student_layout, teacher_layout, counter, sight)
        if isinstance(parts.teacher, TeacherPipeline):
            peers.name_groups(parts.teacher.groups, "teacher's ")
        if parts.student is not None:
            peers.name_groups(parts.student.groups)
        peers.name_group("signals", getattr(parts.teacher, "signal_group", None))
        loads = [peak.without(away(config, name)) for name, peak in counter.peaks.items()]
        gc.collect()  # what a cycle still holds of the building
        built, peaks, phases = counter.now, list[Alive](), dict[str, Alive]()
        for step in range(num_steps):
            counter.restart()
            peers.sent.clear()
            peers.calls.clear()
            parts.step(_plan(step, config, lengths, student_layout, teacher_layout, sight), counter)
            peaks.append(counter.peak)
            for name, peak in counter.peaks.items():
                name = f"step {step + 1}" if name == "update" else name
                phases[name] = max(phases.get(name, peak), peak, key=lambda alive: alive.total)
        phases = {name: peak.without(away(config, name)) for name, peak in phases.items() if name != "other"}
        phases = {"load": max(loads, key=lambda alive: alive.total)} | phases
        chunks = [] if parts.student is None else parts.student.chunks
        num_parameters = sum(p.numel() for chunk in chunks for p in chunk.parameters())
        sent, calls, ranks = dict(peers.sent), dict(peers.calls), dict(peers.ranks)
        return Rehearsed(rank, num_parameters, built, peaks, sent, phases, ranks, calls, counter.work)


def architectures(config: RunConfig) -> tuple[Architecture, Architecture | None]:
    """The student's, and a local teacher's."""
    kind = config.teacher.kind
    of_teacher = read_architecture(kind.path) if isinstance(kind, LocalTeacher) else None
    return read_architecture(config.model.model), of_teacher


def planned_layouts(config: RunConfig, world_size: int, *, ranks_per_node: int | None = None) -> tuple[Layout, Layout]:
    """(student's, teacher's); the student's twice if no separate model teaches on ranks."""
    student, teacher = layouts(config, world_size, ranks_per_node=ranks_per_node)
    if isinstance(config.teacher.kind, LocalTeacher) and not config.base_teaches:
        return student, without_borrowed_experts(config, read_architecture(config.teacher.kind.path), teacher)
    return student, student


@dataclass
class _Parts:
    """The parts of a run on one rank, as in train/setup.py, without weights, rows or servers."""

    config: RunConfig
    student: Student | None  # None on a rank that the teacher has to itself
    teacher: Teacher
    loss: TrainingObjective | None

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
        """Built in the order of a run. `archs`: the student's, and a local teacher's."""
        groups = build_groups(student_layout)
        here = student_layout.holds(dist.get_rank())
        student = _student(config, archs[0], student_layout, groups, counter, sight) if here else None
        with counter.phase(LOAD_TEACHER):
            pair = student_layout, teacher_layout
            teacher, head, vocab_size = rehearsed_teacher(config, archs, student, pair, counter, sight)
        loss = None if student is None else objective_of(config, groups, vocab_size=vocab_size, head=head)
        return cls(config, student, teacher, loss)

    def step(self, plan: StepPlan, counter: AllocationCounter) -> None:
        """`distill`, with memory counted by phase; on a rank of the teacher alone, its part."""
        timers: Any = _Phases(counter)
        if self.student is None or self.loss is None:
            with timers.phase("teacher"):
                teacher_signals(self.teacher, plan)
            return
        optimizer: Any = self.student.optimizer
        for member in (optimizer, *getattr(optimizer, "chained_optimizers", ())):
            member.get_grad_norm = lambda: 1.0
        backward = counter.in_phase("backward", schedules.backward_step)
        with (
            patch.object(optimizer, "step", counter.in_phase("update", _under(counter, "update", optimizer.step))),
            patch.object(schedules, "backward_step", backward),
        ):
            loss, device = _Counted(self.loss, counter), torch.device("cpu")
            distill(self.student, self.teacher, loss, plan, device=device, timers=timers)


def _student(
    config: RunConfig,
    arch: Architecture,
    layout: Layout,
    groups: Any,
    counter: AllocationCounter,
    sight: RehearsedSight | None,
) -> Student:
    """The student, with its memory counted by category."""
    options = rehearsed_options(config)
    with counter.category("student: buffers"):
        chunks = build_model(arch, layout, groups, options, dtype=config.model.precision)
        if sight is not None:
            sight.prepare(chunks, sight.sight.student)
        if config.tuner.is_lora:
            prepare(chunks, config, arch, groups)
        config = replace(config, offload=OffloadConfig())
        student = student_of(config, chunks, layout, groups, options, train_iters=NUM_STEPS)
    student.config.variable_seq_lengths = False  # shapes are values, and there are none
    counter.rename(optimizer_tensors(student.optimizer), OPTIMIZER)
    buffers = [buffer for chunk in student.chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers]
    counter.rename((buffer.grad_data for buffer in buffers), GRADIENTS)
    # Last: a weight of --dtype fp32 is the optimizer's main weight as well.
    counter.rename((weight for chunk in student.chunks for weight in chunk.parameters()), STUDENT_WEIGHTS)
    return student


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
    """An objective whose memory is counted as the loss."""

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
    """Maps the phases of a step to categories."""

    NAMES: Final = {"teacher": "teacher: activations, signals", "student": "student: activations"}

    def __init__(self, counter: AllocationCounter) -> None:
        self._counter = counter

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._counter.category(self.NAMES[name]), self._counter.phase("forward" if name == "student" else name):
            yield
        if name == "teacher":  # what outlives the pass
            self._counter.rename_all(self.NAMES[name], "signals")


class _NoPeers(TorchDispatchMode):
    """Answers for operations that a fake tensor cannot do: reading numbers, and collectives that torch's fake ones
    lack."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._names: dict[str, str] = {}
        self.ranks: dict[str, tuple[int, ...]] = {}

    def name_groups(self, groups: Any, owner: str = "") -> None:
        """Set the report's names of a model's groups."""
        for name in ("pp", "dp_cp", "ep", "cp", "tp"):
            self.name_group(owner + name, getattr(groups, name, None))

    def name_group(self, name: str, group: Any) -> None:
        """Set the name of one group; None is ignored."""
        if group is not None:
            self._names[group.group_name] = name
            self.ranks[name] = tuple(dist.get_process_group_ranks(group))

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
        self.calls[name] += 1
        self.sent[name] += sum(t.nbytes for t in tree_iter(args) if isinstance(t, torch.Tensor))


def replacements() -> tuple[Replacement, ...]:
    """Replacements for functions that fail if tensors have no values and groups no peers."""

    def gather(found: list[Any], mine: Any, group: Any = None) -> None:
        found[:] = [mine] * len(found)

    def collate_real(self: Collator, positions: Sequence[int], collate: Any = Collator.__call__) -> MicroBatch:
        with unset_fake_temporarily():  # lengths of a pack are read by the model
            return collate(self, positions)

    return (
        (dist, "all_gather_object", gather),
        (Collator, "__call__", collate_real),
        (parallel_state, "_GLOBAL_MEMORY_BUFFER", None),  # scratch, which each rank has for itself
        (megatron_random.CudaRNGStatesTracker, "fork", lambda self, name="": nullcontext()),
    )


def _mask_without_memory(num_queries: int, num_keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """On a GPU the kernels do not write out the mask of ContextAttention; on a CPU it is written out once."""
    with _disable_current_modes():
        return torch.zeros(1, 1, dtype=dtype, device=device).expand(num_queries, num_keys)


@contextmanager
def without_peers(world_size: int, rank: int, *further: Replacement) -> Iterator[None]:
    """A world in which every collective returns at once; functions that fail in it are replaced."""
    assert not dist.is_initialized(), "groups without peers need a process without a group"
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        with ExitStack() as stack:
            for owner, name, value in (*replacements(), *further):
                stack.enter_context(patch.object(owner, name, value))
            yield
    finally:
        dist.destroy_process_group()


def _as_on_a_gpu() -> tuple[Replacement, ...]:
    """A GPU's sizes of the loss's chunks and blocks; no attention mask."""
    return (
        (context_attention, "causal_lower_right", _mask_without_memory),
        (context_attention, "places_of", functools.lru_cache(4)(context_attention.places_of.__wrapped__)),
        (fused_task, "CHUNK_BYTES", fused_task.CHUNK_BYTES_CUDA),
        (fused_task, "MOST_TOKENS", fused_task.MOST_TOKENS_CUDA),
        (sharded_softmax, "_BLOCK_BYTES_CPU", 2**40),
    )
