"""Runs Python's garbage collector at fixed steps: `--manual_gc`.

By default it runs at a different moment on every rank, and all ranks wait for the one that collects. With the flag it
runs on all of the student's ranks after the same steps.
"""

from __future__ import annotations

import gc
from typing import Self


class Garbage:
    """A context in which garbage is collected only after every `interval` steps; None: Python's default."""

    def __init__(self, interval: int | None) -> None:
        self._interval = interval

    def __enter__(self) -> Self:
        if self._interval is not None:
            gc.disable()
            gc.collect()
        return self

    def after_step(self, step: int) -> None:
        if self._interval is not None and step % self._interval == 0:
            gc.collect()

    def __exit__(self, *_: object) -> None:
        if self._interval is not None:
            gc.enable()
