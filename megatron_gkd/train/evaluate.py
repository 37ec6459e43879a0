"""Held-out evaluation: how far the student is from the teacher on fixed rows with reference completions.

Means per completion token, over all rows (nats): forward KL(P||Q), reverse KL(Q||P) and symmetric JSD (beta 0.5), all
over the full vocabulary and at temperature 1, whatever the training loss is; the student's negative log-likelihood of
the reference; and how often both models prefer the same token. Only the likelihood is measured with `--objective sft`,
or without a teacher and teacher prompts. The divergences need hidden-state signals; with `--gkd_logits_topk` they are
those on the teacher's top K, with the tail of `--topk_tail`, as in training.

Rows are processed in batches of the training batch size, through the same schedules as training; only the last batch
may be smaller.
"""

from __future__ import annotations

import math

import torch

from megatron_gkd.config.no_effect import describe, without_effect
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.collate import MicroBatch
from megatron_gkd.data.dataset import Rows
from megatron_gkd.errors import TrainingError
from megatron_gkd.loss.divergence import Divergence
from megatron_gkd.loss.vocab_cross_entropy import vocab_parallel_cross_entropy
from megatron_gkd.model.build import HiddenStateGPTModel
from megatron_gkd.model.pipeline import select_loss_tokens
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.observe.metrics import Metrics
from megatron_gkd.teacher.signals import Signal
from megatron_gkd.train.inputs import teaches_nothing
from megatron_gkd.train.objective import DistillationLoss, Outcome
from megatron_gkd.train.plans import evaluation_plans
from megatron_gkd.train.setup import Run, TeacherRun, build, join, with_dtype
from megatron_gkd.train.step import add_reports, forward_step_with, reduce_reports, student_batches, teacher_signals
from megatron_gkd.train.supervised import SupervisedLoss
from megatron_gkd.train.teacher_ranks import serve_evaluation
from megatron_gkd.train.token_record import TokenRecord

logger = get_logger(__name__)

DIVERGENCES = {"forward_kl": Divergence(0.0), "reverse_kl": Divergence(1.0), "jsd": Divergence(0.5)}
_CHUNK_TOKENS = 256  # bounds the logits held at a time


def run_evaluation(config: RunConfig) -> dict[str, float]:
    """`megatron-gkd eval`: print and return the numbers of the current student; none on the teacher's own ranks.
    Collective over all ranks."""
    config = with_dtype(config)
    found = join(config, with_training_data=False)
    if unused := without_effect(config, "eval"):
        logger.info("without effect: %s", describe(unused))
    config = found.config
    run = build(config, with_training_data=False)
    if isinstance(run, TeacherRun):
        serve_evaluation(run)
        run.teacher.close()
        return {}
    assert run.eval_rows is not None, "RunConfig.validate refuses an evaluation without --eval_dataset"
    values, generated = evaluate(run, run.eval_rows), {}
    if run.generation is not None and run.engines is not None:
        try:
            generated = run.generation.measure(0)
        finally:
            run.engines.close()
    run.teacher.close()
    if teaches_nothing(config, run.eval_rows):
        logger.info("no teacher is given, and no row has a teacher_prompt: the likelihood of the text alone")
        values = {name: values[name] for name in ("nll", "num_tokens")}
    values |= generated
    if run.is_writer:
        width = max(map(len, values))
        print("\n".join(f"{name:<{width}}  {value:.6g}" for name, value in values.items()), flush=True)
    if (problem := not_finite(values)) is not None:
        raise TrainingError(f"{problem}: look at the weights of --model and --teacher_model, and at --dtype")
    return values


def not_finite(values: dict[str, float]) -> str | None:
    """Which numbers are not finite, and which model causes it; None: all are finite. The negative log-likelihood is the
    student's alone."""
    names = [name for name, value in values.items() if not math.isfinite(value)]
    if not names:
        return None
    whose = "the student's numbers are not finite" if "nll" in names else "it is the teacher whose numbers are not"
    return f"{', '.join(names)}: not finite, and {whose}"


def evaluate(run: Run, rows: Rows, record: TokenRecord | None = None) -> dict[str, float]:
    """The numbers of the module docstring and `num_tokens`, the same on every rank. Collective over all ranks.

    Args:
        record: receives them by token: of all rows by position, and of the first ones in full.
    """
    objective = HeldOut(run.loss, record)
    metrics = Metrics(objective.names(), run.platform.device)
    for number, plan in enumerate(evaluation_plans(run.config, rows, run.student.layout, run.teacher.layout)):
        if record is not None:
            record.choose([] if number else [sample for sample in plan.samples if sample.num_loss_tokens])
        signals, _ = teacher_signals(run.teacher, plan)
        step = forward_step_with(objective, signals, run.platform.device)
        batches = student_batches(plan, run.student)
        add_reports(metrics, run.student.forward_only(step, batches), run.student)
    reduce_reports(metrics, run.student, run.platform.device)
    return {**metrics.means(), "num_tokens": metrics.counts()["nll"]}


class HeldOut:
    """The objective of evaluation: computes the numbers of the module docstring in chunks of tokens; nothing is
    minimised."""

    def __init__(self, training: DistillationLoss | SupervisedLoss, record: TokenRecord | None = None) -> None:
        """Args:
        training: has the teacher's side, if there is a teacher, and compares the two models.
        record: receives the measured values by token.
        """
        self._training, self._record = training, record

    def names(self) -> tuple[str, ...]:
        return (*DIVERGENCES, "nll", "agreement") if isinstance(self._training, DistillationLoss) else ("nll",)

    @torch.no_grad()
    def __call__(self, model: HiddenStateGPTModel, hidden: torch.Tensor, batch: MicroBatch, signal: Signal) -> Outcome:
        rows = select_loss_tokens(model.head_input(hidden), batch)
        labels = batch.labels.to(rows.device)
        places = torch.tensor([place for share in batch.shares for place in share.tokens], dtype=torch.int64)
        totals = dict.fromkeys(self.names(), torch.zeros((), dtype=torch.float64, device=rows.device))
        for start in range(0, rows.shape[0], _CHUNK_TOKENS):
            chunk = slice(start, start + _CHUNK_TOKENS)
            found = self.measure(model, rows[chunk], labels[chunk], signal[chunk])
            for name, values in found.items():
                totals[name] = totals[name] + values.double().sum()
            if self._record is not None:
                self._record.add(places[chunk], found)
        if self._record is not None:
            self._record.look(self.measure, self._training, model, rows, batch, signal)
        num_tokens = torch.tensor(sum(batch.lengths), dtype=torch.int, device=rows.device)
        report = {name: torch.stack([total, num_tokens.double()]) for name, total in totals.items()}
        return totals["nll"], num_tokens, report

    def measure(
        self, model: HiddenStateGPTModel, rows: torch.Tensor, labels: torch.Tensor, signal: Signal
    ) -> dict[str, torch.Tensor]:
        """Per-token values [C]."""
        training = self._training
        logits = torch.nn.functional.linear(rows, model.head_weight())
        nll = vocab_parallel_cross_entropy(logits, labels, tp_group=training.tp_group, vocab_size=training.vocab_size)
        if isinstance(training, SupervisedLoss):
            return {"nll": nll}
        values, agreement = training.compare(logits, training.teacher_side(signal), DIVERGENCES.values())
        return dict(zip(self.names(), [*values, nll, agreement], strict=True))
