"""The signals that a teacher gives the student, and how they travel from the teacher's last pipeline stage to the
student's.

A SIGNAL belongs to a sample of the step (T loss tokens, in completion order). Two kinds:

    hidden   [T, Ht] final hidden states, in the teacher's dtype. The student's last stage holds the teacher's head,
             sharded over the student's TP group like its own head. So the full-vocabulary loss is exact, and logits are
             never sent, stored or resharded.
    top-K    [T, K] log-probabilities (float32, of the teacher's full vocabulary at temperature 1) and global token
             ids (int32).

Under context parallelism a rank holds a share of a sample's loss tokens (records.LossShare): the teacher's ranks those
of their chunks, the student's those of theirs, which may differ.

Routing (`plan_routes`) is pure: for each sample and destination there is one source for each share of the teacher's
that contains some of its tokens. Invariants, each asserted by a test:
    R1  every student last-stage rank that trains on a sample receives the signal of each loss token that it holds
        exactly once, no other rank does; a rank that holds none of them has one route without tokens;
    R2  the source is a last-stage rank of the teacher replica that forwarded the sample and holds those tokens, and is
        the destination itself if possible;
    R3  all ranks list the routes in the same order, in which the teacher makes the signals (micro-batch, replica,
        sample, destination): sends and receives of a pair of ranks match untagged.

Two ways to travel, both point to point over a group of their own, with the same bytes on the wire: sum over routes with
source != destination of T * bytes_per_token.

    exchange              teacher and student share their ranks: after the teacher's pass, in rounds (`plan_rounds`)
                          in which no rank sends or receives more than `max_bytes`. What a rank holds of a step
                          beyond `max_bytes` is kept in (pinned) host memory.
    Outgoing, Incoming    the teacher has its own ranks: each signal is sent as soon as it is made, and received at
                          most `max_bytes` ahead of its use. So the student starts the first micro-batch while the
                          teacher works on the second, and the teacher starts the next step while the student still
                          trains.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.model.sequences import Shares, student_shares, teacher_shares
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import LossShare, MicroBatchPlan, StepPlan

Columns = tuple[torch.Tensor, ...]  # of one sample: (hidden,) or (log-probabilities, ids)


class Route(NamedTuple):
    """Signals of loss tokens of one sample, from a global rank to a global rank."""

    position: int
    source: int
    destination: int
    share: LossShare  # what travels
    held: LossShare  # what the source has: the rows of its columns

    @property
    def rows(self) -> LossShare:
        """The travelling tokens as rows of the source's columns."""
        return self.share.within(self.held)


def replicas(plan: MicroBatchPlan) -> dict[int, int]:
    """Position of a sample -> its data-parallel replica."""
    return {position: dp for dp, batches in enumerate(plan) for batch in batches for position in batch}


def plan_routes(
    teacher_plan: MicroBatchPlan,
    student_plan: MicroBatchPlan,
    teacher: Layout,
    student: Layout,
    teacher_shares: Shares,
    student_shares: Shares,
) -> list[Route]:
    """Which rank sends which sample's signal to which (see the module docstring for the invariants)."""
    teacher_replica, student_replica = replicas(teacher_plan), replicas(student_plan)
    assert teacher_replica.keys() == student_replica.keys(), "teacher and student plan different samples"
    routes = []
    for row in zip(*teacher_plan, strict=True):  # the i-th micro-batch of every replica
        for position in (position for batch in row for position in batch):
            sources = [teacher.last_stage_ranks(teacher_replica[position], cp) for cp in range(teacher.context)]
            holders = list(zip(teacher_shares[position], sources, strict=True))
            to = destinations(student, student_replica[position], student_shares[position])
            for wanted, index, destination in to:
                parts = [(held & wanted, held, ranks) for held, ranks in holders]
                for share, held, ranks in [part for part in parts if part[0].spans] or parts[:1]:
                    source = destination if destination in ranks else ranks[(position + index) % len(ranks)]
                    routes.append(Route(position, source, destination, share, held))
    return routes


