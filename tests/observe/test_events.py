"""What happened in a run: rows, warnings of the package, a file that cannot be written."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from megatron_gkd.observe.events import FILE, EventLog
from megatron_gkd.observe.logging import PACKAGE, get_logger


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / FILE).read_text().splitlines()]


def test_starts_and_warnings_are_rows_until_it_is_closed(tmp_path: Path) -> None:
    events, logger = EventLog(tmp_path), get_logger("train.loop")
    logger.warning("before")
    events.listen()
    events.add("started", "2 ranks")
    events.step = 7
    logger.warning("step %d: odd", 7)
    logger.info("nothing")
    events.add("failed", "TrainingError: no")
    events.close()
    logger.warning("after")
    assert [(row["step"], row["kind"], row["text"]) for row in rows(tmp_path)] == [
        (0, "started", "2 ranks"),
        (7, "warning", "step 7: odd"),
        (7, "failed", "TrainingError: no"),
    ]
    EventLog(tmp_path).add("resumed", "")
    assert len(rows(tmp_path)) == 4, "a resume goes on with the file"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    events = EventLog(tmp_path, enabled=False)
    events.listen()
    events.add("started", "")
    get_logger("train").warning("odd")
    events.close()
    assert not (tmp_path / FILE).exists()


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path) -> None:
    said: list[str] = []

    class Hearing(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    events, handler = EventLog(tmp_path / "gone"), Hearing()
    logging.getLogger(PACKAGE).addHandler(handler)
    events.listen()
    events.add("started", "")
    events.add("done", "")
    events.close()
    logging.getLogger(PACKAGE).removeHandler(handler)
    assert len(said) == 1
    assert "the run goes on without" in said[0]
