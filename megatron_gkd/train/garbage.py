"""Python's garbage collector, by hand: `--manual_gc`.

By itself it runs on every rank at another moment, and all ranks wait for the one that collects. By hand it runs on all
ranks of the student after the same steps.
"""

from __future__ import annotations

import gc
from typing import Self


class Garbage:
    """A context in which garbage is collected after every `interval` steps alone; None: as Python does it."""

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