def destinations(student: Layout, dp: int, shares: Sequence[LossShare]) -> Iterator[tuple[LossShare, int, int]]:
    """For the last-stage ranks of a replica, in order of rank: (the rank's share of a sample, its index, global
    rank)."""
    for cp, share in enumerate(shares):
        for tp, rank in enumerate(student.last_stage_ranks(dp, cp)):
            yield share, tp + student.tensor * cp, rank


def step_routes(plan: StepPlan, teacher: Layout, student: Layout) -> list[Route]:
    """The routes of a step's plan, from a local teacher."""
    shares = teacher_shares(plan, teacher), student_shares(plan, student)
    return plan_routes(plan.teacher, plan.student, teacher, student, *shares)


def plan_rounds(routes: Sequence[Route], bytes_per_token: int, max_bytes: int | None) -> list[list[Route]]:
    """Group the routes that travel, in order, into rounds in which no rank sends or receives more than `max_bytes`
    (None: one round). A larger signal gets a round in which its two ranks have no other."""
    rounds: list[list[Route]] = []
    load: dict[tuple[str, int], int] = {}
    for route in routes:
        size = route.share.num_tokens * bytes_per_token
        if route.source == route.destination or not size:
            continue
        ends = (("sends", route.source), ("receives", route.destination))
        full = max_bytes is not None and any(load.get(end, 0) and load[end] + size > max_bytes for end in ends)
        if not rounds or full:
            rounds.append([])
            load = {}
        rounds[-1].append(route)
        for end in ends:
            load[end] = load.get(end, 0) + size
    return rounds


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's final hidden states for T loss tokens."""

    hidden: torch.Tensor  # [T, Ht]

    def __getitem__(self, rows: slice) -> HiddenSignal:
        return HiddenSignal(self.hidden[rows])

    def is_finite(self) -> torch.Tensor:
        return torch.isfinite(self.hidden).all()


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's K most probable tokens for T loss tokens."""

    logprobs: torch.Tensor  # [T, K] float32, at temperature 1
    indices: torch.Tensor  # [T, K] int64, global ids

    def __getitem__(self, rows: slice) -> TopKSignal:
        return TopKSignal(self.logprobs[rows], self.indices[rows])

    def is_finite(self) -> torch.Tensor:
        """A log-probability may be -inf."""
        return (self.logprobs < torch.inf).all()


@dataclass(frozen=True)
class NoSignal:
    """The signal of a run without a teacher, and of a pipeline stage before the last."""

    def __getitem__(self, rows: slice) -> NoSignal:
        return self

    def is_finite(self) -> torch.Tensor:
        return torch.ones((), dtype=torch.bool)


Signal = HiddenSignal | TopKSignal | NoSignal


@dataclass(frozen=True)
class HiddenSpec:
    """What a receiver needs to allocate hidden states and to make a signal of them."""

    width: int  # Ht
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """On the wire."""
        return self.width * self.dtype.itemsize

    def empty(self, num_tokens: int) -> Columns:
        """Uninitialised tensors of one sample's signal."""
        return (torch.empty(num_tokens, self.width, dtype=self.dtype, device=self.device),)

    def signal(self, columns: Columns) -> Signal:
        return HiddenSignal(*columns)


@dataclass(frozen=True)
class TopKSpec:
    """The same for top-K signals."""

    width: int  # K
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """On the wire: float32 and int32."""
        return 8 * self.width

    def empty(self, num_tokens: int) -> Columns:
        dtypes = (torch.float32, torch.int32)
        return tuple(torch.empty(num_tokens, self.width, dtype=dtype, device=self.device) for dtype in dtypes)

    def signal(self, columns: Columns) -> Signal:
        logprobs, ids = columns
        return TopKSignal(logprobs, ids.long())


SignalSpec = HiddenSpec | TopKSpec


