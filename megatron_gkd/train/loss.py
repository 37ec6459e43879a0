"""The loss contract: hidden states of the last stage in, `(loss_sum, num_tokens, report)` out.

    loss_sum = sum_t D(P_t, Q_t)  +  sft_alpha * sum_{t: source != student} CE(y_t, Q_t)        over the micro-batch's T loss tokens, in nats

Nothing is divided here: megatron-core divides the summed gradient once, by the number of loss tokens of the global batch. The cross entropy
is divided by the same number, so `sft_alpha` weighs a token's cross entropy against a token's divergence.

The report is a dict of `[2]` tensors (sum, count), with the same names on every rank and for every micro-batch (`report_names`); what a
micro-batch has none of counts 0. An empty micro-batch (T = 0) runs the same collectives and gives 0 with a graph.

Communication: that of the divergence over the student's TP group, and the backward of `head_input`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn.functional import linear

from megatron_gkd.config import DistillationConfig
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.pipeline import select_loss_tokens
from megatron_gkd.records import SOURCES, MicroBatch, Source
from megatron_gkd.teacher_pipeline import Signal
from megatron_gkd.topk_jsd import topk_jsd, topk_masses
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_argmax, vocab_parallel_jsd
from megatron_gkd.vocab_parallel_ce import vocab_parallel_cross_entropy

Report = dict[str, torch.Tensor]


class DistillationLoss:
    """Divergence of a micro-batch between the teacher's signal and the student's distribution."""

    def __init__(
        self,
        settings: DistillationConfig,
        *,
        tp_group: torch.distributed.ProcessGroup,
        vocab_size: int,
        teacher_head: torch.Tensor | None,
    ) -> None:
        """Args:
        vocab_size: tokens that student and teacher share; columns at or above it are padding.
        teacher_head: [V/tp, Ht], sharded like the student's head; None with top-K signals.
        """
        self.settings, self.tp_group, self.vocab_size, self.teacher_head = settings, tp_group, vocab_size, teacher_head

    def report_names(self) -> list[str]:
        """Names of the report, the same on every rank."""
        names = ["loss", "divergence", "agreement"]
        if self.settings.sft_alpha:
            names.append("cross_entropy")
        if self.settings.gkd_logits_topk:
            names += ["teacher_mass", "student_mass"]
        return names + [f"source/{source}/{what}" for source in SOURCES for what in ("divergence", "agreement", "num_samples")]

    def __call__(
        self, model: HiddenStateGPTModel, hidden: torch.Tensor, batch: MicroBatch, signal: Signal, sources: Mapping[int, Source]
    ) -> tuple[torch.Tensor, torch.Tensor, Report]:
        """Args:
        hidden: [S(/tp), B, H], output of the last stage.
        sources: source of each sample, by position in the global batch.
        """
        student = select_loss_tokens(model.head_input(hidden), batch)
        logits = linear(student, model.head_weight())
        per_token, agreement, report = self._divergence(logits, signal)
        device = logits.device
        of_sample = torch.tensor([SOURCES.index(sources[p]) for p in batch.positions], dtype=torch.int64, device=device)
        token_source = of_sample[batch.loss_sample.to(device)]
        loss_sum = per_token.sum()
        num_tokens = torch.tensor(per_token.shape[0], dtype=torch.int, device=device)
        if self.settings.sft_alpha:
            cross_entropy = vocab_parallel_cross_entropy(
                logits, batch.labels.to(device), tp_group=self.tp_group, vocab_size=self.vocab_size
            )
            supervised = (token_source != SOURCES.index("student")).to(cross_entropy.dtype)
            cross_entropy_sum = (cross_entropy * supervised).sum()
            loss_sum = loss_sum + self.settings.sft_alpha * cross_entropy_sum
            report["cross_entropy"] = _pair(cross_entropy_sum, supervised.sum())
        report["loss"] = _pair(loss_sum, num_tokens)
        report["divergence"] = _pair(per_token.sum(), num_tokens)
        report["agreement"] = _pair(agreement.sum(), num_tokens)
        for index, source in enumerate(SOURCES):
            mine = token_source == index
            report[f"source/{source}/divergence"] = _pair(per_token[mine].sum(), mine.sum())
            report[f"source/{source}/agreement"] = _pair(agreement[mine].sum(), mine.sum())
            report[f"source/{source}/num_samples"] = _pair((of_sample == index).sum(), torch.ones((), device=device))
        return loss_sum, num_tokens, report

    def _divergence(self, logits: torch.Tensor, signal: Signal) -> tuple[torch.Tensor, torch.Tensor, Report]:
        """Per-token divergence [T], top-1 agreement [T] (0 or 1, detached), and the masses of a top-K signal."""
        settings = self.settings
        common = dict(beta=settings.beta, tp_group=self.tp_group, temperature=settings.loss_temperature, vocab_size=self.vocab_size)
        best = vocab_parallel_argmax(logits.detach(), tp_group=self.tp_group, vocab_size=self.vocab_size)
        if signal.hidden is not None:
            assert self.teacher_head is not None, "hidden-state signals need the teacher's head on the student's last stage"
            teacher_logits = linear(signal.hidden, self.teacher_head)
            per_token = vocab_parallel_jsd(logits, teacher_logits, **common)
            teacher_best = vocab_parallel_argmax(teacher_logits, tp_group=self.tp_group, vocab_size=self.vocab_size)
            return per_token, (best == teacher_best).float(), {}
        logprobs, indices = signal.topk_logprobs, signal.topk_indices
        assert logprobs is not None and indices is not None
        per_token = topk_jsd(logits, logprobs, indices, tail=settings.topk_tail, **common)
        teacher_mass, student_mass = topk_masses(logits, logprobs, indices, tp_group=self.tp_group, vocab_size=self.vocab_size)
        count = torch.tensor(float(per_token.shape[0]), device=logits.device)
        report = {"teacher_mass": _pair(teacher_mass.sum(), count), "student_mass": _pair(student_mass.sum(), count)}
        return per_token, (best == indices[:, 0]).float(), report


def _pair(total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """(sum, count) as float64, detached; float64 so that counts of a large batch stay exact."""
    return torch.stack([total.detach().double(), count.detach().double()])
