"""A teacher server in place of a local teacher: the same signals (teacher_pipeline.py), requested over HTTP.

In each of the student's data-parallel replicas the first rank of the last stage, the DRIVER, requests all samples of
that replica at once. It sends the [T, K] log-probabilities (float32) and ids (int32) to the other ranks of the last
stage, to each those of the loss tokens that it holds. No other rank gets them:

    S1  every last-stage rank receives each loss token that it trains on exactly once, no other rank does;
    S2  every sample is requested exactly once, by its driver;
    S3  either all ranks return signals or all raise: no rank trains on a step that failed in part.

The plan's split for the teacher is the student's, because a server has no layout. With several teachers each sample
goes to the one of its tag (teacher/servers/servers.py).

Overlap: `prefetch(plan)` requests a later step's samples and returns at once; the connections' threads carry the
requests while this step trains. It makes no collective and never raises. An error is raised on all ranks when `signals`
of that step is called (S3), after the same checks. One plan is prefetched at a time; `signals` of other samples (an
evaluation) in between does not affect it.

Communication, per step: one all_gather_object of outcomes (a line of text or None), then `exchange`. Bytes on the wire:
sum over samples of T * 8 K * (tensor parallel size - 1), and under context parallelism those of the tokens that the
driver does not hold once more. The last stage holds the step's signals; a driver also holds its own share, [T, K], of
those prefetched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.errors import ConfigError, RolloutError
from megatron_gkd.model.sequences import Shares, student_shares
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.together import all_or_none
from megatron_gkd.platform import new_group
from megatron_gkd.records import LossShare, MicroBatchPlan, Sample, StepPlan
from megatron_gkd.teacher.servers.probes import ServerRequirements
from megatron_gkd.teacher.servers.servers import PendingAnswers, Seen, TeacherServers
from megatron_gkd.teacher.servers.wire import TopK
from megatron_gkd.teacher.signals import (
    Columns,
    Route,
    SignalStore,
    TopKSpec,
    destinations,
    exchange,
    replicas,
    rows_of,
)


def server_routes(plan: MicroBatchPlan, student: Layout, shares: Shares) -> list[Route]:
    """From each replica's driver, which has all loss tokens of its samples, to the ranks of its last stage; in order of
    sample and destination (S1, S2). Pure."""
    routes = []
    for position, dp in sorted(replicas(plan).items()):
        held = LossShare(tuple(sorted(span for share in shares[position] for span in share.spans)))
        driver = student.last_stage_ranks(dp)[0]
        for share, _, destination in destinations(student, dp, shares[position]):
            routes.append(Route(position, driver, destination, share, held))
    return routes


class _Ahead(NamedTuple):
    """Samples that were requested before their step, with the pending answers or an error."""

    samples: list[Sample]
    asked: PendingAnswers | Exception


class ServerTeacher:
    """`signals(plan, ...)`, with the interface of TeacherPipeline, and `prefetch`."""

    def __init__(
        self,
        urls: Sequence[str],
        needs: ServerRequirements,
        student_layout: Layout,
        *,
        device: torch.device,
        timeout_s: float,
        tags: Mapping[str, tuple[str, ...]] | None = None,
        images: ImageTokens | None = None,
    ) -> None:
        """Connect and probe. Collective over all ranks; an error on one rank is raised on all.

        Args:
            images: how the teacher sees images, which is how the student does; None: rows have none.
            timeout_s: for a step's requests; less than the timeout of collectives, in which the other ranks wait.
            tags: URL -> the tags that it serves; None (or none at all): all are servers of one teacher.
        """
        if needs.topk > needs.vocab_size:
            raise ConfigError(
                f"gkd_logits_topk {needs.topk} is outside 1..{needs.vocab_size}, the size of the vocabulary"
            )
        self.layout = student_layout
        self.spec = TopKSpec(needs.topk, device)
        self.signal_group = new_group(range(dist.get_world_size()))
        drivers = [student_layout.last_stage_ranks(dp)[0] for dp in range(student_layout.data)]
        rank = dist.get_rank()
        self._replica = drivers.index(rank) if rank in drivers else None
        self._images = images
        self._servers: TeacherServers | None = None
        self._ahead: _Ahead | None = None
        self._together(lambda: self._connect(urls, needs, timeout_s, tags))

    @torch.no_grad()
    def signals(self, plan: StepPlan, micro_batches: Callable[[Sequence[int]], MicroBatch]) -> tuple[SignalStore, int]:
        """The step's signals, and the bytes that this rank sent to other ranks. Collective over all ranks.

        Args:
            micro_batches: not used: a server is sent sequences, not batches.
        """
        local: dict[int, Columns] = {}
        self._together(lambda: local.update(self._ask(plan)))
        routes = server_routes(plan.student, self.layout, student_shares(plan, self.layout))
        return exchange(self.spec, routes, local, self.signal_group)

    def prefetch(self, plan: StepPlan) -> None:
        """Request the samples of a later step now (see the module docstring). Not collective; never raises."""
        if self._ahead is not None and isinstance(self._ahead.asked, PendingAnswers):
            self._ahead.asked.cancel()
        samples = self._mine(plan)
        try:
            self._ahead = _Ahead(samples, self._start(samples))
        except Exception as error:  # alone, this rank would leave the others waiting
            self._ahead = _Ahead(samples, error)

    def canaries(self) -> tuple[tuple[int, ...], dict[str, TopK]] | None:
        """(probe, tags of a teacher -> its first server's answer to the probe); None on a rank that is not a driver.
        Not collective."""
        return None if self._servers is None else (self._servers.needs.probe, self._servers.canaries())

    def close(self) -> None:
        """Close the connections. Idempotent, not collective."""
        if self._servers is not None:
            self._servers.close()

    def _connect(
        self,
        urls: Sequence[str],
        needs: ServerRequirements,
        timeout_s: float,
        tags: Mapping[str, tuple[str, ...]] | None,
    ) -> None:
        if self._replica is not None:
            self._servers = TeacherServers(urls, needs, timeout_s=timeout_s, first=self._replica, tags=tags)
            if self._images is not None:
                self._servers.check_images(self._images)

    def _mine(self, plan: StepPlan) -> list[Sample]:
        """The samples that this rank requests."""
        if self._replica is None:
            return []
        return [plan.samples[position] for batch in plan.student[self._replica] for position in batch]

    def _start(self, samples: Sequence[Sample]) -> PendingAnswers:
        assert self._servers is not None, "only drivers ask"
        theirs = [sample.for_teacher for sample in samples]
        sequences = [(sample.prompt_ids, sample.completion_ids) for sample in theirs]
        seen = [self._seen(sample) for sample in theirs]
        return self._servers.start(sequences, [sample.tag for sample in samples], seen)

    def _seen(self, sample: Sample) -> Seen | None:
        if self._images is None or not sample.pictures:
            return None
        return Seen(self._images.bare(sample.prompt_ids, sample.pictures), sample.pictures)

    def _ask(self, plan: StepPlan) -> dict[int, Columns]:
        samples = self._mine(plan)
        if not samples:
            return {}
        if self._ahead is not None and self._ahead.samples == samples:
            (_, asked), self._ahead = self._ahead, None
            if isinstance(asked, Exception):
                raise asked
        else:
            asked = self._start(samples)
        found: dict[int, Columns] = {}
        for sample, topk in zip(samples, asked.result(), strict=True):  # [C, K] each
            columns = tuple(torch.from_numpy(values).to(self.spec.device) for values in topk)
            found[sample.position] = rows_of(columns, LossShare.of(sample))
        return found

    def _together(self, work: Callable[[], None]) -> None:
        """Run this rank's part; raise on every rank if it failed on one (S3). Communication: 1 all_gather_object."""
        try:
            all_or_none(work, self.signal_group, elsewhere=RolloutError)
        except Exception:
            self.close()
            raise
