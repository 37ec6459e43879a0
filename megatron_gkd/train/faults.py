"""Handles numbers that are not finite, jumps of the loss and lost ranks (docs/faults.md).

A bad step is one whose loss or gradient norm is not finite. It makes no update (student.py). It is counted here, its
samples are written to SAVE/bad_steps/step_00000010.json, and after `--max_bad_steps` of them in a row the run ends. The
run also ends with an error if its last step is bad, if no step made an update, or if a weight is not finite at the end.
Such a run's student is not exported.

    {"step": 10, "problem": "the loss is not finite", "loss": "nan", "grad_norm": "nan", "num_samples": 64,
     "left_out": 0,
     "samples": [{"position": 3, "row": 1745, "source": "dataset", "policy_version": null, "loss_sum": "nan",
                  "prompt_ids": [...], "completion_ids": [...], "prompt": "...", "completion": "..."}]}

The samples are those whose own loss is not finite, or all of them if every loss is finite (the gradient overflowed): at
most MOST_SAMPLES, largest loss per token first. Numbers that JSON cannot represent are strings.

Both counts of bad steps, in all and in a row, are in the checkpoint. The median of the losses starts anew on a resume.
"""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
import torch.distributed as dist

from megatron_gkd.config.servers import LocalTeacher, NoTeacher, SelfTeaching, ServerTeachers
from megatron_gkd.errors import GKDError, TrainingError
from megatron_gkd.model.quantised import real_value
from megatron_gkd.observe.advice import go_on
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import gathered
from megatron_gkd.records import Sample, StepPlan
from megatron_gkd.train.checkpoint import TrainerState
from megatron_gkd.train.setup import Run
from megatron_gkd.train.student import StepResult

logger = get_logger(__name__)

MOST_FILES: Final = 100
MOST_SAMPLES: Final = 64
_WINDOW, _FEWEST = 32, 8  # losses of the running median: at most, and before anything is compared


class BadSteps:
    """Counts bad steps and records their samples."""

    def __init__(self, run: Run, run_dir: Path, state: TrainerState) -> None:
        """`state`: where the run starts or continues."""
        self._run, self._directory = run, run_dir / "bad_steps"
        self.in_a_row = state.bad_steps_in_a_row
        self._has_updated = state.step > 0

    def after_step(self, step: int, plan: StepPlan, result: StepResult, loss: float) -> bool:
        """Whether the step was bad. Raises TrainingError on all of the student's ranks after too many bad steps, and
        where a run would end without an update or with a bad step.

        Communication: none after a good step; after a bad one two all-gathers over the student: of the samples' losses,
        and of the teacher's problem.
        """
        is_last = step >= self._run.student.train_iters
        self._has_updated |= not result.skipped
        if result.problem is None:
            self.in_a_row = 0
            if is_last and not self._has_updated:
                raise TrainingError(
                    f"none of the {step} steps made an update: every gradient overflowed in fp16, and nothing was "
                    "learnt; train in bf16 (--dtype bf16), or give more steps"
                )
            return False
        self.in_a_row += 1
        most, problem = self._run.config.training.max_bad_steps, result.problem
        sample_losses, of_teacher = self._sample_losses(plan), self._teacher_problem(plan)
        if self._run.is_writer:
            path = self._write(step, plan, result, loss, sample_losses)
            where = f"its samples are in {path}" if path else "its samples were not written"
            count = f"{self.in_a_row} in a row, --max_bad_steps {most}"
            logger.warning("step %d: %s, no update was made (%s); %s", step, problem, count, where)
            if of_teacher is not None:
                logger.warning("step %d: %s", step, of_teacher)
        if self.in_a_row >= most or is_last:
            last = ", and the last of the run, which cannot end with it" if is_last else ""
            advice = of_teacher or "lower --lr or --clip_grad, or correct the data"
            raise TrainingError(
                f"step {step}: {problem}, the {self.in_a_row}. such step in a row (--max_bad_steps {most}){last}. None "
                f"of them changed a weight. Look at the samples in {self._directory}; {advice}, and "
                f"{go_on(self._directory.parent)}"
            )
        return True

    def _teacher_problem(self, plan: StepPlan) -> str | None:
        """The teacher's problem, if its numbers are the cause, on all of the student's ranks; None: they are not, or it
        is not known."""
        groups, config = self._run.student.groups, self._run.config
        mine = self._run.loss.teacher_problem(p for batch in plan.student[groups.dp.rank()] for p in batch)
        everyone = gathered(mine, groups.intra_dist_opt)
        found = next((problem for problem in everyone if problem is not None), None)
        match config.teacher.kind:
            case ServerTeachers() as kind:
                flag = f"--teacher_model_server {', '.join(kind.urls)}"
            case LocalTeacher(path):
                flag = f"--teacher_model {path}"
            case SelfTeaching() | NoTeacher():
                return None
        if found is None:
            return None
        return f"it is the teacher, {flag}, and not the student: {found}; give a teacher whose numbers are finite"

    def _sample_losses(self, plan: StepPlan) -> dict[int, float]:
        """Loss of every sample of the step, on all of the student's ranks. One TP rank of the last stage provides
        it."""
        groups, mine = self._run.student.groups, dict[int, float]()
        if groups.tp.rank() == 0:
            mine = self._run.loss.sample_losses(p for batch in plan.student[groups.dp.rank()] for p in batch)
        parts = gathered(mine, groups.intra_dist_opt)
        losses: dict[int, float] = {}
        for position, loss in (item for part in parts for item in part.items()):
            losses[position] = losses.get(position, 0.0) + loss  # context-parallel ranks each have a part of it
        return losses

    def _write(
        self, step: int, plan: StepPlan, result: StepResult, loss: float, sample_losses: dict[int, float]
    ) -> Path | None:
        """The file; None if there are enough files or it cannot be written, which does not end the run."""
        path = self._directory / f"step_{step:08d}.json"
        try:
            self._directory.mkdir(exist_ok=True)
            if sum(1 for _ in self._directory.glob("step_*.json")) >= MOST_FILES and not path.exists():
                return None
            record = describe_bad_step(step, plan.samples, result, loss, sample_losses)
            self._add_texts(record["samples"])
            path.write_text(json.dumps(record, indent=1, allow_nan=False))
        except OSError as error:
            logger.warning("%s cannot be written: %s", path, error)
            return None
        return path

    def _add_texts(self, samples: list[dict[str, Any]]) -> None:
        try:
            tokenizer = self._run.tokenizer
        except GKDError as error:
            logger.warning("no texts beside the token ids: %s", error)
            return
        for sample in samples:
            for name in ("prompt", "completion"):
                sample[name] = tokenizer.decode(sample[f"{name}_ids"])


