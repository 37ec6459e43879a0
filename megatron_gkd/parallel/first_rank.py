"""Long work on the first rank of a group, while the others wait for it longer than a collective may last.

    completions = on_first_rank(work, group)     # calls work() on the first rank; every rank has what it returned

A rank that waits in one collective for hours is an error after `--distributed_timeout_minutes`. So the first rank works
in a thread and says, every `every_s` seconds, that it is still at work; each of these is a collective of its own.

Either every rank returns the result or every rank raises: the first rank what `work` raised, the others a RolloutError
of the same text.

Communication: broadcast_object_list from the first rank over `group`, one every `every_s` seconds and one at the end,
which carries the result (any object that can be pickled).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_gkd.errors import RolloutError
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
                news = [(None if at_work.error is None else str(at_work.error) or repr(at_work.error), at_work.value)]
        dist.broadcast_object_list(news, src=first, group=group)
        if news[0] is not None:
            failure, result = news[0]
            if failure is None:
                return result
            raise (at_work.error if at_work is not None and at_work.error is not None else RolloutError(failure))


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
