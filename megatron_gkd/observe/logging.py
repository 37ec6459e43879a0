"""Messages of all ranks in one format: `2025-01-31 12:00:00 [rank 0] INFO train.loop: text`, on stderr.

Rank 0 shows messages from the given level on; the other ranks show warnings and errors, and everything with "debug".
Only the package's own logger is set up: other libraries' messages and the root logger stay as they are. Modules call
`get_logger(__name__)`; nothing is set up until `setup_logging` is called.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

from megatron_gkd.config.environment import rank_in_messages
from megatron_gkd.observe.text import visible

PACKAGE = "megatron_gkd"
CLEAR_LINE = "\r\x1b[K"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module of the package (`__name__`), or of a name below it."""
    return logging.getLogger(name if name.split(".")[0] == PACKAGE else f"{PACKAGE}.{name}")


def setup_logging(level: str = "info", *, rank: int | None = None, stream: TextIO | None = None) -> None:
    """Send the package's messages to `stream`; a second call replaces the first.

    stream: None takes what is stderr when a message comes.

    rank: of this process; None takes the RANK that torchrun sets, 0 without it.
    """
    rank = rank_in_messages() if rank is None else rank
    threshold = logging.getLevelNamesMapping()[level.upper()]
    logger = logging.getLogger(PACKAGE)
    for old in [handler for handler in logger.handlers if isinstance(handler, _LineHandler)]:
        logger.removeHandler(old)
    handler = _LineHandler(stream)
    handler.setFormatter(_PackageFormatter(rank))
    logger.addHandler(handler)
    logger.setLevel(threshold if rank == 0 or threshold <= logging.DEBUG else max(threshold, logging.WARNING))
    logger.propagate = False


class _LineHandler(logging.StreamHandler[TextIO]):
    """Clears the progress line before a message on a terminal; it reappears with its next update."""

    def __init__(self, stream: TextIO | None) -> None:
        super().__init__(stream or sys.stderr)
        self._follows_stderr = stream is None

    def emit(self, record: logging.LogRecord) -> None:
        if self._follows_stderr:
            self.stream = sys.stderr  # which others may have replaced, and closed
        try:
            if self.stream.isatty():
                self.stream.write(CLEAR_LINE)
        except (OSError, ValueError):  # a message that cannot be shown is no reason to end a run
            self.handleError(record)
            return
        super().emit(record)


class _PackageFormatter(logging.Formatter):
    """The format of all messages: logger names without the package's name, and no control characters."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"%(asctime)s [rank {rank}] %(levelname)s %(short_name)s: %(message)s", "%Y-%m-%d %H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        record.short_name = record.name.removeprefix(f"{PACKAGE}.")
        return visible(super().format(record))
