"""kill -9 of a rank at random points of a run, the saves included: after restarts, the run is the one that never
stopped.

Each layout has its own series: a run is started, one of its four ranks kills itself with SIGKILL at a random event
(tests/support/run_zygote.py), the others are ended, everything on disk is looked at, and the same command line is
started again, until the run ends; then a new run begins, until as many kills have happened as KILLS says. Every other
start saves in the background.

Not covered: a machine that goes down with all its ranks and what it had not yet written.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.train.checkpoint import files
from tests.support.checkpoint_runs import FLAGS
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.effort import count
from tests.support.run_zygote import RunZygote
from tests.support.runs import command_line, metrics
from tests.support.trainers import write_rows

KILLS = count(2, 20)
WORLD = 4
LAYOUTS: dict[str, dict[str, Any]] = {"TP2 x PP2": dict(tensor=2, pipeline=2), "DP4": {}}
RUN: dict[str, Any] = FLAGS | dict(train_iters=4, global_batch_size=4, save_steps=1, save_total_limit=2, save_hf=False)


class Zygote:
    """tests/support/run_zygote.py with a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.process = directory, RunZygote()

    def run(self, argv: list[str], kill: tuple[int, int] | None = None) -> dict[str, Any]:
        directory = str(self.directory / "ranks")
        return self.process.run({"argv": argv, "world": WORLD, "directory": directory, "kill": kill})

    def output(self) -> str:
        """Of the ranks of the last run."""
        paths = sorted((self.directory / "ranks").glob("output*"))
        return "\n".join(f"--- {path.name}\n{path.read_text()[-2000:]}" for path in paths)


@pytest.fixture(scope="module")
def zygote(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Zygote]:
    zygote = Zygote(tmp_path_factory.mktemp("zygote"))
    yield zygote
    zygote.process.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("inputs")
    sizes: dict[str, Any] = dict(hidden_size=32, ffn_hidden_size=48, layers=2)
    return dict(
        model=write_tiny_checkpoint(root / "student", "qwen3", tied=True, seed=1, **sizes),
        teacher_model=write_tiny_checkpoint(root / "teacher", "qwen3", tied=False, seed=2, **sizes),
        teacher_tensor=1,
        teacher_pipeline=1,
        dataset=[write_rows(root / "rows.jsonl", 9)],
    )


def check_what_is_left(root: Path) -> None:
    """Whatever looks complete is whole; the pointer names one of them."""
    for checkpoint in files.checkpoints(root):
        assert files.find_damage(checkpoint, files.read_manifest(checkpoint), read=True) is None
    if (root / "latest").exists():
        assert (root / (root / "latest").read_text()).is_dir()
        assert files.checkpoints(root)


@pytest.mark.slow
@pytest.mark.timeout(5400)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_killed_runs_end_up_as_the_uninterrupted_one(
    tmp_path: Path, inputs: dict[str, Any], zygote: Zygote, layout: str
) -> None:
    flags = RUN | inputs | LAYOUTS[layout] | dict(eval_steps=None)
    flags = {name: value for name, value in flags.items() if value is not None}
    whole = tmp_path / "whole"
    answer = zygote.run(command_line(**flags, save=whole))
    assert answer["codes"] == [0] * WORLD, zygote.output()
    generator = random.Random(f"kill -9, {layout}")
    kills = hidden = runs = starts = 0
    while kills < KILLS or not hidden:  # at least one falls into a save: nearly every second one does
        assert kills < KILLS + 20, "no kill fell into a save"
        runs += 1
        run_dir, done = tmp_path / f"run{runs}", False
        while not done:
            starts += 1
            argv = command_line(**flags, save=run_dir, auto_resume=True, async_save=starts % 2 == 0)
            victim = generator.randrange(WORLD)
            point = (victim, generator.randint(1, answer["events"][victim])) if kills < KILLS or not hidden else None
            codes = zygote.run(argv, point)["codes"]
            done = codes == [0] * WORLD
            assert done or (point is not None and codes[victim] == -9), zygote.output()
            kills += not done
            hidden += any(run_dir.glob("checkpoints/.*"))
            check_what_is_left(run_dir / "checkpoints")
        assert metrics(run_dir) == metrics(whole), f"run {runs}"
        left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
        assert left == ["latest", "step_00000003", "step_00000004"]
    print(f"{layout}: {kills} kills in {starts} starts of {runs} runs; {hidden} left a save or a deletion unfinished")
