"""What the tests of checkpoints share: models, data and flags of small runs, and comparisons of run directories.

A run of adapters is compared as any other: what it has written is the adapter and the merged student.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.runs import adapter_of, exported, metrics
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


# A run of adapters beside a frozen student, with modules that are trained whole.
ADAPTERS: dict[str, Any] = dict(tuner_type="lora", lora_rank=4, lora_alpha=8, merge_lora=True)
MODULES = ["embed_tokens", "norm", "input_layernorm", "q_norm"]


def write_inputs(root: Path, student: str = "qwen3", teacher: str = "qwen3", **of_student: Any) -> dict[str, Any]:
    """Models and data; 4 key/value heads, so that TP4 divides them. 13 rows: the epochs end within batches."""
    sizes: dict[str, Any] = dict(hidden_size=32, ffn_hidden_size=48, kv_heads=4)
    of_student = dict(layers=2) | of_student
    root.mkdir(exist_ok=True)
    return dict(
        model=write_tiny_checkpoint(root / "student", student, tied=True, seed=1, **sizes, **of_student),
        teacher_model=write_tiny_checkpoint(root / "teacher", teacher, tied=False, layers=2, seed=2, **sizes),
        teacher_tensor=1,
        teacher_pipeline=1,
        dataset=[write_rows(root / "rows.jsonl", 13)],
        eval_dataset=[write_rows(root / "held_out.jsonl", 5, seed=9)],
    )


def checkpoint_of(run_dir: Path, step: int = SAVED_AT) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


def written(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run has exported."""
    return exported(run_dir) | (adapter_of(run_dir) if (run_dir / "adapter").exists() else {})


def assert_same_export(run_dir: Path, whole: Path) -> None:
    ours, theirs = written(run_dir), written(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def assert_same_bits(resumed: Path, whole: Path, first_step: int) -> None:
    assert metrics(resumed, first_step=first_step) == metrics(whole, first_step=first_step)
    evaluations = [metrics(run, first_step=first_step, file="evaluation.jsonl") for run in (resumed, whole)]
    assert evaluations[0] == evaluations[1] != []
    assert_same_export(resumed, whole)


def assert_goes_on(run_dir: Path, whole: Path) -> None:
    """From the checkpoint in another layout: every number to 1e-6 relative."""
    ours, theirs = metrics(run_dir), metrics(whole, first_step=SAVED_AT + 1)
    assert [row["step"] for row in ours] == list(range(SAVED_AT + 1, STEPS + 1))
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(expected, rel=1e-6)
    tensors, expected_tensors = written(run_dir), written(whole)
    assert tensors.keys() == expected_tensors.keys()
    for name, tensor in expected_tensors.items():
        assert (tensors[name] - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name
