"""What the tests of checkpoints share: models, data and flags of small runs, and comparisons of run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.runs import exported, metrics
from tests.support.trainers import write_rows

STEPS, SAVED_AT = 4, 2
# adam_eps near the gradients' size: with 1e-8 the smallest gradients, which are rounding, move weights by full steps.
FLAGS: dict[str, Any] = dict(
    lmbda=0,
    sft_alpha=0.5,
    micro_batch_size=1,
    global_batch_size=4,
    train_iters=STEPS,
    lr=3e-3,
    min_lr=1e-4,
    lr_warmup_fraction=0.34,
    adam_eps=1e-4,
    clip_grad=0.1,
    save_steps=SAVED_AT,
    report_to="none",
    device="cpu",
    eval_steps=SAVED_AT,
)


def write_inputs(root: Path, *, layers: int = 2) -> dict[str, Any]:
    """Models and data; 4 key/value heads, so that TP4 divides them. 13 rows: the epochs end within batches."""
    sizes: dict[str, Any] = dict(hidden_size=32, ffn_hidden_size=48, kv_heads=4)
    student = write_tiny_checkpoint(root / "student", "qwen3", tied=True, layers=layers, seed=1, **sizes)
    teacher = write_tiny_checkpoint(root / "teacher", "qwen3", tied=False, layers=2, seed=2, **sizes)
    return dict(
        model=student,
        teacher_model=teacher,
        teacher_tensor=1,
        teacher_pipeline=1,
        dataset=[write_rows(root / "rows.jsonl", 13)],
        eval_dataset=[write_rows(root / "held_out.jsonl", 5, seed=9)],
    )


def checkpoint_of(run_dir: Path, step: int = SAVED_AT) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def assert_same_bits(resumed: Path, whole: Path, first_step: int) -> None:
    assert metrics(resumed, first_step=first_step) == metrics(whole, first_step=first_step)
    evaluations = [metrics(run, first_step=first_step, file="evaluation.jsonl") for run in (resumed, whole)]
    assert evaluations[0] == evaluations[1] != []
    ours, theirs = exported(resumed), exported(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
