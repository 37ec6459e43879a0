"""Compares both models on every sixteenth completion token: entropies, most probable tokens, and the sampler's
log-probabilities against the trainer's. Reported with the loss; checked in health.py.

The token of index t in the completion of the sample at position p of the global batch is a PROBE TOKEN where
(t + p) % 16 == 0. So the probe tokens are the same in every layout and micro-batch size, and include every index of a
completion. Their logits are computed a second time, in small chunks. That costs a sixteenth of a forward pass of the
heads and nothing of size [T, V/tp], instead of more passes over all logits of the loss.

    health/student_entropy, health/teacher_entropy   nats; for a top-K teacher over its K tokens and the rest as one
    health/top_overlap                               share of the teacher's 8 most probable that are the student's
    health/teacher_top_mass, health/student_top_mass probability of the teacher's 8
    health/teacher_best                              log-probability of the teacher's most probable token
    health/logprob_difference                        |trainer's - sampler's| log-probability of a sampled token
    health/mark, health/mark_squared                 id + log-probability of the teacher's most probable token: if their
                                                     variance is 0, the teacher's output is the same everywhere

Communication, over the student's TP group, per 64 probe tokens: one all-gather for the top 8 of each side that is given
by logits, one all-reduce [C, 10], and with a teacher given by hidden states one more [C]. None without probe tokens.

Legend: T loss tokens, C probe tokens of a chunk, v = V/tp columns of this rank, k = 8 (or less, for a small K).
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch.nn.functional import linear

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.fused_linear_jsd import HiddenTeacher, TopKTeacher
from megatron_gkd.loss.outcomes import OwnedIds
from megatron_gkd.loss.sharded_softmax import LOWEST
from megatron_gkd.loss.vocab_topk import vocab_parallel_topk
from megatron_gkd.parallel.collectives import all_reduce_sum_
from megatron_gkd.parallel.vocab import VocabShard, vocab_shard

PROBE_EVERY: Final = 16
TOP: Final = 8
_CHUNK_TOKENS: Final = 64
MARKS: Final = ("health/mark", "health/mark_squared")  # of use only together, and to nobody else
NAMES: Final = (
    *("health/student_entropy", "health/teacher_entropy", "health/top_overlap"),
    *("health/teacher_top_mass", "health/student_top_mass", "health/teacher_best", "health/logprob_difference"),
    *MARKS,
)


def probe_index(batch: MicroBatch) -> torch.Tensor:
    """The indices of the probe tokens among the micro-batch's loss tokens, [P] int64, ascending."""
    chosen, start = list[int](), 0
    for position, share in zip(batch.positions, batch.shares, strict=True):
        for first, end in share.spans:
            chosen += range(start + (-(first + position)) % PROBE_EVERY, start + end - first, PROBE_EVERY)
            start += end - first
    return torch.tensor(chosen, dtype=torch.int64)


class _Side(NamedTuple):
    """One model's output for C tokens."""

    logprobs: torch.Tensor  # [C, k] of its most probable tokens, descending
    ids: torch.Tensor  # [C, k] global; negative: absent
    entropy: torch.Tensor  # [C]


