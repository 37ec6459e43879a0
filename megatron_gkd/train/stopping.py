"""Stops a run on SIGTERM, SIGUSR1 or SIGINT (Ctrl-C) to any of its ranks: the step is finished, a checkpoint is saved,
and the command ends with exit code 75 (cli.py). Guarantees to schedulers, torchrun and users: docs/faults.md.

After a Ctrl-C a second one, or the SIGTERM that torchrun sends for it, ends the process at once. Python's own handlers
run between its instructions, and a rank may wait in one collective for minutes. So the reply to the first signal, and
the end on the second, come from a thread that reads the signals as they arrive.

All ranks must stop after the same step, although the signal may reach only one of them:

    the student's ranks     add the request to the sums that they reduce in every step anyway: no further collective
    the teacher's own ranks (`--teacher_placement separate`) work up to two steps ahead. So all ranks sum up requests in
                            a gloo group of their own, and each waits only for the sum of the step LAG steps before.
                            The student has made that sum, or the signals of the step after it would not have arrived.
                            So no rank waits longer than without it, and the run stops LAG steps later.

Not covered: a signal before the first step or after the last one has its normal effect (the process ends).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

import torch
import torch.distributed as dist

from megatron_gkd.errors import RunStoppedError
from megatron_gkd.platform import new_group

SIGNALS: Final = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
LAG: Final = 2
SAME_PRESS_S: Final = 0.5  # a launcher may pass on the Ctrl-C that the terminal has sent to its children as well
EXIT_AT_ONCE: Final = 130
HEARD: Final = b"\nCtrl-C: the step is finished and a checkpoint saved; Ctrl-C again ends at once, without one\n"
AT_ONCE: Final = b"\nended at once: the steps since the last checkpoint are lost\n"


class StopSignals:
    """While it is entered, signals only set `received` to the first one's name, except a second Ctrl-C; afterwards the
    previous handlers apply again.

    Outside the main thread, where Python cannot set handlers, nothing is changed.
    """

    def __init__(self, end: Callable[[int], object] = os._exit) -> None:
        """Args: end: called by a second Ctrl-C, from another thread."""
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._end = end
        self._arrivals: int | None = None  # the end of a pipe that the signals' numbers are written to
        self._previous_wakeup = -1

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            arrivals, self._arrivals = os.pipe()
            os.set_blocking(self._arrivals, False)
            threading.Thread(target=self._read, args=(arrivals,), name="stop signals", daemon=True).start()
            self._previous_wakeup = signal.set_wakeup_fd(self._arrivals, warn_on_full_buffer=False)
            self._previous = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not set from Python cannot be set back; the default ends the process.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if self._arrivals is not None:
            signal.set_wakeup_fd(self._previous_wakeup)
            os.close(self._arrivals)  # ends the thread
            self._arrivals = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Launcher and scheduler may both send one, so a second signal is no request to end at once.
        self.received = self.received or signal.Signals(number).name

    def _read(self, arrivals: int) -> None:
        """Read the signals as they arrive, in a thread, until the pipe is closed."""
        pressed_s: float | None = None
        while arrived := os.read(arrivals, 1):
            now_s = time.monotonic()
            if pressed_s is None:
                if arrived[0] == signal.SIGINT:
                    pressed_s = now_s
                    _tell(HEARD)
            elif arrived[0] in (signal.SIGINT, signal.SIGTERM) and now_s - pressed_s > SAME_PRESS_S:
                _tell(AT_ONCE)
                self._end(EXIT_AT_ONCE)
        os.close(arrivals)


def _tell(text: bytes) -> None:
    with contextlib.suppress(OSError):  # nobody may be reading any more
        os.write(2, text)


class StopAgreement:
    """Agreement of all ranks of the world on a stop, if some are the teacher's own: the same answer after the same
    step."""

    def __init__(self) -> None:
        """Collective over all ranks of the world: makes a process group."""
        self._group = new_group(range(dist.get_world_size()), backend="gloo")
        self._under_way: deque[tuple[Any, torch.Tensor]] = deque()

    def after_step(self, requested: bool) -> bool:
        """Whether any rank had requested a stop LAG calls ago; to be called after every step.

        Communication: one all-reduce of one int32 on the CPU over all ranks, waited for LAG calls later.
        """
        flag = torch.tensor(int(requested), dtype=torch.int32)
        self._under_way.append((dist.all_reduce(flag, group=self._group, async_op=True), flag))
        return len(self._under_way) > LAG and self._oldest()

    def close(self) -> None:
        """Wait for the pending reductions. Collective."""
        while self._under_way:
            self._oldest()

    def _oldest(self) -> bool:
        work, flag = self._under_way.popleft()
        work.wait()
        return bool(flag.item())


def stopped(step: int, run_dir: str, received: str | None) -> RunStoppedError:
    """The exception that ends the run once its checkpoint is saved."""
    cause = f"{received} was received" if received else "another rank was told to stop"
    return RunStoppedError(
        f"{cause}: stopped after step {step}, with a checkpoint; the same command line with --load {run_dir} goes on"
    )
