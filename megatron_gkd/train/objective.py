"""What is minimised or measured: hidden states of the last stage in, `(loss_sum, num_tokens, report)` out.

An `Objective` sees one micro-batch at a time and divides nothing: megatron-core divides the summed gradient once, by
the number of loss tokens of the global batch. Its report is a dict of `[2]` float64 tensors (sum, count); a value that
a micro-batch does not have has count 0. Training minimises `DistillationLoss`, or without a teacher the cross entropy
alone (supervised.py); evaluation has its own objective (evaluate.py).

    loss_sum = sum_t D(P_t, Q_t)  +  sft_alpha * sum_{t: source != student} CE(y_t, Q_t)      over the T loss tokens,
    in nats

The cross entropy is divided by the same number, so `sft_alpha` weighs a token's cross entropy against a token's
divergence. An empty micro-batch (T = 0) gives 0 with a graph.

Two paths, equal results: `fused` (default) never holds logits of the micro-batch; `logits` does, [T, V/tp] of
student and teacher, and is the one to read first or to debug with.

Communication, over the student's TP group: that of the divergence and of the probe tokens (token_probe.py), and one
sum of the gradient of the T hidden states in the backward (under sequence parallelism the reduce-scatter of
`head_input` does it).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch.nn.functional import linear

from megatron_gkd.config.run import DistillationConfig
from megatron_gkd.config.schedules import read_schedule
from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.fused_linear_jsd import HiddenTeacher, TokenLosses, TopKTeacher, fused_linear_distill
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.vocab_cross_entropy import vocab_parallel_cross_entropy
from megatron_gkd.loss.vocab_topk import vocab_parallel_argmax
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.pipeline import select_loss_tokens
from megatron_gkd.records import SOURCES, StepPlan
from megatron_gkd.teacher.signals import HiddenSignal, NoSignal, Signal, TopKSignal
from megatron_gkd.topk_jsd import topk_divergence, topk_masses
from megatron_gkd.train.token_probe import NAMES, TokenProbe
from megatron_gkd.vocab_parallel_jsd import vocab_parallel_divergence

Report = dict[str, torch.Tensor]
Outcome = tuple[torch.Tensor, torch.Tensor, Report]  # loss_sum, num_tokens, report


class Objective(Protocol):
    """What stands at the end of the student's forward pass."""

    def names(self) -> tuple[str, ...]:
        """Of the report: the same on every rank and for every micro-batch."""

    def __call__(self, model: HiddenStateGPTModel, hidden: torch.Tensor, batch: MicroBatch, signal: Signal) -> Outcome:
        """Of one micro-batch. Args: hidden: [S(/tp), B, H], output of the last stage."""


class TrainingObjective(Objective, Protocol):
    """What is minimised."""

    def begin(self, plan: StepPlan) -> None:
        """Before the micro-batches of a plan: take its values. Not collective."""


class SampleLosses:
    """The loss of each sample, as this rank last computed it. Nothing is synchronised before it is asked for."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[torch.Tensor, int]] = {}

    def note(self, batch: MicroBatch, per_token: torch.Tensor) -> None:
        """Keep the sums over each sample's tokens. Args: per_token: [T]."""
        sums = per_token.new_zeros(len(batch.positions))
        sums.index_add_(0, batch.loss_sample.to(per_token.device), per_token)
        self._sums.update((position, (sums, index)) for index, position in enumerate(batch.positions))

    def of(self, positions: Iterable[int]) -> dict[int, float]:
        """By position in the global batch; without those that were never computed. Waits for the device."""
        found = {position: self._sums[position] for position in positions if position in self._sums}
        return {position: float(sums[index]) for position, (sums, index) in found.items()}


