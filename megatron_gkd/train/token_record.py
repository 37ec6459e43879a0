"""Values of both models by token: averaged over all rows by the token's position in its completion, and in full for a
few samples, to look at.

    by_position   mean of every number of the evaluation in each bucket [EDGES[i], EDGES[i + 1]) of positions; 0 is the
                  first token of a completion. Buckets get wider, because completions differ most at the beginning
    samples       the first MOST_TOKENS tokens of at most MOST_SAMPLES samples: id, divergences, negative
                  log-likelihood under both models, and the TOP most probable tokens of each, with their
                  log-probabilities
    memory_bytes  peak of every rank of the student, in rank order: the allocator's on a GPU, else the process's
                  resident memory

Sums are float64 of the same per-token values in every layout, so they agree up to the rounding of those values. Logits
of the samples' tokens are computed a second time, one sample at a time; nothing of size [T, V/tp] is kept.

Communication: `look` over the student's TP group, per sample: that of HeldOut.measure, one all-gather for the top of
each side that is given by logits, and one for the teacher's likelihood. `finish` over all ranks of the student: one
all-reduce [B, 1 + names] float64, one all_gather_object.

Legend: C tokens of a sample, B buckets, k = TOP.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, Protocol

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn.functional import linear

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.fused_linear_jsd import HiddenTeacher, TopKTeacher
from megatron_gkd.loss.vocab_cross_entropy import vocab_parallel_cross_entropy
from megatron_gkd.loss.vocab_topk import vocab_parallel_topk
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.parallel.together import gathered
from megatron_gkd.records import LossShare, Sample
from megatron_gkd.teacher.signals import Signal
from megatron_gkd.train.objective import DistillationLoss
from megatron_gkd.train.supervised import SupervisedLoss

MOST_SAMPLES: Final = 4
MOST_TOKENS: Final = 192
TOP: Final = 5
_STEPS: Final = (1, 1.5)  # of each power of two
EDGES: Final = (0, 1, *sorted({round(2**power * step) for power in range(1, 21) for step in _STEPS}))

Columns = dict[str, torch.Tensor]  # [C] or [C, k] by name


class Measure(Protocol):
    """HeldOut.measure."""

    def __call__(
        self, model: HiddenStateGPTModel, rows: torch.Tensor, labels: torch.Tensor, signal: Signal
    ) -> Columns: ...


class TokenRecord:
    """The record of one evaluation, or of one step, on every rank of the student."""

    def __init__(self, names: Sequence[str], device: torch.device) -> None:
        """Args: names: of a token's numbers."""
        self._names = tuple(names)
        self._edges = torch.tensor(EDGES, device=device)
        self._sums = torch.zeros(len(EDGES), 1 + len(self._names), dtype=torch.float64, device=device)
        self._samples: dict[int, Sample] = {}
        self._wanted: set[int] = set()  # positions in the plan that is at work
        self._seen: dict[int, dict[int, dict[str, Any]]] = {}  # position -> place -> values

    def choose(self, samples: Iterable[Sample]) -> None:
        """Record the first of these samples in full, during the current plan; the same on every rank."""
        chosen = {sample.position: sample for sample in list(samples)[:MOST_SAMPLES]}
        self._samples, self._wanted = self._samples | chosen, set(chosen)

    def add(self, places: torch.Tensor, values: Mapping[str, torch.Tensor]) -> None:
        """Add tokens of the evaluation. Args: places: [C] int64, positions in their completions; values: [C] each."""
        if not len(places):
            return
        places = places.to(self._edges.device)
        columns = [torch.ones_like(places, dtype=torch.float64), *(values[name].double() for name in self._names)]
        self._sums.index_add_(0, torch.bucketize(places, self._edges, right=True) - 1, torch.stack(columns, dim=1))

    @torch.no_grad()
    def look(
        self,
        measure: Measure,
        training: DistillationLoss | SupervisedLoss,
        model: HiddenStateGPTModel,
        rows: torch.Tensor,
        batch: MicroBatch,
        signal: Signal,
    ) -> None:
        """Record the chosen samples of a micro-batch. Args: rows: [T, H], of its loss tokens."""
        labels, start = batch.labels.to(rows.device), 0
        for position, share in zip(batch.positions, batch.shares, strict=True):
            places = [place for place in share.tokens if place < MOST_TOKENS]
            if position in self._wanted and places:
                at = slice(start, start + len(places))
                found = measure(model, rows[at], labels[at], signal[at])
                found |= both_sides(training, linear(rows[at], model.head_weight()), labels[at], signal[at])
                lists = {name: values.tolist() for name, values in found.items()}
                for i, place in enumerate(places):
                    values = {name: column[i] for name, column in lists.items()}
                    self._seen.setdefault(position, {})[place] = values
            start += share.num_tokens

    def finish(self, groups: ProcessGroupCollection, *, memory_bytes: int) -> dict[str, Any]:
        """The results of all ranks, in JSON types, without texts. Collective over the student's ranks.

        Args:
            memory_bytes: peak of this rank.
        """
        counts_here = groups.tp.rank() == 0  # every TP rank computed the same
        sums = self._sums if counts_here else torch.zeros_like(self._sums)
        dist.all_reduce(sums, group=groups.intra_dist_opt)
        parts = gathered((self._seen if counts_here else {}, memory_bytes), groups.intra_dist_opt)
        seen: dict[int, dict[int, dict[str, Any]]] = {}
        for part, _ in parts:  # context-parallel ranks have parts of one sample
            for position, tokens in part.items():
                seen.setdefault(position, {}).update(tokens)
        found: dict[str, Any] = {"memory_bytes": [memory for _, memory in parts]}
        if float(sums[:, 0].sum()):
            found["by_position"] = self._by_position(sums)
        found["samples"] = [_describe(self._samples[position], seen[position]) for position in sorted(seen)]
        return found

    def _by_position(self, sums: torch.Tensor) -> dict[str, list[Any]]:
        ends = [end for _, end in pairwise((*EDGES, 2 * EDGES[-1]))]
        rows = [(first, end, *row) for first, end, row in zip(EDGES, ends, sums.tolist(), strict=True) if row[0]]
        table: dict[str, list[Any]] = {
            "first": [row[0] for row in rows],
            "end": [row[1] for row in rows],
            "num_tokens": [round(row[2]) for row in rows],
        }
        for column, name in enumerate(self._names, start=3):
            table[name] = [_finite(row[column] / row[2]) for row in rows]
        return table


