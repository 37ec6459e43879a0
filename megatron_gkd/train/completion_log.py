"""SAVE/completions.jsonl (--log_completions): the completions sampled for each logged step, as text. One row each:

    {"step": 3, "position": 0, "row": 17, "source": "student", "policy_version": 2, "num_tokens": 40,
     "prompt": "...", "completion": "..."}

The first --num_completions_to_log of a step, in the order of the batch, before its update. What --report_to names is
given the same as a table. Completions of the data are not logged: they are there to be read.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from megatron_gkd.observe.writers import JsonlWriter
from megatron_gkd.records import StepPlan

if TYPE_CHECKING:
    from megatron_gkd.train.setup import Run

FILE: Final = "completions.jsonl"


class CompletionLog:
    """Of a run, on the writing rank."""

    def __init__(self, run: Run, run_dir: Path, *, first_step: int | None) -> None:
        """Raises CheckpointError for a tokenizer that cannot be read."""
        self._most = run.config.logging.num_completions_to_log
        self._tokenizer = run.tokenizer
        self._file = JsonlWriter(run_dir / FILE, first_step=first_step)

    def write(self, step: int, plan: StepPlan) -> list[dict[str, Any]]:
        """Record a step's completions; returns the rows, for trackers. Args: step: counted from 1."""
        sampled = [sample for sample in plan.samples if sample.source != "dataset"][: self._most]
        rows = [
            {
                "step": step,
                "position": sample.position,
                "row": sample.row,
                "source": sample.source,
                "policy_version": sample.policy_version,
                "num_tokens": len(sample.completion_ids),
                "prompt": self._tokenizer.decode(list(sample.prompt_ids)),
                "completion": self._tokenizer.decode(list(sample.completion_ids)),
            }
            for sample in sampled
        ]
        for row in rows:
            self._file.append(row)
        return rows

    def close(self) -> None:
        """Release the file."""
        self._file.close()
