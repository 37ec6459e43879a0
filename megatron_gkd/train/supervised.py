"""The objective of `--objective sft`: the cross entropy of the completions, without a teacher.

    loss_sum = sum_t CE(y_t, Q_t)      over the T loss tokens, in nats

The contract, the division and both paths are those of objective.py: `fused` (default) holds no [T, V/tp] logits.

Communication, over the student's TP group: one all-gather [3, C] a chunk of C tokens (loss/fused/chunks.py; `logits`:
[3, T] once), and the sum of the gradient of the T hidden states in the backward.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch.nn.functional import linear

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.fused_linear_jsd import fused_linear_cross_entropy
from megatron_gkd.loss.vocab_cross_entropy import vocab_parallel_cross_entropy
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.pipeline import select_loss_tokens
from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.signals import Signal
from megatron_gkd.train.objective import Outcome, Report, SampleLosses


class SupervisedLoss:
    """See the module docstring; has the interface of DistillationLoss."""

    def __init__(self, *, fuse: bool, tp_group: torch.distributed.ProcessGroup, vocab_size: int) -> None:
        """Args: fuse: never materialise logits of a micro-batch."""
        self.fuse, self.tp_group, self.vocab_size = fuse, tp_group, vocab_size
        self._sample_losses = SampleLosses()

    def begin(self, plan: StepPlan) -> None:
        """Nothing depends on the step."""

    def sample_losses(self, positions: Iterable[int]) -> dict[int, float]:
        """See DistillationLoss."""
        return self._sample_losses.of(positions)

    def teacher_problem(self, positions: Iterable[int]) -> str | None:
        """None: there is no teacher."""
        return None

    def names(self) -> tuple[str, ...]:
        return "loss", "cross_entropy"

    def __call__(self, model: HiddenStateGPTModel, hidden: torch.Tensor, batch: MicroBatch, signal: Signal) -> Outcome:
        """`signal` is ignored."""
        rows = select_loss_tokens(model.head_input(hidden), batch)
        compute = self._fused if self.fuse else self._from_logits
        loss_sum, per_token = compute(model, rows, batch.labels.to(rows.device))
        self._sample_losses.note(batch, per_token)
        num_tokens = torch.tensor(sum(batch.lengths), dtype=torch.int, device=rows.device)
        pair = torch.stack([loss_sum.detach().double(), num_tokens.double()])
        report: Report = {"loss": pair, "cross_entropy": pair}
        return loss_sum, num_tokens, report

    def _fused(
        self, model: HiddenStateGPTModel, rows: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        losses = fused_linear_cross_entropy(
            rows, model.head_weight(), labels, tp_group=self.tp_group, vocab_size=self.vocab_size,
            reduce_hidden_grad=not model.head_grad_is_reduced,
        )  # fmt: skip
        assert losses.cross_entropy is not None, "labels were given"
        return losses.loss_sum, losses.cross_entropy

    def _from_logits(
        self, model: HiddenStateGPTModel, rows: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not model.head_grad_is_reduced:
            rows = copy_to_tensor_model_parallel_region(rows, group=self.tp_group)
        logits = linear(rows, model.head_weight())
        values = vocab_parallel_cross_entropy(logits, labels, tp_group=self.tp_group, vocab_size=self.vocab_size)
        return values.sum(), values.detach()
