"""Long work on some ranks of a group, while the others wait for it longer than a collective may last.

    completions = on_first_rank(work, group)     # calls work() on the first rank; every rank has what it returned
    results = on_some_ranks(work, group)         # work is None on the ranks that wait; what it returned, by rank

A rank that waits in one collective for hours is an error after `--distributed_timeout_minutes`. So a rank works in a
thread and says, every `every_s` seconds, that it is still at work; each of these is a collective of its own.

Either every rank returns the result or every rank raises: the error of the lowest rank that failed, in its class where
that is one of the package's (else RolloutError on the ranks that wait for the first one, RuntimeError for several).

Communication: of `on_first_rank`, broadcast_object_list from the first rank over `group`, one every `every_s` seconds
and one at the end, which carries the result (any object that can be pickled); of `on_some_ranks`, all_gather_object
over `group`, likewise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_gkd import errors
from megatron_gkd.errors import GKDError, RolloutError
from megatron_gkd.parallel.collectives import require_group
from megatron_gkd.platform import world_timeout

Result = TypeVar("Result")
EVERY_S = 10.0


def on_first_rank(work: Callable[[], Result], group: dist.ProcessGroup, *, every_s: float = EVERY_S) -> Result:
    """Collective over `group`; `work` makes no collectives itself and is not called on the other ranks.

    Args:
        every_s: seconds between two signs of life, at most a quarter of a collective's time limit.
    """
    first = dist.get_global_rank(require_group(group, "group"), 0)
    every_s = min(every_s, world_timeout().total_seconds() / 4)
    at_work = InThread(work, "work of the first rank") if dist.get_rank() == first else None
    while True:
        news: list[Any] = [None]
        if at_work is not None:
            at_work.wait(every_s)
            if at_work.done:
                news = [(None if at_work.error is None else _described(at_work.error), at_work.value)]
        dist.broadcast_object_list(news, src=first, group=group)
        if news[0] is not None:
            failure, result = news[0]
            if failure is None:
                return result
            if at_work is not None and at_work.error is not None:
                raise at_work.error
            name, text = failure
            raise getattr(errors, name, RolloutError)(text)


def on_some_ranks(
    work: Callable[[], Result] | None, group: dist.ProcessGroup, *, every_s: float = EVERY_S
) -> list[Result | None]:
    """Collective over `group`; `work` makes no collectives itself. Returns the results of all ranks, in rank order,
    None for those without work.

    Args:
        every_s: seconds between two signs of life, at most a quarter of a collective's time limit.
    """
    every_s = min(every_s, world_timeout().total_seconds() / 4)
    at_work = None if work is None else InThread(work, "work of this rank")
    size = dist.get_world_size(require_group(group, "group"))
    while True:
        done, failure, value = True, None, None
        if at_work is not None:
            at_work.wait(every_s)
            done = at_work.done
            if done:
                value, failure = at_work.value, None if at_work.error is None else _described(at_work.error)
        news: list[Any] = [None] * size
        dist.all_gather_object(news, (done, failure, value), group=group)
        failed = next((rank for rank, (_, failure, _) in enumerate(news) if failure is not None), None)
        if failed is not None:
            if at_work is not None and at_work.error is not None and failed == dist.get_rank(group):
                raise at_work.error
            name, text = news[failed][1]
            raise getattr(errors, name, RuntimeError)(text)
        if all(done for done, _, _ in news):
            return [value for _, _, value in news]


def _described(error: BaseException) -> tuple[str, str]:
    """(name of its class, text): what the other ranks raise it by."""
    return type(error).__name__ if isinstance(error, GKDError) else "", str(error) or repr(error)


class InThread:
    """A call that runs in a thread of its own; `value` and `error` hold once `done`."""

    def __init__(self, work: Callable[[], Any], name: str) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.value = work()
            except BaseException as error:  # handed to whoever waits
                self.error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def result(self) -> Any:
        """Wait; return what the call returned, or raise what it raised."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self.value
