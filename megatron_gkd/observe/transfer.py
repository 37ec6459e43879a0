"""Logs the progress of a long read or write of files: a line every ten seconds, and one at the end.

    INFO weights.load: path/to/model: 3.20 of 16.06 GB read, 1.31 GB/s
    INFO weights.load: path/to/model: 16.06 GB read in 12.3 s, 1.31 GB/s

Only rank 0's messages are shown (logging.py); they count the bytes that this rank moved.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path


class Transfer:
    """Of `total_bytes`, from or to `path`; `verb` as in "read"."""

    def __init__(
        self,
        logger: logging.Logger,
        path: str | Path,
        verb: str,
        total_bytes: int,
        *,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._logger, self._path, self._verb, self._total_bytes = logger, path, verb, total_bytes
        self._interval_s, self._clock = interval_s, clock
        self._start = self._last = clock()
        self.num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Count further bytes."""
        self.num_bytes += num_bytes
        now = self._clock()
        if now - self._last >= self._interval_s:
            self._last = now
            self._logger.info(
                "%s: %.2f of %.2f GB %s, %.2f GB/s",
                self._path,
                self.num_bytes / 1e9,
                self._total_bytes / 1e9,
                self._verb,
                self._rate(now),
            )

    def finish(self) -> float:
        """Log the total; returns the seconds."""
        now = self._clock()
        self._logger.info(
            "%s: %.2f GB %s in %.1f s, %.2f GB/s",
            self._path,
            self.num_bytes / 1e9,
            self._verb,
            now - self._start,
            self._rate(now),
        )
        return now - self._start

    def _rate(self, now: float) -> float:
        return self.num_bytes / max(now - self._start, 1e-9) / 1e9
