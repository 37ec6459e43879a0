"""Wall seconds per named phase of a step.

    timers = Timers()
    with timers.phase("teacher"):
        ...
    timers.seconds()        # {"teacher_s": 1.93}

Work on a GPU is asynchronous: a phase ends when its kernels are queued, and their time appears where the host next
waits. With `synchronize` (e.g. torch.cuda.synchronize) both ends of every phase wait for the device, which slows down
the step. A phase inside another counts in both. Not thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

# What a step's time is made of, in the order of a step; `<name>_s` in metrics.jsonl.
PHASES = ("plan", "rollout", "teacher_samples", "teacher", "student", "other")


def phases_of(step_time_s: float, seconds: Mapping[str, float], *, within_plan: Iterable[float]) -> dict[str, float]:
    """Phases that add up to the step's time, those within the plan being counted by who waited: `plan_s` without them,
    and `other_s`, what no phase has.

    Args:
        seconds: of `Timers.seconds()`, with `plan_s`.
        within_plan: seconds that the plan waited for completions.
    """
    waited_s = sum(within_plan)
    found = {**seconds, "plan_s": max(seconds["plan_s"] - waited_s, 0.0)}
    return found | {"other_s": max(step_time_s - sum(found.values()) - waited_s, 0.0)}


class Timers:
    """Sums of seconds per phase."""

    def __init__(
        self,
        *,
        synchronize: Callable[[], object] | None = None,
        entered: Callable[[str], object] = lambda name: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Args: entered: told the name of each phase as it begins."""
        self._synchronize, self._entered = synchronize or (lambda: None), entered
        self._clock = clock
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a block; a block that raises is counted too."""
        self._synchronize()
        self._entered(name)
        start_s = self._clock()
        try:
            yield
        finally:
            self._synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - start_s

    def seconds(self) -> dict[str, float]:
        """`<phase>_s` -> total seconds, in the order of first use."""
        return {f"{name}_s": value for name, value in self._seconds.items()}
