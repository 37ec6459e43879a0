"""The frozen teacher on its own parallel layout, and the signals that it hands to the student's last pipeline stage.

A step runs in two phases. First the teacher forwards each sequence of the step once, on its own process groups,
through megatron-core's forward-only schedule; its last stage keeps a SIGNAL for the completion tokens only. Then the
signals travel to the ranks of the student's last stage that will compute the loss. Two kinds (T loss tokens of a
sample):

    hidden   [T, Ht] final hidden state, in the teacher's dtype. The student's last stage holds the teacher's head,
             sharded over the student's TP group like its own head, so the full-vocabulary loss is exact and no
             logits are ever sent, stored or resharded.
    top-K    [T, K] log-probabilities (float32, of the teacher's full vocabulary at temperature 1) and global token
             ids (int32).

Routing (`plan_routes`) is pure: for each sample, one source for each destination. Invariants, each asserted by a test:
    R1  every student last-stage rank that trains on a sample receives its signal exactly once, nobody else does;
    R2  the source is a last-stage rank of the teacher replica that forwarded the sample, and the destination itself
        where that is possible;
    R3  all ranks list the routes in the same order (by sample, then destination): sends and receives match untagged.

Communication: `exchange` makes one batched point-to-point round per step over `group`; bytes on the wire = sum over
routes with source != destination of T * bytes_per_token. Not here: a teacher on ranks of its own, host offload;
a teacher server (train/server_teacher.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gkd.errors import ConfigError
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.pipeline import forward_hidden, run_schedule, select_loss_tokens
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import MicroBatch, MicroBatchPlan, StepPlan
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_topk

SignalKind = Literal["hidden", "topk"]


class Route(NamedTuple):
    """One sample's signal, from a global rank to a global rank."""

    position: int
    source: int
    destination: int


def plan_routes(
    teacher_plan: MicroBatchPlan, student_plan: MicroBatchPlan, teacher: Layout, student: Layout
) -> list[Route]:
    """Who sends which sample's signal to whom (see the module docstring for the invariants)."""
    teacher_replica = {
        position: dp for dp, batches in enumerate(teacher_plan) for batch in batches for position in batch
    }
    student_replica = {
        position: dp for dp, batches in enumerate(student_plan) for batch in batches for position in batch
    }
    assert teacher_replica.keys() == student_replica.keys(), "teacher and student plan different samples"
    routes = []
    for position in sorted(student_replica):
        sources = teacher.last_stage_ranks(teacher_replica[position])
        for index, destination in enumerate(student.last_stage_ranks(student_replica[position])):
            source = destination if destination in sources else sources[(position + index) % len(sources)]
            routes.append(Route(position, source, destination))
    return routes


@dataclass(frozen=True)
class Signal:
    """The teacher's signal for T loss tokens: `hidden`, or `topk_logprobs` with `topk_indices`."""

    hidden: torch.Tensor | None = None  # [T, Ht]
    topk_logprobs: torch.Tensor | None = None  # [T, K] float32
    topk_indices: torch.Tensor | None = None  # [T, K] int64, global ids


@dataclass(frozen=True)
class SignalSpec:
    """Kind, width and types of a signal: what a receiver must know to allocate it."""

    kind: SignalKind
    width: int  # Ht, or K
    dtype: torch.dtype  # of the hidden state
    device: torch.device

    def empty(self, num_tokens: int) -> tuple[torch.Tensor, ...]:
        """Uninitialised tensors of one sample's signal."""
        if self.kind == "hidden":
            return (torch.empty(num_tokens, self.width, dtype=self.dtype, device=self.device),)
        return (
            torch.empty(num_tokens, self.width, dtype=torch.float32, device=self.device),
            torch.empty(num_tokens, self.width, dtype=torch.int32, device=self.device),
        )

    @property
    def bytes_per_token(self) -> int:
        """On the wire: Ht * itemsize, or 8 K."""
        return self.width * (self.dtype.itemsize if self.kind == "hidden" else 8)


class SignalStore:
    """The signals of one step on a rank of the student's last stage, by position in the global batch."""

    def __init__(self, spec: SignalSpec, samples: dict[int, tuple[torch.Tensor, ...]]) -> None:
        self._spec, self._samples = spec, samples

    def __len__(self) -> int:
        return len(self._samples)

    def gather(self, micro_batch: MicroBatch) -> Signal:
        """The signals of a micro-batch's loss tokens, in its order. An empty micro-batch gives tensors of zero rows."""
        parts = [self._samples[position] for position in micro_batch.positions]
        assert all(part[0].shape[0] == length for part, length in zip(parts, micro_batch.lengths, strict=True)), (
            "signal and sample lengths differ"
        )
        columns = [torch.cat(column) for column in zip(*parts, strict=True)] if parts else list(self._spec.empty(0))
        if self._spec.kind == "hidden":
            return Signal(hidden=columns[0])
        return Signal(topk_logprobs=columns[0], topk_indices=columns[1].long())