class SignalStore:
    """The signals of one step on a rank of the student's last stage, by position in the global batch. Each can be taken
    once, and its memory is then released."""

    def __init__(self, spec: SignalSpec, samples: dict[int, Columns], incoming: Incoming | None = None) -> None:
        """Holds `samples`, and receives others from `incoming`."""
        self._spec, self._samples, self._incoming = spec, samples, incoming

    def gather(self, micro_batch: MicroBatch) -> Signal:
        """The signals of a micro-batch's loss tokens, in its order. An empty micro-batch gives tensors of zero rows."""
        parts = [self._take(position) for position in micro_batch.positions]
        assert all(part[0].shape[0] == length for part, length in zip(parts, micro_batch.lengths, strict=True)), (
            "signal and sample lengths differ"
        )
        columns = tuple(map(torch.cat, zip(*parts, strict=True))) if parts else self._spec.empty(0)
        return self._spec.signal(columns)

    def _take(self, position: int) -> Columns:
        if position in self._samples:
            columns = self._samples.pop(position)
        else:
            assert self._incoming is not None, f"the signal of sample {position} is not here, or was taken before"
            columns = self._incoming.take(position)
        return tuple(column.to(self._spec.device, non_blocking=True) for column in columns)


def exchange(
    spec: SignalSpec,
    routes: Sequence[Route],
    local: dict[int, Columns],
    group: dist.ProcessGroup,
    *,
    max_bytes: int | None = None,
) -> tuple[SignalStore, int]:
    """Carry out the routes. Returns this rank's store and the bytes that it sent.

    Args:
        local: signals that this rank computed, of the tokens in its routes, by position; on the device or in host
        memory. group: a group of all ranks that is used for nothing else (its messages must not mix with the
        pipeline's). max_bytes: of a round, and of the device memory that this rank's store may take; None: no limit.
    """
    rank = dist.get_rank()
    mine = [route for route in routes if route.destination == rank]
    num_bytes = sum(route.share.num_tokens for route in mine) * spec.bytes_per_token
    to_host = max_bytes is not None and num_bytes > max_bytes
    received: dict[int, list[tuple[LossShare, Columns]]] = {route.position: [] for route in mine}
    for route in mine:
        if route.source == rank:
            received[route.position].append((route.share, rows_of(local[route.position], route.rows)))
        elif not route.share.num_tokens:
            received[route.position].append((route.share, spec.empty(0)))
    sent = 0
    for some in plan_rounds(routes, spec.bytes_per_token, max_bytes):
        operations = []
        arriving: list[tuple[Route, Columns]] = []
        for route in some:
            if rank == route.source:
                columns = tuple(t.to(spec.device).contiguous() for t in rows_of(local[route.position], route.rows))
                operations += [dist.P2POp(dist.isend, t, route.destination, group) for t in columns]
                sent += route.share.num_tokens * spec.bytes_per_token
            elif rank == route.destination:
                columns = spec.empty(route.share.num_tokens)
                arriving.append((route, columns))
                operations += [dist.P2POp(dist.irecv, t, route.source, group) for t in columns]
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        for route, columns in arriving:
            received[route.position].append((route.share, in_host_memory(columns) if to_host else columns))
    return SignalStore(spec, {position: joined(parts) for position, parts in received.items()}), sent


class Outgoing:
    """Sends the signals of one step from a rank of a teacher with its own ranks, each as soon as it is made."""

    def __init__(self, routes: Sequence[Route], group: dist.ProcessGroup) -> None:
        """Args: routes: of the step; those from this rank are used."""
        self._group, self._under_way = group, list[tuple[Any, torch.Tensor]]()
        self._routes: dict[int, list[Route]] = {}
        for route in routes:
            if route.source == dist.get_rank():
                self._routes.setdefault(route.position, []).append(route)

    def send(self, position: int, columns: Columns) -> None:
        """Start sending one sample's signal. To be called in the order of the routes."""
        for route in self._routes.pop(position, []):
            for column in rows_of(columns, route.rows) if route.share.num_tokens else ():
                column = column.contiguous()
                request = dist.isend(column, route.destination, group=self._group)
                self._under_way.append((request, column))  # sending reads the tensor until it is done

    def wait(self) -> None:
        """Wait until everything is received."""
        for request, _ in self._under_way:
            request.wait()
        self._under_way.clear()


