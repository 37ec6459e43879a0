"""Whole runs of a mixture of experts: resumed bit for bit, or in another layout of its experts; exported alike.

As test_checkpoint.py. A run of expert-parallel ranks saves after half of its steps; what goes on from there is the same
run to the last bit in the same layout, and to 1e-6 in another one: other expert parallelism, experts cut otherwise than
the dense layers, no pipeline stage without experts, the teacher on ranks of its own with an expert parallelism of its
own. Only a part of it runs in the gate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.checkpoint_runs import (
    FLAGS,
    SAVED_AT,
    STEPS,
    assert_goes_on,
    assert_same_bits,
    assert_same_export,
    checkpoint_of,
)
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import FULL
from tests.support.runs import train
from tests.support.trainers import write_rows

pytestmark = pytest.mark.slow

HOME: dict[str, Any] = dict(pipeline=2, expert=2)  # of four ranks; the first stage has no experts
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, dict(expert=1)),
    "DP2": (2, dict(expert=1)),
    "TP2 SP EP2": (2, dict(tensor=2, sequence=True, expert=2, expert_tensor=1)),
    "TP2 SP ETP1": (2, dict(tensor=2, sequence=True, expert=1, expert_tensor=1)),
    "EP2": (2, dict(expert=2)),
    "DP2 beside a teacher of EP2": (
        4,
        dict(expert=1, teacher_placement="separate", teacher_world_size=2, teacher_expert=2),
    ),
    "PP2 VPP2 EP2": (4, dict(pipeline=2, virtual=2, expert=2)),
}
RESUMED = [(True, "DP2 beside a teacher of EP2")]
EXPORTED = [(True, "one")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


@pytest.fixture(scope="module")
def inputs(root: Path) -> dict[str, Any]:
    sizes: dict[str, Any] = dict(hidden_size=32, ffn_hidden_size=48, moe_intermediate_size=24)
    student = write_tiny_checkpoint(root / "student", "qwen3_moe", tied=True, seed=1, mlp_only_layers=[0, 1], **sizes)
    teacher = write_tiny_checkpoint(root / "teacher", "qwen3_moe", layers=2, seed=2, **sizes)
    return dict(
        model=student,
        teacher_model=teacher,
        teacher_tensor=1,
        teacher_pipeline=1,
        teacher_expert=1,
        dataset=[write_rows(root / "rows.jsonl", 13)],
        eval_dataset=[write_rows(root / "held_out.jsonl", 5, seed=9)],
    )


@pytest.fixture(scope="module")
def whole(root: Path, inputs: dict[str, Any]) -> dict[bool, Path]:
    """Run directories of uninterrupted runs, by use_distributed_optimizer."""
    return {
        sharded: train(world=4, **inputs, **FLAGS, **HOME, sharded=sharded, save=root / f"whole_{sharded}")
        for sharded in ((True, False) if FULL else (True,))
    }


@pytest.mark.parametrize("sharded", [True, False] if FULL else [True])
def test_a_resumed_run_is_the_same_run(
    tmp_path: Path, inputs: dict[str, Any], whole: dict[bool, Path], sharded: bool
) -> None:
    source = checkpoint_of(whole[sharded])
    resumed = train(world=4, **inputs, **FLAGS, **HOME, sharded=sharded, save=tmp_path / "run", load=source)
    assert_same_bits(resumed, whole[sharded], SAVED_AT + 1)


ALL = [(sharded, layout) for sharded in (True, False) for layout in OTHERS]


@pytest.mark.parametrize(("sharded", "layout"), ALL if FULL else RESUMED, ids=lambda value: str(value))
def test_a_run_goes_on_in_another_layout(
    tmp_path: Path, inputs: dict[str, Any], whole: dict[bool, Path], sharded: bool, layout: str
) -> None:
    world, sizes = OTHERS[layout]
    flags = {**inputs, **FLAGS, **sizes, "sharded": sharded}
    run_dir = train(world=world, **flags, save=tmp_path / "run", load=checkpoint_of(whole[sharded]))
    assert_goes_on(run_dir, whole[sharded])


@pytest.mark.parametrize(("sharded", "layout"), ALL if FULL else EXPORTED, ids=lambda value: str(value))
def test_every_layout_exports_the_same_bits(
    tmp_path: Path, inputs: dict[str, Any], whole: dict[bool, Path], sharded: bool, layout: str
) -> None:
    """Loaded after the last step, nothing is left to train: what is exported is what was loaded."""
    world, sizes = OTHERS[layout]
    flags = {**inputs, **FLAGS, **sizes, "sharded": sharded, "eval_steps": 100}
    run_dir = train(world=world, **flags, save=tmp_path / "run", load=checkpoint_of(whole[sharded], STEPS))
    assert_same_export(run_dir, whole[sharded])
