"""The way from the command to the loss is the one that docs/architecture.md shows, on the stack of a real step.

Not covered: what megatron-core and torch have on the stack between them.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import megatron_gkd
from megatron_gkd.cli import main
from megatron_gkd.train.objective import DistillationLoss
from tests.support.checkpoint_runs import FLAGS, write_inputs
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line

PACKAGE = Path(megatron_gkd.__file__).parent
PAGE = (PACKAGE.parent / "docs/architecture.md").read_text(encoding="utf-8")
MOST_FUNCTIONS = 8


def documented() -> list[tuple[str, str]]:
    """(file, function) of every row of the page's table."""
    section = PAGE.split("\n## From the command to the loss\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([\w/]+\.py)` \| `(\w+)` \|", section, flags=re.M)


def stack_of_a_loss(argv: list[str]) -> list[tuple[str, str]]:
    """(file, function) of the package's functions from the command to the loss, the outermost first."""
    called, found = DistillationLoss.__call__, list[list[tuple[str, str]]]()

    def noting(self: DistillationLoss, *args: Any, **options: Any) -> Any:
        ours = [frame for frame in inspect.stack(context=0) if Path(frame.filename).is_relative_to(PACKAGE)]
        found.append([(str(Path(f.filename).relative_to(PACKAGE)), f.function.strip("<>")) for f in reversed(ours)])
        return called(self, *args, **options)

    DistillationLoss.__call__ = noting  # type: ignore[method-assign]
    try:
        with megatron():
            assert main(argv) == 0
    finally:
        DistillationLoss.__call__ = called  # type: ignore[method-assign]
    return [*found[-1], ("train/objective.py", "__call__")]


def test_the_way_to_the_loss_is_the_documented_one(tmp_path: Path) -> None:
    flags = write_inputs(tmp_path) | FLAGS | dict(train_iters=1, save_hf=False, eval_steps=9, save=tmp_path / "run")
    (stack,) = run_ranks(stack_of_a_loss, ["train", *command_line(**flags)], world=1)
    assert stack == documented()
    assert len(stack) <= MOST_FUNCTIONS
