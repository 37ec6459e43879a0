"""One training run of TRL's GKDTrainer, in the environment of benchmarks/setup_trl.sh; bench_end_to_end.py starts it.

    .venv/trl/bin/python benchmarks/trl_worker.py SETTINGS.json

SETTINGS: {"student", "teacher", "rows", "out", "steps", "batch", "lr", "beta", "lmbda", "max_new_tokens", "end_id"}.
`rows` is a JSON list of {"prompt_ids", "completion_ids"}, taken in order, `batch` a step. `out` gets one JSON line a
step, {"step", "loss", "step_time_s", "num_tokens"}, as a run of this project has them.

TRL as it is, but for three things without which the two could not be compared: rows come in order, as token ids that
were made once for both (TRL's collator builds the same padded tensors from text), and the mean loss of a step and its
number of completion tokens are taken in `compute_loss`, since the trainer's log rounds the one and lacks the other.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl.experimental.gkd import GKDConfig, GKDTrainer


class Collator:
    """As TRL's DataCollatorForChatML: everything padded on the left, prompts apart for sampling."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        prompts = [row["prompt_ids"] for row in rows]
        whole = [row["prompt_ids"] + row["completion_ids"] for row in rows]
        labels = [[-100] * len(row["prompt_ids"]) + row["completion_ids"] for row in rows]
        return {
            "input_ids": self._left(whole, self._pad_id),
            "attention_mask": self._left([[1] * len(ids) for ids in whole], 0),
            "labels": self._left(labels, -100),
            "prompts": self._left(prompts, self._pad_id),
            "prompt_attention_mask": self._left([[1] * len(ids) for ids in prompts], 0),
        }

    @staticmethod
    def _left(rows: list[list[int]], value: int) -> torch.Tensor:
        length = max(map(len, rows))
        return torch.tensor([[value] * (length - len(row)) + row for row in rows])


class InOrder(GKDTrainer):
    """Rows in file order; each step's loss and tokens are noted."""

    noted: dict[str, float]

    def _get_train_sampler(self, *args: Any, **options: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **options)
        self.noted = {"loss": float(loss.detach()), "num_tokens": int((inputs["labels"][:, 1:] != -100).sum())}
        return loss


class Steps(TrainerCallback):
    """Writes a line when a step has ended."""

    def __init__(self, out: Path) -> None:
        self._out, self.trainer, self._start_s = out, None, 0.0

    def on_step_begin(self, *args: Any, **options: Any) -> None:
        self._start_s = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        row = {"step": state.global_step, "step_time_s": time.perf_counter() - self._start_s, **self.trainer.noted}
        with self._out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def main(settings: dict[str, Any]) -> None:
    from datasets import Dataset

    rows = json.loads(Path(settings["rows"]).read_text())
    tokenizer = AutoTokenizer.from_pretrained(settings["student"])
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else settings["end_id"]
    tokenizer.pad_token_id = pad_id
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(settings[name], dtype=torch.float32) for name in ("student", "teacher")
    )
    student.generation_config.eos_token_id = settings["end_id"]
    with tempfile.TemporaryDirectory() as directory:
        config = GKDConfig(
            output_dir=directory,
            per_device_train_batch_size=settings["batch"],
            max_steps=settings["steps"],
            learning_rate=settings["lr"],
            lr_scheduler_type="constant",
            weight_decay=0.01,
            max_grad_norm=1.0,
            adam_beta2=0.999,
            beta=settings["beta"],
            lmbda=settings["lmbda"],
            temperature=1.0,
            max_new_tokens=settings["max_new_tokens"],
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            fp16=False,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
        )
        steps = Steps(Path(settings["out"]))
        trainer = InOrder(
            model=student,
            teacher_model=teacher,
            args=config,
            train_dataset=Dataset.from_list(rows),
            data_collator=Collator(pad_id),
            processing_class=tokenizer,
            callbacks=[steps],
        )
        steps.trainer = trainer
        trainer.train()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
