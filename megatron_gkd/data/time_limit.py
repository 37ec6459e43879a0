"""A time limit for code from a model's directory, such as a chat template, which may never end.

    with time_limit(30):          # in any thread
        render()                  # TimeLimitError is raised in it

One thread of the process checks every half second and raises the error in threads that are over their limit. It is
raised between two instructions of Python, so a loop in a template ends, but a single call of C does not. Entering and
leaving costs microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

_POLL_S = 0.5


class TimeLimitError(Exception):
    """The code took too long."""


@dataclass(eq=False)
class _Entry:
    deadline_s: float
    fired: bool = False


_running: dict[int, _Entry] = {}  # thread -> what it has begun
_firing = threading.Lock()
_watcher: tuple[int, threading.Thread] | None = None  # of which process, since a fork leaves threads behind


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Not to be nested."""
    global _watcher
    if _watcher is None or _watcher[0] != os.getpid():
        _watcher = (os.getpid(), threading.Thread(target=_watch, name="time limit", daemon=True))
        _watcher[1].start()
    thread, entry = threading.get_ident(), _Entry(time.monotonic() + seconds)
    _running[thread] = entry
    try:
        yield
    finally:
        _running.pop(thread, None)
        if time.monotonic() >= entry.deadline_s:  # else nobody has fired, and nobody will
            with _firing:
                if entry.fired:  # and it may not have arrived yet
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)


def _watch() -> None:
    while True:
        time.sleep(_POLL_S)
        with _firing:
            for thread, entry in list(_running.items()):
                if not entry.fired and time.monotonic() >= entry.deadline_s and _running.get(thread) is entry:
                    entry.fired = True
                    error = ctypes.py_object(TimeLimitError)
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)
