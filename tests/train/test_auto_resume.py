"""`--auto_resume`: the same command line begins a run, begins it again, goes on, and leaves a finished run alone.

Real runs on two ranks; the record of each is that of a run that was never stopped, bit for bit. Restarts by torchrun
itself: tests/test_launch_ranks.py. Not covered: file systems whose nodes see different directories, other than through
ranks that are given different ones.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gkd.train.auto_resume import choose_start
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.runs import exported, metrics, train
from tests.support.trainers import run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

STEPS, SAVED_AT = 4, 2


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("auto_resume")
    student, teacher = write_pair(root, "qwen3", layers=2)
    return dict(
        model=student,
        teacher_model=teacher,
        dataset=[write_rows(root / "rows.jsonl", 13)],
        eval_dataset=[write_rows(root / "held_out.jsonl", 3, seed=9)],
        lmbda=0,
        global_batch_size=4,
        train_iters=STEPS,
        save_steps=SAVED_AT,
        eval_steps=2,
        lr=3e-3,
        report_to="none",
        device="cpu",
        auto_resume=True,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, flags: dict[str, Any]) -> Path:
    """A run that begins because nothing is there, and is never stopped."""
    return train(world=2, **flags, save=tmp_path_factory.mktemp("whole") / "run")


def record(run_dir: Path) -> list[list[dict[str, float]]]:
    """Training and evaluation, the one before the first step included."""
    return [metrics(run_dir, first_step=0, file=file) for file in ("metrics.jsonl", "evaluation.jsonl")]


def contents(run_dir: Path) -> dict[str, bytes]:
    """All files but the configuration, which names the directory that this one is a copy of."""
    files = [path for path in run_dir.rglob("*") if path.is_file() and path.name != "config.yaml"]
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


def stopped(whole: Path, run_dir: Path, *, last_row: int, saved: bool) -> Path:
    """The run directory as it is when a run stops after `last_row` steps, with or without a checkpoint before."""
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "hf")
    shutil.rmtree(run_dir / "checkpoints" / f"step_{STEPS:08d}")
    (run_dir / "checkpoints" / "latest").write_text(f"step_{SAVED_AT:08d}")
    if not saved:
        shutil.rmtree(run_dir / "checkpoints")
        (run_dir / "checkpoints" / f".writing_step_{SAVED_AT:08d}").mkdir(parents=True)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()[:last_row]
    (run_dir / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    return run_dir


@pytest.mark.parametrize(("last_row", "saved"), [(3, True), (SAVED_AT, True), (1, False)])
def test_the_same_command_line_goes_on_or_begins_again(
    tmp_path: Path, flags: dict[str, Any], whole: Path, last_row: int, saved: bool
) -> None:
    run_dir = stopped(whole, tmp_path / "run", last_row=last_row, saved=saved)
    train(world=2, **flags, save=run_dir)
    assert record(run_dir) == record(whole)
    assert [row["step"] for row in record(run_dir)[0]] == list(range(1, STEPS + 1))
    ours, theirs = exported(run_dir), exported(whole)
    assert all(ours[name].equal(theirs[name]) for name in ours | theirs)
    assert "load: null" in (run_dir / "config.yaml").read_text(), "the record says what was asked for"


def test_ranks_that_the_teacher_has_to_itself_go_on_too(tmp_path: Path, flags: dict[str, Any]) -> None:
    separate = flags | dict(teacher_placement="separate", teacher_world_size=1)
    whole = train(world=2, **separate, save=tmp_path / "whole")
    run_dir = stopped(whole, tmp_path / "run", last_row=3, saved=True)
    train(world=2, **separate, save=run_dir)
    assert record(run_dir) == record(whole)


def test_a_finished_run_is_left_alone_or_taken_further(tmp_path: Path, flags: dict[str, Any], whole: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    before = contents(run_dir)
    train(world=2, **flags, save=run_dir)
    assert contents(run_dir) == before
    longer = dict(train_iters=STEPS + 2, lr_decay_style="constant", allow_changed_config=True)
    hf = run_dir / "hf"
    (hf / "notes.txt").write_text("mine")
    with pytest.raises(RankFailureError, match=r"CheckpointError: .*hf exists and is not overwritten: .*move it away"):
        train(world=2, **flags | longer, save=run_dir)
    (hf / "notes.txt").unlink()
    train(world=2, **flags | longer, save=run_dir)
    assert json.loads((run_dir / "export.json").read_text())["step"] == STEPS + 2
    ours, theirs = exported(run_dir), exported(whole)
    assert not all(ours[name].equal(theirs[name]) for name in ours)
    assert sorted(path.name for path in run_dir.glob(".*hf*")) == []


def test_load_says_where_a_run_begins_and_not_where_it_goes_on(
    tmp_path: Path, flags: dict[str, Any], whole: Path
) -> None:
    elsewhere = whole / "checkpoints" / f"step_{SAVED_AT:08d}"
    begun = train(world=2, **flags, save=tmp_path / "run", load=elsewhere)
    assert [row["step"] for row in record(begun)[0]] == [SAVED_AT + 1, STEPS]
    train(world=2, **flags, save=tmp_path / "new", load=tmp_path / "new")
    assert record(tmp_path / "new") == record(whole), "the run's own directory, still without a checkpoint"
    own = stopped(whole, tmp_path / "own", last_row=3, saved=True)
    train(world=2, **flags, save=own, load=tmp_path / "is-not-there")
    assert record(own) == record(whole)


def choices(saves: list[str], flags: dict[str, Any]) -> str | None:
    values = {name: value for name, value in flags.items() if name not in ("model", "teacher_model", "dataset")}
    values["report_to"] = [values["report_to"]]
    model, teacher, rows = flags["model"], flags["teacher_model"], flags["dataset"][0]
    return choose_start(run_config(model, teacher, rows, **values, save=saves[dist.get_rank()])).checkpoint.load


def test_the_first_rank_decides_for_all(tmp_path: Path, flags: dict[str, Any], whole: Path) -> None:
    """Where the ranks see different directories, they still agree on whether to go on."""
    saves = [str(whole), str(tmp_path / "empty")]
    assert run_ranks(choices, saves, flags, world=2) == saves
    assert run_ranks(choices, saves[::-1], flags, world=2) == [None, None]