class TokenProbe:
    """`probe(rows, head, labels, teacher, batch)` -> the names of the module docstring, as (sum, count)."""

    def __init__(self, *, tp_group: torch.distributed.ProcessGroup, vocab_size: int) -> None:
        self._group, self._vocab_size = tp_group, vocab_size

    @torch.no_grad()
    def __call__(
        self,
        rows: torch.Tensor,
        head: torch.Tensor,
        labels: torch.Tensor,
        teacher: HiddenTeacher | TopKTeacher,
        batch: MicroBatch,
    ) -> dict[str, torch.Tensor]:
        """Args: rows: [T, H]; head: [v, H]; labels: [T]."""
        totals = {name: torch.zeros(2, dtype=torch.float64, device=rows.device) for name in NAMES}
        sampled = batch.logprobs
        for part in probe_index(batch).split(_CHUNK_TOKENS):
            at = part.to(rows.device)
            told = None if sampled is None else sampled[part].to(rows.device)
            match teacher:
                case HiddenTeacher(hidden, teacher_head):
                    side: HiddenTeacher | TopKTeacher = HiddenTeacher(hidden[at], teacher_head)
                case TopKTeacher(logprobs, indices, tail):
                    side = TopKTeacher(logprobs[at], indices[at], tail)
            for name, values in self._measure(linear(rows[at], head), labels[at], side, told).items():
                known = (
                    torch.isfinite(values) if name == "health/logprob_difference" else torch.ones_like(values).bool()
                )
                totals[name] += torch.stack([values.masked_fill(~known, 0.0).sum(), known.sum()])
        return totals

    def _measure(
        self,
        logits_Cv: torch.Tensor,
        labels_C: torch.Tensor,
        teacher: HiddenTeacher | TopKTeacher,
        sampled_C: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """Per token, [C] float64; NaN: not known."""
        shard = self._shard(logits_Cv)
        valid_Cv = logits_Cv[:, : shard.num_valid].float()
        theirs = self._teacher(teacher)
        k = theirs.ids.shape[1]
        _, student_ids, lse_C = vocab_parallel_topk(logits_Cv, k, **self._shared)
        here = [_expected_logit(valid_Cv, lse_C), OwnedIds.of(labels_C, shard).gather(valid_Cv, torch.float32)[:, None]]
        here.append(OwnedIds.of(theirs.ids, shard).gather(valid_Cv, torch.float32))
        all_Cn = all_reduce_sum_(torch.cat(here, dim=1), self._group)
        lse_C = lse_C.float()
        absent_Ck = theirs.ids < 0
        at_theirs_Ck = (all_Cn[:, 2:] - lse_C[:, None]).exp().masked_fill(absent_Ck, 0.0)
        shared_Ck = (student_ids[:, :, None] == theirs.ids[:, None, :]).any(1)
        mark_C = theirs.ids[:, 0].double() + theirs.logprobs[:, 0].double()
        unknown_C = torch.full_like(lse_C, torch.nan)
        found = {
            "health/student_entropy": lse_C - all_Cn[:, 0],
            "health/teacher_entropy": theirs.entropy,
            "health/top_overlap": shared_Ck.float().mean(1),
            "health/teacher_top_mass": theirs.logprobs.exp().masked_fill(absent_Ck, 0.0).sum(1),
            "health/student_top_mass": at_theirs_Ck.sum(1),
            "health/teacher_best": theirs.logprobs[:, 0],
            "health/logprob_difference": unknown_C if sampled_C is None else (all_Cn[:, 1] - lse_C - sampled_C).abs(),
            "health/mark": mark_C,
            "health/mark_squared": mark_C * mark_C,
        }
        return {name: values.double() for name, values in found.items()}

    def _teacher(self, teacher: HiddenTeacher | TopKTeacher) -> _Side:
        match teacher:
            case HiddenTeacher(hidden, head):
                logits_Cv = linear(hidden, head)
                values_Ck, ids_Ck, lse_C = vocab_parallel_topk(logits_Cv, min(TOP, self._vocab_size), **self._shared)
                lse_C = lse_C.float()
                valid_Cv = logits_Cv[:, : self._shard(logits_Cv).num_valid].float()
                mean_C = all_reduce_sum_(_expected_logit(valid_Cv, lse_C), self._group)[:, 0]
                return _Side(values_Ck.float() - lse_C[:, None], ids_Ck, lse_C - mean_C)
            case TopKTeacher(logprobs, indices, _):
                p_CK = logprobs.exp().masked_fill(indices < 0, 0.0)
                rest_C = (1.0 - p_CK.sum(1)).clamp(min=0.0)
                entropy_C = -torch.xlogy(p_CK, p_CK).sum(1) - torch.xlogy(rest_C, rest_C)
                return _Side(logprobs[:, :TOP], indices[:, :TOP], entropy_C)

    @property
    def _shared(self) -> dict[str, Any]:
        return dict(tp_group=self._group, vocab_size=self._vocab_size)

    def _shard(self, logits_Cv: torch.Tensor) -> VocabShard:
        group = self._group
        return vocab_shard(logits_Cv.shape[1], rank=group.rank(), tp_size=group.size(), vocab_size=self._vocab_size)


def _expected_logit(valid_Cv: torch.Tensor, lse_C: torch.Tensor) -> torch.Tensor:
    """This rank's part of sum_v P_v z_v, [C, 1]."""
    z_Cv = valid_Cv.clamp(min=LOWEST)
    return ((z_Cv - lse_C.float()[:, None]).exp() * z_Cv).sum(1, keepdim=True)
