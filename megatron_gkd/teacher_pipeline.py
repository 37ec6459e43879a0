"""The frozen teacher: a megatron-core model on its own process groups. Its last stage makes a signal of each sequence
of a step (teacher/signals.py) and sends it to the ranks of the student's last stage that train on the sequence.

Each sequence is forwarded once per step, in any layout of the student, without autograd, through megatron-core's
forward-only schedule. No tensor [T, V] ever exists: hidden states are sent as they are, the top K are computed in
chunks of tokens.

    TeacherPipeline     on every rank that holds a part of the teacher. `placement="colocate"`: on the student's ranks;
                        its pass ends before the student's begins. `"separate"`: on ranks that hold nothing else.
    RemoteTeacher       on the student's ranks, where the teacher has its own ranks: receives the signals.

`Teacher` is the protocol of both, and of other kinds of teachers (servers). Elsewhere: what a signal is and how it is
routed (teacher/signals.py), weights in host memory between passes (model/host_weights.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.errors import ConfigError
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.host_weights import HostWeights
from megatron_gkd.model.pipeline import forward_hidden, run_schedule, select_loss_tokens
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.platform import new_group
from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.signals import (
    Columns,
    HiddenSpec,
    Incoming,
    Outgoing,
    SignalSpec,
    SignalStore,
    TopKSpec,
    exchange,
    in_host_memory,
    step_routes,
)
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_topk

Collate = Callable[[Sequence[int]], MicroBatch]
Placement = Literal["colocate", "separate"]


class Teacher(Protocol):
    """What a run needs from a teacher of any kind."""

    @property
    def layout(self) -> Layout:
        """The layout over whose data-parallel ranks the teacher's micro-batches are planned."""

    def signals(self, plan: StepPlan, micro_batches: Collate) -> tuple[SignalStore, int]:
        """The signals of every sample of the step, and the bytes that this rank sent (or will receive, from a teacher
        on other ranks). Collective over all ranks."""

    def close(self) -> None:
        """Release resources outside this process. Idempotent, not collective."""


def signal_spec(
    *, topk: int | None, vocab_size: int, hidden_size: int, dtype: torch.dtype, device: torch.device
) -> SignalSpec:
    """The specification of a local teacher's signals: final hidden states, or the top K. Raises ConfigError for an
    impossible K."""
    if topk is None:
        return HiddenSpec(hidden_size, dtype, device)
    if not 1 <= topk <= vocab_size:
        raise ConfigError(f"gkd_logits_topk is {topk}; give 1 to {vocab_size}, the size of the vocabulary")
    return TopKSpec(topk, device)


class TeacherPipeline:
    """A rank's part of a local teacher: `signals(plan, ...)` forwards a step's sequences and delivers their signals."""

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
        placement: Placement = "colocate",
        max_signal_bytes: int | None = None,
        offload: bool = False,
        chunk_tokens: int = 1024,
    ) -> None:
        """Freeze the chunks. Collective over all ranks of the world (a group is made).

        Args:
            vocab_size: tokens that student and teacher share.
            max_signal_bytes: device memory for a step's signals; above it they are kept in host memory.
            offload: keep the weights in host memory between calls of `signals`.
            chunk_tokens: tokens whose logits exist at a time, for the top K.
        """
        config = chunks[0].config
        self.chunks, self.layout, self.groups, self.student_layout = list(chunks), layout, groups, student_layout
        self.device, self.topk, self.vocab_size, self.chunk_tokens = device, topk, vocab_size, chunk_tokens
        self.spec = signal_spec(
            topk=topk, vocab_size=vocab_size, hidden_size=config.hidden_size, dtype=config.params_dtype, device=device
        )
        self.separate, self.max_signal_bytes = placement == "separate", max_signal_bytes
        self.signal_group = new_group(range(dist.get_world_size()))
        self._outgoing: Outgoing | None = None
        for chunk in self.chunks:
            chunk.eval().requires_grad_(False)
            if topk is None and chunk.post_process:
                # The head is on the student's last stage (see teacher/signals.py). With tied embeddings this frees the
                # last stage's copy.
                chunk.output_layer = None
        self._weights = HostWeights(self.chunks, device) if offload else contextlib.nullcontext()

    @torch.no_grad()
    def signals(self, plan: StepPlan, micro_batches: Collate) -> tuple[SignalStore, int]:
        """Forward every sample of the step once and deliver the signals. Collective over all ranks of the world. With
        `placement="separate"` it returns when the signals of the PREVIOUS step have arrived.

        Args:
            micro_batches: collates the samples at the given positions for the teacher (its own prompts and padding).

        Returns:
            The store (empty on ranks outside the student's last stage) and the bytes that this rank sent.
        """
        routes = step_routes(plan, self.layout, self.student_layout)
        batches = [micro_batches(positions) for positions in plan.teacher[self.groups.dp.rank()]]
        if self.separate:
            before, self._outgoing = self._outgoing, Outgoing(routes, self.signal_group)
            self._forward(batches, self._outgoing.send)
            if before is not None:
                before.wait()
            rank = dist.get_rank()
            sent = sum(route.share.num_tokens for route in routes if route.source == rank)
            return SignalStore(self.spec, {}), sent * self.spec.bytes_per_token
        local: dict[int, Columns] = {}
        self._forward(batches, self._keeper(batches, local))
        return exchange(self.spec, routes, local, self.signal_group, max_bytes=self.max_signal_bytes)

    def close(self) -> None:
        """Wait until everything that was sent has arrived."""
        if self._outgoing is not None:
            self._outgoing.wait()
            self._outgoing = None

    def _keeper(self, batches: Sequence[MicroBatch], local: dict[int, Columns]) -> Callable[[int, Columns], None]:
        """Puts signals into `local`; in host memory if this rank's signals exceed `max_signal_bytes`."""
        own = sum(sum(batch.lengths) for batch in batches)
        limit = self.max_signal_bytes
        if limit is None or own * self.spec.bytes_per_token <= limit:
            return local.__setitem__
        return lambda position, columns: local.__setitem__(position, in_host_memory(columns))

    def _forward(self, batches: Sequence[MicroBatch], deliver: Callable[[int, Columns], None]) -> None:
        """One pass over this replica's micro-batches; `deliver` is called on the last stage after each one."""
        with self._weights:
            forward_signals(
                self.chunks, self.layout, self.groups, batches, deliver, device=self.device, topk=self.topk,
                vocab_size=self.vocab_size, chunk_tokens=self.chunk_tokens,
            )  # fmt: skip


