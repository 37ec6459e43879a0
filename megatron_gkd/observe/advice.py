"""Advice after an error, from what is on disk: a checkpoint is only named if it exists."""

from __future__ import annotations

from pathlib import Path


def go_on(run_dir: str | Path) -> str:
    """How to continue: `go on from step_00000010, the newest checkpoint, ... with --load SAVE`, or begin again."""
    complete = [path.parent for path in Path(run_dir, "checkpoints").glob("step_*/manifest.json")]
    numbered = [path for path in complete if path.name[5:].isdigit()]
    if numbered:
        newest = max(numbered, key=lambda path: int(path.name[5:]))
        return f"go on from {newest.name}, the newest checkpoint, which is complete, with --load {run_dir}"
    return f"there is no complete checkpoint in {run_dir}: begin again, with --auto_resume true or another --save"
