"""Which calls a sampling engine accepts in which state: the rules of protocol.py as a small state machine. Pure Python.

    memory    awake -> asleep -> (wake_weights) weights -> (wake_kv) awake
    update    none -> (begin) open -> (bucket)* -> (end) none, with a version
                            any failure -> broken -> (abort) none, without a version

Each method is a context manager around the adapter's own work:

    with self.state.bucket():
        self._send(tensors)

It refuses a call out of order before the work begins, makes the transition when the work succeeds, and records a
failure: after a failed step of an update only `abort` is possible, after a failed sleep or wake only `close`. Sampling
needs an engine that is awake, outside an update, with weights that have a version.

Colocated and server engines use the same machine. It holds no locks: an engine is driven by one thread at a time, and
an update that begins while another thread samples is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

from megatron_gkd.errors import RolloutError

Memory = Literal["awake", "weights", "asleep", "unknown"]
Update = Literal["none", "open", "broken"]


class EngineState:
    """Attributes: `version` of the weights, None if there are none to sample from; `memory`; `update`; `closed`."""

    def __init__(self, name: str, *, version: int | None, sleep_level: int = 0, memory: Memory = "awake") -> None:
        """`name` names the engine in messages ("the vLLM server at http://..."); sleep level 2 drops the weights."""
        self.name = name
        self.version = version
        self.memory: Memory = memory
        self.update: Update = "none"
        self.closed = False
        self._sleep_level = sleep_level
        self._num_sampling = 0

    def __str__(self) -> str:
        """`asleep, weights of version 3`, `in an unfinished update, no weights`."""
        if self.closed:
            return "closed"
        memory = {
            "awake": "awake",
            "weights": "awake but for its KV cache",
            "asleep": "asleep",
            "unknown": "of unknown memory after a failed sleep or wake",
        }[self.memory]
        update = {"none": "", "open": ", in an unfinished update", "broken": ", in a failed update"}[self.update]
        weights = "no complete weights" if self.version is None else f"weights of version {self.version}"
        return f"{memory}{update}, {weights}"

    @contextlib.contextmanager
    def begin(self) -> Iterator[None]:
        """Around the start of an update. The old version ends here, because the weights are no longer complete."""
        self._usable("begin an update")
        if self.memory == "asleep":
            self._refuse("begin an update", "wake_weights comes first")
        if self.update != "none":
            self._refuse("begin an update", "end or abort the one before it first")
        if self._num_sampling:
            self._refuse("begin an update", f"{self._num_sampling} call(s) are still sampling or scoring")
        self.version = None
        self.update = "open"
        with self._breaks_update():
            yield

    @contextlib.contextmanager
    def bucket(self) -> Iterator[None]:
        """Around the transfer of some tensors."""
        self._in_update("take a bucket of weights")
        with self._breaks_update():
            yield

    @contextlib.contextmanager
    def end(self, version: int) -> Iterator[None]:
        """Around the end of an update, including the dropping of cached prefixes."""
        self._in_update(f"end an update as version {version}")
        assert version >= 0, version
        with self._breaks_update():
            yield
        self.update = "none"
        self.version = version

    @contextlib.contextmanager
    def abort(self) -> Iterator[bool]:
        """Around leaving an update; yields False if there is none, so that nothing has to be done."""
        self._usable("abort an update")
        if self.update == "none":
            yield False
            return
        self.update = "broken"
        yield True
        self.update = "none"

    @contextlib.contextmanager
    def sampling(self, what: str) -> Iterator[int]:
        """Around `generate` and `score` (`what` names the call); yields the version of the weights."""
        self._usable(what)
        if self.update != "none":
            self._refuse(what, "the weights are not whole; end the update, or abort it and make a complete one")
        if self.memory != "awake":
            self._refuse(what, "wake_weights and wake_kv come first" if self.memory == "asleep" else "wake_kv is due")
        if self.version is None:
            self._refuse(what, "a complete update comes first (begin, bucket, end)")
        assert self.version is not None
        self._num_sampling += 1
        try:
            yield self.version
        finally:
            self._num_sampling -= 1

    @contextlib.contextmanager
    def sleep(self) -> Iterator[None]:
        """Around freeing memory."""
        self._usable("sleep")
        if self.memory == "asleep":
            self._refuse("sleep", "it sleeps already")
        self._outside_update("sleep")
        if self._num_sampling:
            self._refuse("sleep", f"{self._num_sampling} call(s) are still sampling or scoring")
        with self._loses_memory():
            yield
        self.memory = "asleep"
        if self._sleep_level == 2:
            self.version = None

    @contextlib.contextmanager
    def wake_weights(self) -> Iterator[None]:
        """Around allocating memory for weights."""
        self._usable("wake its weights")
        if self.memory != "asleep":
            self._refuse("wake its weights", "they are awake already")
        with self._loses_memory():
            yield
        self.memory = "weights"

    @contextlib.contextmanager
    def wake_kv(self) -> Iterator[None]:
        """Around allocating memory for the KV cache."""
        self._usable("wake its KV cache")
        if self.memory == "awake":
            self._refuse("wake its KV cache", "it is awake already")
        if self.memory == "asleep":
            self._refuse("wake its KV cache", "wake_weights comes first")
        self._outside_update("wake its KV cache")
        with self._loses_memory():
            yield
        self.memory = "awake"

    def lose_weights(self) -> None:
        """The weights are not those of `version`: a complete update must follow."""
        self.version = None

    def close(self) -> bool:
        """Whether there is anything left to close; every later call is refused."""
        was_open, self.closed = not self.closed, True
        return was_open

    def _usable(self, what: str) -> None:
        if self.closed:
            self._refuse(what, "make a new engine")
        if self.memory == "unknown":
            self._refuse(what, "close it and make a new engine")

    def _in_update(self, what: str) -> None:
        self._usable(what)
        if self.update == "none":
            self._refuse(what, "begin comes first")
        if self.update == "broken":
            self._refuse(what, "abort it, then make a complete update")

    def _outside_update(self, what: str) -> None:
        if self.update != "none":
            self._refuse(what, "end or abort the update first")

    def _refuse(self, what: str, advice: str) -> None:
        raise RolloutError(f"{self.name} was asked to {what}, and it is {self}; {advice}")

    @contextlib.contextmanager
    def _breaks_update(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.update = "broken"
            raise

    @contextlib.contextmanager
    def _loses_memory(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.memory = "unknown"
            raise