class DistillationLoss:
    """The objective of training: divergence from the teacher's signal, and cross entropy on request."""

    def __init__(
        self,
        distillation: DistillationConfig,
        *,
        tp_group: torch.distributed.ProcessGroup,
        vocab_size: int,
        teacher_head: torch.Tensor | Callable[[], torch.Tensor] | None,
    ) -> None:
        """Keep what is the same for every micro-batch.

        Args:
            vocab_size: tokens that student and teacher share; columns at or above it are padding.
            teacher_head: [V/tp, Ht], sharded like the student's head, or a function that gives the current one; None
                with top-K signals. It must carry no graph.
        """
        self.distillation, self.tp_group, self.vocab_size = distillation, tp_group, vocab_size
        self.divergence = self._divergence(read_schedule("beta", distillation.beta).at(1))
        self._teacher_head = teacher_head
        self._sample_losses = SampleLosses()
        self._probe = TokenProbe(tp_group=tp_group, vocab_size=vocab_size)
        self._signal_is_finite: dict[int, torch.Tensor] = {}

    def begin(self, plan: StepPlan) -> None:
        """See TrainingObjective."""
        if plan.values is not None:
            self.divergence = self._divergence(plan.values.beta)

    def _divergence(self, beta: float) -> Divergence:
        return Divergence(beta, self.distillation.loss_temperature)

    def sample_losses(self, positions: Iterable[int]) -> dict[int, float]:
        """Sum of the loss of each of these samples, by position in the global batch, as this rank last computed it;
        without those that it never did. Waits for the device."""
        return self._sample_losses.of(positions)

    def teacher_problem(self, positions: Iterable[int]) -> str | None:
        """What of the teacher's is not finite, as this rank last met it with these samples; None: nothing. Waits for
        the device."""
        head = self.teacher_head
        if head is not None and not bool(torch.isfinite(head).all()):
            return "its output layer has weights that are not finite"
        known = [self._signal_is_finite[position] for position in positions if position in self._signal_is_finite]
        return None if all(map(bool, known)) else "what it makes of the samples is not finite"

    @property
    def teacher_head(self) -> torch.Tensor | None:
        """[V/tp, Ht], as it is now; None with top-K signals."""
        head = self._teacher_head
        return head if head is None or isinstance(head, torch.Tensor) else head()

    def names(self) -> tuple[str, ...]:
        distillation = self.distillation
        return (
            *("loss", "divergence", "agreement"),
            *(("cross_entropy",) if distillation.sft_alpha else ()),
            *(("teacher_mass", "student_mass") if distillation.gkd_logits_topk else ()),
            *NAMES,
            *(f"source/{source}/{what}" for source in SOURCES for what in ("loss", "agreement", "num_samples")),
        )

    def __call__(self, model: HiddenStateGPTModel, hidden: torch.Tensor, batch: MicroBatch, signal: Signal) -> Outcome:
        rows = select_loss_tokens(model.head_input(hidden), batch)
        sample_source = batch.sample_source.to(rows.device)
        token_source = sample_source[batch.loss_sample.to(rows.device)]
        supervised = (token_source != SOURCES.index("student")).float()
        compute = self._fused if self.distillation.fuse_loss else self._from_logits
        labels, teacher = batch.labels.to(rows.device), self.teacher_side(signal)
        losses = compute(model, rows, labels, teacher, supervised)
        num_tokens = torch.tensor(sum(batch.lengths), dtype=torch.int, device=rows.device)
        per_token = losses.per_token
        if losses.cross_entropy is not None:
            per_token = per_token + self.distillation.sft_alpha * losses.cross_entropy * supervised
        self._sample_losses.note(batch, per_token)
        self._signal_is_finite.update(dict.fromkeys(batch.positions, signal.is_finite()))
        counted = sample_source[: len(sample_source) if batch.counts_samples else 0]
        report = _report(losses, num_tokens, supervised, token_source, counted)
        report |= self._probe(rows, model.head_weight(), labels, teacher, batch)
        return losses.loss_sum, num_tokens, report

    def _fused(
        self,
        model: HiddenStateGPTModel,
        rows: torch.Tensor,
        labels: torch.Tensor,
        teacher: HiddenTeacher | TopKTeacher,
        supervised: torch.Tensor,
    ) -> TokenLosses:
        sft_alpha = self.distillation.sft_alpha
        return fused_linear_distill(
            rows, model.head_weight(), teacher, self.divergence, tp_group=self.tp_group, vocab_size=self.vocab_size,
            labels=labels if sft_alpha else None, label_weights=sft_alpha * supervised if sft_alpha else None,
            reduce_hidden_grad=not model.head_grad_is_reduced, report_agreement=True,
        )  # fmt: skip

    def _from_logits(
        self,
        model: HiddenStateGPTModel,
        rows: torch.Tensor,
        labels: torch.Tensor,
        teacher: HiddenTeacher | TopKTeacher,
        supervised: torch.Tensor,
    ) -> TokenLosses:
        shared: Any = dict(tp_group=self.tp_group, vocab_size=self.vocab_size)
        if not model.head_grad_is_reduced:
            rows = copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        logits = linear(rows, model.head_weight())
        (divergence,), agreement = self.compare(logits, teacher, [self.divergence])
        losses = TokenLosses(divergence.sum(), divergence.detach(), agreement=agreement.float())
        if isinstance(teacher, TopKTeacher):
            losses.teacher_mass, losses.student_mass = topk_masses(logits, teacher.logprobs, teacher.indices, **shared)
        if self.distillation.sft_alpha:
            cross_entropy = vocab_parallel_cross_entropy(logits, labels, **shared)
            losses.loss_sum = losses.loss_sum + self.distillation.sft_alpha * (cross_entropy * supervised).sum()
            losses.cross_entropy = cross_entropy.detach()
        return losses

    def teacher_side(self, signal: Signal) -> HiddenTeacher | TopKTeacher:
        """The signal with what this rank adds to it: the teacher's head, or what becomes of the tail."""
        match signal:
            case HiddenSignal(hidden):
                head = self.teacher_head
                assert head is not None, "hidden signals need the teacher's head on the student's last stage"
                return HiddenTeacher(hidden, head)
            case TopKSignal(logprobs, indices):
                return TopKTeacher(logprobs, indices, self.distillation.topk_tail)
            case NoSignal():
                raise AssertionError("a run without a teacher has another objective")

    def compare(
        self, logits: torch.Tensor, teacher: HiddenTeacher | TopKTeacher, divergences: Iterable[Divergence]
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(each divergence [T], whether both models prefer the same token [T]) of student logits [T, V/tp].

        Communication: that of the most probable tokens and of each divergence, over the TP group.
        """
        shared: Any = dict(tp_group=self.tp_group, vocab_size=self.vocab_size)
        best = vocab_parallel_argmax(logits.detach(), **shared)
        match teacher:
            case HiddenTeacher(hidden, head):
                teacher_logits = linear(hidden, head)
                teacher_best = vocab_parallel_argmax(teacher_logits, **shared)
                values = [vocab_parallel_divergence(logits, teacher_logits, each, **shared) for each in divergences]
            case TopKTeacher(logprobs, indices, tail):
                teacher_best = indices[:, 0]
                values = [topk_divergence(logits, logprobs, indices, each, tail=tail, **shared) for each in divergences]
        return values, best == teacher_best


def _report(
    losses: TokenLosses,
    num_tokens: torch.Tensor,
    supervised: torch.Tensor,
    token_source: torch.Tensor,
    counted: torch.Tensor,
) -> Report:
    """Args: counted: sources of the samples that this rank counts."""
    assert losses.agreement is not None
    pairs = {
        "loss": (losses.loss_sum, num_tokens),
        "divergence": (losses.per_token.sum(), num_tokens),
        "agreement": (losses.agreement.sum(), num_tokens),
    }
    if losses.cross_entropy is not None:
        pairs["cross_entropy"] = (losses.cross_entropy * supervised).sum(), supervised.sum()
    if losses.teacher_mass is not None and losses.student_mass is not None:
        pairs["teacher_mass"] = losses.teacher_mass.sum(), num_tokens
        pairs["student_mass"] = losses.student_mass.sum(), num_tokens
    for index, source in enumerate(SOURCES):
        mine = (token_source == index).float()
        pairs[f"source/{source}/loss"] = (losses.per_token * mine).sum(), mine.sum()
        pairs[f"source/{source}/agreement"] = (losses.agreement * mine).sum(), mine.sum()
        num_samples = (counted == index).sum()
        pairs[f"source/{source}/num_samples"] = num_samples, num_samples
    # float64, so that the counts of a large batch stay exact
    return {name: torch.stack([x.detach().double() for x in pair]) for name, pair in pairs.items()}