def describe_bad_step(
    step: int, samples: tuple[Sample, ...], result: StepResult, loss: float, sample_losses: dict[int, float]
) -> dict[str, Any]:
    """The record of the module docstring, without texts."""
    suspects = [s for s in samples if not math.isfinite(sample_losses.get(s.position, 0.0))] or list(samples)

    def badness(sample: Sample) -> float:
        per_token = sample_losses.get(sample.position, 0.0) / max(sample.num_loss_tokens, 1)
        return math.inf if math.isnan(per_token) else per_token

    suspects.sort(key=badness, reverse=True)
    return {
        "step": step,
        "problem": result.problem,
        "loss": _number(loss),
        "grad_norm": _number(result.grad_norm),
        "num_samples": len(samples),
        "left_out": max(0, len(suspects) - MOST_SAMPLES),
        "samples": [
            {
                "position": sample.position,
                "row": sample.row,
                "source": sample.source,
                "policy_version": sample.policy_version,
                "loss_sum": _number(sample_losses.get(sample.position)),
                "prompt_ids": list(sample.prompt_ids),
                "completion_ids": list(sample.completion_ids),
            }
            for sample in suspects[:MOST_SAMPLES]
        ],
    }


def _number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


class LossSpikes:
    """Compares a loss with the median of the last ones, for a warning."""

    def __init__(self, factor: float | None) -> None:
        self._factor = factor
        self._losses: deque[float] = deque(maxlen=_WINDOW)

    def ratio(self, loss: float) -> float | None:
        """Loss over median if it is above the factor, else None. Adds the loss to the window."""
        if self._factor is None or not math.isfinite(loss):
            return None
        usual = median(self._losses) if len(self._losses) >= _FEWEST else math.inf
        self._losses.append(loss)
        return loss / usual if usual > 0 and loss > self._factor * usual else None


def check_finite_weights(run: Run, run_dir: Path) -> None:
    """Before an export: raise TrainingError on the student's ranks if a weight is not finite; it names the first.

    Communication: an all-gather of one name over the student.
    """
    mine = next(
        (
            name
            for chunk in run.student.models
            for name, weight in chunk.named_parameters()
            if not bool(torch.isfinite(real_value(weight)).all())
        ),
        None,
    )
    names = gathered(mine, run.student.groups.intra_dist_opt)
    if found := next((f"{name} (rank {rank})" for rank, name in enumerate(names) if name is not None), None):
        raise TrainingError(
            f"the student has weights that are not finite, the first is {found}: it is not exported. Train again with "
            f"a lower --lr or --clip_grad, from a checkpoint before it went wrong (look at {run_dir / 'metrics.jsonl'})"
        )


_LOST = ("connection closed by peer", "connection reset", "broken pipe", "timed out", "timeout", "socket")


def lost_rank(error: Exception, run_dir: str, timeout_minutes: float) -> TrainingError | None:
    """The error for a collective that failed because another rank ended or does not answer; None for other errors."""
    if isinstance(error, GKDError):
        return None
    text = " ".join(str(error).split())
    distributed = isinstance(error, dist.DistError) or "gloo" in text.lower() or "nccl" in text.lower()
    if not (isinstance(error, RuntimeError) and distributed and any(word in text.lower() for word in _LOST)):
        return None
    return TrainingError(
        f"another rank ended, or did not answer within --distributed_timeout_minutes {timeout_minutes:g} "
        f"({text[:200]}). The message of the rank that failed first says why; a rank without one was killed (out of "
        "memory?) or hangs. "
        f"{_start_again(run_dir)}"
    )


def _start_again(run_dir: str) -> str:
    if "--load" in (advice := go_on(run_dir)):
        return f"Checkpoints are complete: start all ranks again with the same command line and --load {run_dir}"
    return f"Correct that, then start all ranks again: {advice}"
