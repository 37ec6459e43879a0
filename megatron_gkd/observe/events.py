"""SAVE/events.jsonl: the events of a run: starts, resumes, warnings, and how each start ended.

    {"step": 20, "time": "2025-01-31T12:00:00Z", "kind": "resumed", "text": "..."}

Every warning of the package on the writing rank is an event ("warning"; step: the last one that was begun). The file is
only appended to: a resumed run replaces metrics, but keeps events. A failed write does not end the run: it is logged
once, and events are not recorded any more.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Final, Literal

from megatron_gkd.observe.logging import PACKAGE, get_logger

FILE: Final = "events.jsonl"
Kind = Literal["started", "resumed", "warning", "stopped", "failed", "done"]

logger = get_logger(__name__)


class EventLog:
    """The events of one start of a run; ranks other than the writing one pass `enabled=False`."""

    def __init__(self, run_dir: Path, *, enabled: bool = True) -> None:
        self.step = 0
        self._path: Path | None = run_dir / FILE if enabled else None
        self._handler = _Warnings(self)

    def listen(self) -> None:
        """Record warnings until `close`."""
        if self._path is not None:
            logging.getLogger(PACKAGE).addHandler(self._handler)

    def add(self, kind: Kind, text: str) -> None:
        """Append a row."""
        if self._path is None:
            return
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        row = {"step": self.step, "time": now, "kind": kind, "text": text}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            path, self._path = self._path, None
            logger.warning("%s cannot be written (%s): the run goes on without", path, error.strerror or error)

    def close(self) -> None:
        """Stop recording warnings."""
        logging.getLogger(PACKAGE).removeHandler(self._handler)


class _Warnings(logging.Handler):
    def __init__(self, events: EventLog) -> None:
        super().__init__(logging.WARNING)
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        self._events.add("warning", record.getMessage())
