"""A run that is asked to stop, by SIGTERM or SIGUSR1 to any of its ranks: the step is finished, a checkpoint is saved,
the command ends with exit code 75 (cli.py). What schedulers, torchrun and users can count on: docs/faults.md.

All ranks have to stop after the same step, although the signal may reach one of them alone:

    the student's ranks     add the request to the sums that they reduce in every step anyway: no further collective
    ranks of the teacher's  (`--teacher_placement separate`) work up to two steps ahead. There all ranks add up requests
                            in a gloo group of their own, and each waits only for the sum of the step LAG steps before:
                            the student has made that one, or the signals of the step after it would not have arrived.
                            So nobody waits longer than without it, and the run stops LAG steps later.

Not covered: a signal before the first step or after the last one acts as if nobody listened (the process ends).
"""

from __future__ import annotations

import signal
import threading
from collections import deque
from types import FrameType
from typing import Any, Final

import torch
import torch.distributed as dist

from megatron_gkd.errors import RunStoppedError
from megatron_gkd.platform import new_group

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1)
LAG: Final = 2


class StopSignals:
    """While it is entered, the signals set `received` and do nothing else; afterwards they mean what they meant before.

    Outside the main thread, where Python sets no handlers, nothing is changed.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python cannot be set back; the default ends the process.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Launcher and scheduler may both send one, so a second signal is no request to end at once.
        self.received = signal.Signals(number).name


class StopAgreement:
    """Requests of all ranks of the world, where some are the teacher's alone: the same answer after the same step."""

    def __init__(self) -> None:
        """Collective over all ranks of the world (a group is made)."""
        self._group = new_group(range(dist.get_world_size()), backend="gloo")
        self._under_way: deque[tuple[Any, torch.Tensor]] = deque()

    def after_step(self, requested: bool) -> bool:
        """Whether a stop had been requested on some rank when it was here LAG steps ago; to be called after every step.

        Communication: one all-reduce of one int32 on the CPU over all ranks, waited for LAG calls later.
        """
        flag = torch.tensor(int(requested), dtype=torch.int32)
        self._under_way.append((dist.all_reduce(flag, group=self._group, async_op=True), flag))
        return len(self._under_way) > LAG and self._oldest()

    def close(self) -> None:
        """Wait for what is under way. Collective."""
        while self._under_way:
            self._oldest()

    def _oldest(self) -> bool:
        work, flag = self._under_way.popleft()
        work.wait()
        return bool(flag.item())


def stopped(step: int, run_dir: str, received: str | None) -> RunStoppedError:
    """What ends the run when its checkpoint is saved."""
    cause = f"{received} was received" if received else "another rank was told to stop"
    return RunStoppedError(
        f"{cause}: stopped after step {step}, with a checkpoint; the same command line with --load {run_dir} goes on"
    )