def topk_signal(
    hidden: torch.Tensor,
    head: torch.Tensor,
    k: int,
    *,
    tp_group: dist.ProcessGroup,
    vocab_size: int,
    chunk_tokens: int,
) -> Columns:
    """The top-K signal of T hidden states [T, H] under a head's shard [V/tp, H], `chunk_tokens` at a time."""
    values, ids = [], []
    # At least one chunk, so that an empty micro-batch makes the same collectives on every TP rank.
    for rows in hidden.split(chunk_tokens) if hidden.shape[0] else (hidden,):
        logits = torch.nn.functional.linear(rows, head)
        best, indices, logsumexp = vocab_parallel_topk(logits, k, tp_group=tp_group, vocab_size=vocab_size)
        values.append(best.float() - logsumexp.float()[:, None])
        ids.append(indices.int())
    return torch.cat(values), torch.cat(ids)


def forward_signals(
    chunks: Sequence[HiddenStateGPTModel],
    layout: Layout,
    groups: ProcessGroupCollection,
    batches: Sequence[MicroBatch],
    deliver: Callable[[int, Columns], None],
    *,
    device: torch.device,
    topk: int | None,
    vocab_size: int,
    chunk_tokens: int = 1024,
) -> None:
    """Forward the micro-batches. On the last stage, after each one, `deliver(position, columns)` is called for its
    samples, in order. The columns are the hidden states [T, H], or with `topk` their top-K signal."""

    def forward_step(batches: Iterator[MicroBatch], model: Any) -> tuple[torch.Tensor, Any]:
        batch = next(batches)

        def collect(hidden: torch.Tensor, non_loss_data: bool) -> None:
            rows = select_loss_tokens(model.head_input(hidden), batch)
            columns: Columns = (rows,)
            if topk is not None:
                head, tp = model.head_weight(), groups.tp
                columns = topk_signal(rows, head, topk, tp_group=tp, vocab_size=vocab_size, chunk_tokens=chunk_tokens)
            parts = zip(*(column.split(batch.lengths) for column in columns), strict=True)
            for position, part in zip(batch.positions, parts, strict=True):
                deliver(position, part)

        return forward_hidden(model, batch, device), collect

    run_schedule(chunks, layout, groups, forward_step, batches, forward_only=True, collect=True)


class RemoteTeacher:
    """The teacher on the student's ranks, where it has its own ranks: receives its signals, one by one."""

    def __init__(self, layout: Layout, student_layout: Layout, spec: SignalSpec, *, max_signal_bytes: int) -> None:
        """Collective over all ranks of the world (a group is made).

        Args:
            layout: the teacher's layout.
            max_signal_bytes: device memory for signals that are received ahead of their use.
        """
        self.layout, self.student_layout, self.spec = layout, student_layout, spec
        self.max_signal_bytes = max_signal_bytes
        self.signal_group = new_group(range(dist.get_world_size()))
        self._incoming: Incoming | None = None

    def signals(self, plan: StepPlan, micro_batches: Collate) -> tuple[SignalStore, int]:
        """A store that receives the signals while it is used, and the bytes that it will receive. Returns at once.

        Args:
            micro_batches: not used; the teacher's ranks collate.
        """
        assert self._incoming is None or self._incoming.done, "signals of the step before were not used"
        routes = step_routes(plan, self.layout, self.student_layout)
        self._incoming = Incoming(self.spec, routes, self.signal_group, max_bytes=self.max_signal_bytes)
        return SignalStore(self.spec, {}, self._incoming), self._incoming.num_bytes

    def close(self) -> None:
        """Nothing is held outside this process."""