class Incoming:
    """Receives the signals of one step on a rank of the student's last stage, from a teacher with its own ranks: in the
    order in which they are made, at most `max_bytes` ahead of their use.

    If the student's order differs from the teacher's so much that more arrives, the oldest are moved to host memory.
    Nothing is received before the first is taken.
    """

    def __init__(
        self,
        spec: SignalSpec,
        routes: Sequence[Route],
        group: dist.ProcessGroup,
        *,
        max_bytes: int,
    ) -> None:
        """Uses the routes to this rank."""
        self._spec, self._group, self._max_bytes = spec, group, max_bytes
        mine = [route for route in routes if route.destination == dist.get_rank()]
        self._parts: dict[int, list[Route]] = {route.position: [] for route in mine}
        for route in mine:
            if route.share.num_tokens:
                self._parts[route.position].append(route)
        self._to_come = deque(route for route in mine if route.share.num_tokens)
        self._here: dict[Route, tuple[Columns, list[Any]]] = {}  # on the device, with the requests that fill them
        self._staged: dict[Route, Columns] = {}  # in host memory
        self._held = 0
        self.num_bytes = sum(map(self._size, self._to_come))
        self.most_held_bytes = 0

    @property
    def done(self) -> bool:
        """Whether every signal was taken."""
        return not (self._to_come or self._here or self._staged)

    def take(self, position: int) -> Columns:
        """The signal of a sample. Waits for it, and starts receiving the next ones."""
        assert position in self._parts, f"no signal of sample {position} is expected"
        parts = [(route.share, self._take(route)) for route in self._parts.pop(position)]
        return joined(parts) if parts else self._spec.empty(0)

    def _take(self, route: Route) -> Columns:
        while route not in self._here and route not in self._staged:
            self._post(making_room=True)
        if route in self._staged:
            columns = self._staged.pop(route)
        else:
            columns, requests = self._here.pop(route)
            self._held -= self._size(route)
            for request in requests:
                request.wait()
        while self._to_come and self._held + self._size(self._to_come[0]) <= self._max_bytes:
            self._post()
        return tuple(column.to(self._spec.device, non_blocking=True) for column in columns)

    def _size(self, route: Route) -> int:
        return route.share.num_tokens * self._spec.bytes_per_token

    def _post(self, *, making_room: bool = False) -> None:
        """Start receiving the next one."""
        route = self._to_come.popleft()
        while making_room and self._here and self._held + self._size(route) > self._max_bytes:
            self._stage(next(iter(self._here)))
        columns = self._spec.empty(route.share.num_tokens)
        self._here[route] = columns, [dist.irecv(t, route.source, group=self._group) for t in columns]
        self._held += self._size(route)
        self.most_held_bytes = max(self.most_held_bytes, self._held)

    def _stage(self, route: Route) -> None:
        columns, requests = self._here.pop(route)
        for request in requests:
            request.wait()
        self._staged[route] = in_host_memory(columns)
        self._held -= self._size(route)


def rows_of(columns: Columns, share: LossShare) -> Columns:
    """Some rows of the columns; views if they are contiguous."""
    spans = share.spans or ((0, 0),)
    if len(spans) == 1:
        return tuple(t[spans[0][0] : spans[0][1]] for t in columns)
    return tuple(torch.cat([t[first:end] for first, end in spans]) for t in columns)


def joined(parts: Sequence[tuple[LossShare, Columns]]) -> Columns:
    """Join the columns of disjoint shares of one sample, in the order of the tokens."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.tensor([token for share, _ in parts for token in share.tokens]).argsort()
    device = parts[0][1][0].device  # some may wait in host memory
    columns = zip(*(part for _, part in parts), strict=True)
    return tuple(torch.cat([t.to(device) for t in column])[order.to(device)] for column in columns)


def in_host_memory(columns: Columns) -> Columns:
    """Copies in host memory, pinned if the originals are on a GPU."""
    copies = tuple(torch.empty_like(t, device="cpu", pin_memory=t.is_cuda) for t in columns)
    for copy, t in zip(copies, columns, strict=True):
        copy.copy_(t)
    return copies