def exchange(
    spec: SignalSpec,
    routes: Sequence[Route],
    num_tokens: Sequence[int],
    local: dict[int, tuple[torch.Tensor, ...]],
    group: dist.ProcessGroup,
) -> tuple[SignalStore, int]:
    """Carry out the routes. Returns this rank's store and the bytes that it sent.

    Args:
        num_tokens: loss tokens of every sample of the step, by position.
        local: signals that this rank computed, by position.
        group: a group of all ranks, of its own (its messages must not interleave with the pipeline's).
    """
    rank = dist.get_rank()
    received: dict[int, tuple[torch.Tensor, ...]] = {}
    operations, num_bytes = [], 0
    for position, source, destination in routes:
        if source == destination:
            if rank == destination:
                received[position] = local[position]
        elif num_tokens[position] == 0:
            if rank == destination:
                received[position] = spec.empty(0)
        elif rank == source:
            operations += [dist.P2POp(dist.isend, t.contiguous(), destination, group) for t in local[position]]
            num_bytes += num_tokens[position] * spec.bytes_per_token
        elif rank == destination:
            received[position] = spec.empty(num_tokens[position])
            operations += [dist.P2POp(dist.irecv, t, source, group) for t in received[position]]
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return SignalStore(spec, received), num_bytes


class Teacher(Protocol):
    """What training asks of a teacher, local or a server."""

    layout: Layout  # by which the plan splits the samples for it

    def signals(self, plan: StepPlan, micro_batches: Callable[[Sequence[int]], MicroBatch]) -> tuple[SignalStore, int]:
        """See TeacherPipeline.signals."""

    def close(self) -> None:
        """Let go of what is outside this process."""


class TeacherPipeline:
    """A local teacher: `signals(plan, ...)` forwards a step's sequences and delivers them to the student's last
    stage."""

    def __init__(
        self,
        chunks: Sequence[HiddenStateGPTModel],
        layout: Layout,
        groups: ProcessGroupCollection,
        student_layout: Layout,
        *,
        vocab_size: int,
        device: torch.device,
        topk: int | None = None,
        chunk_tokens: int = 1024,
    ) -> None:
        if topk is not None and not 1 <= topk <= vocab_size:
            raise ConfigError(f"gkd_logits_topk {topk} is outside 1..{vocab_size}, the size of the vocabulary")
        config = chunks[0].config
        self.chunks, self.layout, self.groups, self.student_layout = list(chunks), layout, groups, student_layout
        self.device, self.topk, self.vocab_size, self.chunk_tokens = device, topk, vocab_size, chunk_tokens
        self.spec = SignalSpec(
            "hidden" if topk is None else "topk", topk or config.hidden_size, config.params_dtype, device
        )
        self.signal_group = dist.new_group(range(dist.get_world_size()))
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
            if topk is None and chunk.post_process:
                # The head lives on the student's last stage (see the module docstring); of a tied one this frees the
                # last stage's copy.
                chunk.output_layer = None

    @torch.no_grad()
    def signals(self, plan: StepPlan, micro_batches: Callable[[Sequence[int]], MicroBatch]) -> tuple[SignalStore, int]:
        """Forward every sample of the step once and route the signals. Collective over all ranks.

        Args:
            micro_batches: collates the samples at the given positions for the teacher (its own prompts, its own
            padding).

        Returns:
            The store (empty on ranks outside the student's last stage) and the bytes that this rank sent.
        """
        batches = [micro_batches(positions) for positions in plan.teacher[self.groups.dp.rank()]]
        collected = run_schedule(
            self.chunks, self.layout, self.groups, self._forward_step, batches, forward_only=True, collect=True
        )
        local = {position: signal for batch in collected for position, signal in batch.items()}
        routes = plan_routes(plan.teacher, plan.student, self.layout, self.student_layout)
        return exchange(self.spec, routes, [s.num_loss_tokens for s in plan.samples], local, self.signal_group)

    def close(self) -> None:
        """Nothing: it lives and ends with its process."""

    def _forward_step(self, batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)

        def collect(hidden: torch.Tensor, non_loss_data: bool) -> dict[int, tuple[torch.Tensor, ...]]:
            rows = model.head_input(hidden)
            return by_position(batch, self._signal(model, select_loss_tokens(rows, batch)))

        return forward_hidden(model, batch, self.device), collect

    def _signal(self, model: HiddenStateGPTModel, hidden: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if self.topk is None:
            return (hidden,)
        return topk_signal(
            hidden,
            model.head_weight(),
            self.topk,
            tp_group=self.groups.tp,
            vocab_size=self.vocab_size,
            chunk_tokens=self.chunk_tokens,
        )


def by_position(batch: MicroBatch, columns: Sequence[torch.Tensor]) -> dict[int, tuple[torch.Tensor, ...]]:
    """A micro-batch's signal, columns of [T, ...], cut into those of its samples."""
    parts = zip(*(column.split(batch.lengths) for column in columns), strict=True)
    return dict(zip(batch.positions, parts, strict=True))


def topk_signal(
    hidden: torch.Tensor,
    head: torch.Tensor,
    k: int,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    chunk_tokens: int = 1024,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The top-K signal of T hidden states [T, H] under a head's shard [V/tp, H], `chunk_tokens` at a time."""
    values, ids = [], []
    # At least one chunk, so that an empty micro-batch makes the same collectives on every TP rank.
    for rows in hidden.split(chunk_tokens) if hidden.shape[0] else (hidden,):
        logits = torch.nn.functional.linear(rows, head)
        best, indices, logsumexp = vocab_parallel_topk(logits, k, tp_group=tp_group, vocab_size=vocab_size)
        values.append(best.float() - logsumexp.float()[:, None])
        ids.append(indices.int())
    return torch.cat(values), torch.cat(ids)
