"""A JSONL file that is written in batches by a program that may be killed at any moment and started again.

Beside RESULT stands RESULT.progress.json: what the run was asked (its settings and data), how many input records are
done, and how many bytes of RESULT belong to them. A batch is appended and flushed to disk first, and then the progress
file is replaced at once (a rename). So whatever happens, RESULT up to those bytes is whole lines of finished batches;
what follows, torn lines included, is cut off at the next start and made again.

A result without progress was not made this way and is never touched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_gkd.errors import ConfigError, DataError


class ResultFile:
    """Attributes: `records_done`, of the input; `counts`, sums over everything that was done; `complete`."""

    def __init__(self, path: str | Path, asked: Mapping[str, Any]) -> None:
        """Go on with the file at `path`, or begin it. Nothing is written yet.

        Raises ConfigError if the file there was made by something else, or with other settings.
        """
        self.path = Path(path)
        self.progress_path = progress_path(self.path)
        self._asked = json.loads(json.dumps(asked))
        self._num_bytes = 0
        self.records_done = 0
        self.counts: dict[str, int] = {}
        self.complete = False
        if not self.path.parent.is_dir():
            raise ConfigError(f"--result_path {self.path}: there is no directory {self.path.parent}; make it")
        if self.path.is_dir():
            raise ConfigError(f"--result_path {self.path} is a directory; give the name of a file")
        if self.progress_path.exists():
            self._read_progress()
        elif self.path.exists():
            raise ConfigError(
                f"--result_path {self.path} exists and has no {self.progress_path.name} beside it, so it is left "
                "alone; give another name, or remove it"
            )

    @property
    def resumed(self) -> bool:
        return self.records_done > 0

    def append(self, rows: Sequence[Mapping[str, Any]], *, records_done: int, counts: Mapping[str, int]) -> None:
        """Add the rows of a batch; `records_done` and `counts` are the new totals."""
        text = "".join(f"{json.dumps(row, ensure_ascii=False, default=str)}\n" for row in rows).encode()
        if not self.progress_path.exists():
            self._write_progress()  # from here on the file is known to be ours
        with self.path.open("r+b" if self.path.exists() else "xb") as file:
            file.truncate(self._num_bytes)  # what an earlier start left after its last finished batch
            file.seek(self._num_bytes)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._num_bytes += len(text)
        self.records_done, self.counts = records_done, dict(counts)
        self._write_progress()

    def finish(self) -> None:
        """Say that there is nothing more to come."""
        self.append([], records_done=self.records_done, counts=self.counts)
        self.complete = True
        self._write_progress()

    def _read_progress(self) -> None:
        try:
            found = json.loads(self.progress_path.read_text(encoding="utf-8"))
            asked, num_bytes, counts = found["asked"], int(found["bytes"]), dict(found["counts"])
            records_done, complete = int(found["records_done"]), bool(found["complete"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self.progress_path} cannot be read ({error}); remove it and {self.path.name} to begin again"
            ) from error
        if asked != self._asked:
            names = sorted(
                name for name in asked.keys() | self._asked.keys() if asked.get(name) != self._asked.get(name)
            )
            then, now = asked.get(names[0]), self._asked.get(names[0])
            raise ConfigError(
                f"--result_path {self.path} was begun with another {names[0]} ({_short(then)}, now {_short(now)})"
                + (f", and another {', '.join(names[1:])}" if names[1:] else "")
                + f"; give another --result_path, or remove it and {self.progress_path.name}"
            )
        size = self.path.stat().st_size if self.path.exists() else 0
        if size < num_bytes:
            raise DataError(
                f"{self.path} has {size} bytes, and {num_bytes} were written according to {self.progress_path.name}: "
                "it was changed; remove both to begin again"
            )
        self._num_bytes, self.counts = num_bytes, {name: int(count) for name, count in counts.items()}
        self.records_done, self.complete = records_done, complete

    def _write_progress(self) -> None:
        content = {
            "asked": self._asked,
            "records_done": self.records_done,
            "bytes": self._num_bytes,
            "counts": self.counts,
            "complete": self.complete,
        }
        temporary = self.progress_path.with_name(f".{self.progress_path.name}.new")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.progress_path)


def progress_path(path: Path) -> Path:
    """Beside the result."""
    return path.with_name(f"{path.name}.progress.json")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
