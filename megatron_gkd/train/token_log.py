"""SAVE/tokens.jsonl: what evaluations, and steps that train on sampled completions, see token by token
(token_record.py), with texts. One row each:

    {"step": 20, "of": "evaluation", "by_position": {"first": [0, 1, ...], "end": [...], "num_tokens": [...],
     "forward_kl": [...], ...}, "memory_kind": "cuda", "memory_bytes": [...],
     "texts": {"262": " the", ...},
     "samples": [{"row": 0, "place": "held_out.jsonl:1", "source": "dataset", "num_tokens": 80, "prompt": "...",
                  "ids": [...], "forward_kl": [...], "nll": [...], "teacher_nll": [...], "student_ids": [[...], ...],
                  "student_logprobs": [[...], ...], "teacher_ids": [[...], ...], "teacher_logprobs": [[...], ...]}]}

Evaluations look at the first held-out rows. A step ("of": "step") looks at its first samples of the student, before its
update: step 1, those that an evaluation follows, and the last.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch

from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.errors import GKDError
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.pipeline import select_loss_tokens
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.observe.writers import JsonlWriter
from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.signals import Signal
from megatron_gkd.train.evaluate import HeldOut
from megatron_gkd.train.objective import DistillationLoss, Outcome
from megatron_gkd.train.setup import Run
from megatron_gkd.train.supervised import SupervisedLoss
from megatron_gkd.train.token_record import TokenRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

FILE: Final = "tokens.jsonl"


class TokenLog:
    """The log of a run, on every rank of the student; the writing rank has the file."""

    def __init__(self, run: Run, run_dir: Path, *, first_step: int | None) -> None:
        self._run = run
        self._file = JsonlWriter(run_dir / FILE, first_step=first_step) if run.is_writer else None

    def record(self) -> TokenRecord:
        """A new record."""
        return TokenRecord(HeldOut(self._run.loss).names(), self._run.platform.device)

    def watched(self, step: int, plan: StepPlan) -> WatchedLoss | None:
        """The objective of a step whose samples are recorded; None: they are not. The same on all ranks."""
        run, every = self._run, self._run.config.logging.eval_steps
        mine = [sample for sample in plan.samples if sample.source == "student" and sample.num_loss_tokens]
        if not mine or not (step in (1, run.train_iters) or (every and step % every == 0)):
            return None
        record = self.record()
        record.choose(mine)
        return WatchedLoss(run.loss, record)

    def write(self, step: int, of: str, record: TokenRecord) -> None:
        """Collective over the student's ranks. Args: of: "evaluation" or "step"."""
        run = self._run
        found = record.finish(run.student.groups, memory_bytes=run.platform.peak_memory_bytes())
        if self._file is not None:
            self._add_texts(found, of)
            self._file.append({"step": step, "of": of, "memory_kind": run.platform.kind, **found})

    def close(self) -> None:
        """Release the file."""
        if self._file is not None:
            self._file.close()

    def _add_texts(self, found: dict[str, Any], of: str) -> None:
        samples, rows = found["samples"], self._run.eval_rows
        for sample in samples:
            if of == "evaluation" and rows is not None:
                sample["place"] = rows.place(sample["row"])
        try:
            tokenizer = self._run.tokenizer
        except GKDError as error:
            logger.warning("no texts beside the token ids: %s", error)
            return
        found["texts"] = token_texts(tokenizer, _all_ids(samples))
        for sample in samples:
            sample["prompt"] = tokenizer.decode(sample.pop("prompt_ids"))


class WatchedLoss:
    """A training objective that also records its samples."""

    def __init__(self, loss: DistillationLoss | SupervisedLoss, record: TokenRecord) -> None:
        self._loss, self.record, self._measure = loss, record, HeldOut(loss).measure

    def names(self) -> tuple[str, ...]:
        return self._loss.names()

    def begin(self, plan: StepPlan) -> None:
        self._loss.begin(plan)

    def __call__(self, model: HiddenStateGPTModel, hidden: torch.Tensor, batch: MicroBatch, signal: Signal) -> Outcome:
        outcome = self._loss(model, hidden, batch, signal)
        with torch.no_grad():
            rows = select_loss_tokens(model.head_input(hidden), batch)
            self.record.look(self._measure, self._loss, model, rows, batch, signal)
        return outcome


def _all_ids(samples: Iterable[dict[str, Any]]) -> list[int]:
    found: set[int] = set()
    for sample in samples:
        found.update(sample["ids"])
        for side in ("student_ids", "teacher_ids"):
            found.update(token for row in sample.get(side, ()) for token in row if token >= 0)
    return sorted(found)


def token_texts(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> dict[str, str]:
    """By id, the text that each token adds: decoded behind another token, because tokenizers drop a leading space."""
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    before = len(tokenizer.decode(anchor))
    return {str(token): str(tokenizer.decode([*anchor, token]))[before:] for token in ids}
