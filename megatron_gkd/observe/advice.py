"""What to do after an error, said by what is on disk: nobody is told to go on from a checkpoint that is not there."""

from __future__ import annotations

from pathlib import Path


def go_on(run_dir: str | Path) -> str:
    """`go on from step_00000010, the newest checkpoint, which is complete, with --load SAVE`, or how to begin again."""
    complete = [path.parent for path in Path(run_dir, "checkpoints").glob("step_*/manifest.json")]
    numbered = [path for path in complete if path.name[5:].isdigit()]
    if numbered:
        newest = max(numbered, key=lambda path: int(path.name[5:]))
        return f"go on from {newest.name}, the newest checkpoint, which is complete, with --load {run_dir}"
    return f"there is no complete checkpoint in {run_dir}: begin again, with --auto_resume true or another --save"
