"""SAVE/hf holds what was trained, and is measured: types, numbers side by side, whose directory it is.

The source is stored in bf16 and trained in fp32 with steps so small that bf16 cannot hold most of them. Not covered: a
shared file system that shows the directory late; fp32 main weights of bf16 runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.commands.report.run_record import read_run
from megatron_gkd.commands.report.summary import summarise, to_text
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.errors import CheckpointError
from megatron_gkd.observe.compare import differing
from megatron_gkd.observe.writers import read_rows
from megatron_gkd.train.evaluate import run_evaluation
from megatron_gkd.train.export_record import check_replaceable
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line, exported, train
from tests.support.trainers import build_run, write_rows

pytestmark = pytest.mark.slow

NAMES = ("forward_kl", "reverse_kl", "jsd", "nll", "agreement")


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("exporting")
    sizes: dict[str, Any] = dict(tied=True, layers=2, hidden_size=32, ffn_hidden_size=48, dtype=torch.bfloat16)
    student = write_tiny_checkpoint(root / "student", "qwen3", seed=1, **sizes)
    teacher = write_tiny_checkpoint(root / "teacher", "qwen3", seed=2, **sizes)
    return dict(
        model=student,
        teacher_model=teacher,
        dataset=write_rows(root / "rows.jsonl", 12),
        eval_dataset=write_rows(root / "held_out.jsonl", 6, seed=9),
        lmbda=0,
        beta=0,
        dtype="fp32",
        global_batch_size=4,
        train_iters=2,
        lr=1e-5,
        lr_warmup_fraction=0,
        report_to="none",
        device="cpu",
    )


def record(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "export.json").read_text())
    return found


def evaluate_on_this_rank(argv: list[str]) -> dict[str, float]:
    with megatron():
        return run_evaluation(parse_run_config(argv, command="eval"))


def gain(run_dir: Path, whose: str) -> float:
    first = read_rows(run_dir / "evaluation.jsonl")[0]
    return float(first["forward_kl"] - record(run_dir)[whose]["forward_kl"])


def test_the_export_holds_what_was_trained(tmp_path: Path, flags: dict[str, Any]) -> None:
    run_dir = train(world=2, **flags, tensor=2, save=tmp_path / "run")
    assert {tensor.dtype for tensor in exported(run_dir).values()} == {torch.float32}
    assert json.loads((run_dir / "hf" / "config.json").read_text())["dtype"] == "float32"
    found, last = record(run_dir), read_rows(run_dir / "evaluation.jsonl")[-1]
    assert (found["step"], found["dtype"]) == (2, "fp32")
    assert found["trained"] == {name: last[name] for name in (*NAMES, "num_tokens")}
    assert found["exported"] == found["trained"]
    assert gain(run_dir, "exported") > 0
    again = {**flags, "model": run_dir / "hf"} | dict(save=tmp_path / "other")
    (values,) = run_ranks(evaluate_on_this_rank, command_line(**again), world=1)
    assert not differing(found["trained"], values)
    text = to_text(summarise(read_run(run_dir)))
    assert "exported: the files of hf/ (fp32), read back: the numbers of the trained student" in text


def test_a_type_that_cannot_hold_it_is_measured_and_said(tmp_path: Path, flags: dict[str, Any]) -> None:
    run_dir = train(**flags, save_hf_dtype="source", save=tmp_path / "run")
    assert {tensor.dtype for tensor in exported(run_dir).values()} == {torch.bfloat16}
    assert gain(run_dir, "exported") < 0.5 * gain(run_dir, "trained"), "bf16 has lost most of the updates"
    text = to_text(summarise(read_run(run_dir)))
    assert "THE EXPORTED STUDENT, in source, IS NOT THE TRAINED ONE" in text
    (line,) = [line.split() for line in text.splitlines() if line.startswith("  forward KL")]
    found = record(run_dir)
    assert line[-4:-2] == [f"{found[whose]['forward_kl']:.4f}" for whose in ("trained", "exported")]


def test_ranks_of_the_teachers_measure_it_too(tmp_path: Path, flags: dict[str, Any]) -> None:
    own = dict(teacher_placement="separate", teacher_world_size=1)
    run_dir = train(world=2, **flags, **own, save=tmp_path / "run")
    assert record(run_dir)["exported"] == record(run_dir)["trained"]
    (run_dir / "export.json").unlink()
    (run_dir / "hf").rename(tmp_path / "hf")
    train(world=2, **flags, **own, load=run_dir, save=run_dir)  # all steps are done: the trained one is measured here
    assert record(run_dir)["exported"] == record(run_dir)["trained"]


def test_a_run_that_is_taken_further_replaces_its_export_and_no_other(tmp_path: Path, flags: dict[str, Any]) -> None:
    run_dir = train(**flags, save=tmp_path / "run")
    longer = flags | dict(train_iters=3, allow_changed_config=True, load=run_dir, save=run_dir)
    train(**longer)
    assert record(run_dir)["step"] == 3
    check_replaceable(run_dir)
    (run_dir / "hf" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not, or no longer, what this run has exported"):
        check_replaceable(run_dir)
    with pytest.raises(RankFailureError, match=r"hf exists and is not overwritten"):
        train(**longer | dict(train_iters=4))
    assert [row["step"] for row in read_rows(run_dir / "metrics.jsonl")] == [1, 2, 3], "before any work"


def test_two_evaluations_are_compared_to_rounding() -> None:
    assert not differing({"nll": 1.0, "jsd": 0.0}, {"nll": 1.00001, "jsd": 0.0})
    assert differing({"nll": 1.0}, {"nll": 1.001}) == ["nll"]
    assert differing({"nll": 1.0}, {"nll": float("nan")}) == ["nll"]


def highest_rates(argvs: list[list[str]]) -> list[float]:
    with megatron():
        return [build_run(parse_run_config(argv, command="train")).student.highest_learning_rate for argv in argvs]


def test_a_learning_rate_that_is_never_reached_is_known_at_the_start(tmp_path: Path, flags: dict[str, Any]) -> None:
    """Two steps of a cosine begin at 3/4 of it; a warm-up reaches it, and so does a constant one."""
    kinds: list[dict[str, Any]] = [{}, dict(lr_warmup_fraction=0.5), dict(lr_decay_style="constant")]
    argvs = [command_line(**flags | kind, save=tmp_path / "run") for kind in kinds]
    ((bare, warm, constant),) = run_ranks(highest_rates, argvs, world=1)
    assert bare == pytest.approx(0.75e-5)
    assert (warm, constant) == (pytest.approx(1e-5), pytest.approx(1e-5))