def both_sides(
    training: DistillationLoss | SupervisedLoss, logits: torch.Tensor, labels: torch.Tensor, signal: Signal
) -> Columns:
    """The most probable tokens of both models, and the teacher's likelihood of the labels; NaN if not known.

    Args:
        logits: the student's, [C, V/tp].
    """
    shared: Any = dict(tp_group=training.tp_group, vocab_size=training.vocab_size)
    k = min(TOP, training.vocab_size)

    def top(logits: torch.Tensor, side: str) -> Columns:
        values, ids, lse = vocab_parallel_topk(logits, k, **shared)
        return {f"{side}_ids": ids, f"{side}_logprobs": values.float() - lse.float()[:, None]}

    found = top(logits, "student")
    if isinstance(training, SupervisedLoss):
        return found
    match training.teacher_side(signal):
        case HiddenTeacher(hidden, head):
            teacher_logits = linear(hidden, head)
            found |= top(teacher_logits, "teacher")
            found["teacher_nll"] = vocab_parallel_cross_entropy(teacher_logits, labels, **shared)
        case TopKTeacher(logprobs, indices, _):
            known = indices == labels[:, None]
            of_label = logprobs.masked_fill(~known, 0.0).sum(1)
            found |= {"teacher_ids": indices[:, :k], "teacher_logprobs": logprobs[:, :k].float()}
            found["teacher_nll"] = torch.where(known.any(1), -of_label, torch.nan)
    return found


def _describe(sample: Sample, tokens: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """A sample, with one list for each of its tokens' values."""
    places = sorted(tokens)
    wanted = [place for place in LossShare.of(sample).tokens if place < MOST_TOKENS]
    assert places == wanted, "together the ranks hold all loss tokens of a sample"
    record: dict[str, Any] = {
        "row": sample.row,
        "source": sample.source,
        "policy_version": sample.policy_version,
        "num_tokens": sample.num_loss_tokens,
        "prompt_ids": list(sample.prompt_ids),
        "ids": [sample.completion_ids[place] for place in places],
    }
    for name in tokens[places[0]]:
        record[name] = [_short(tokens[place][name]) for place in places]
    return record


def _short(value: Any) -> Any:
    """Five digits are enough to look at; an absent token of a top-K teacher has a negative id."""
    if isinstance(value, list):
        return [_short(item) for item in value]
    return value if isinstance(value, int) else _finite(float(f"{value:.5g}"))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
