"""The live line of a run:

    step 12/100 | loss 2.34 | 1,234 tokens/s | 0.52 s/step | ETA 0:00:46 | 80 tokens/completion | student 71%

In a file or a pipe every update is a separate line, so the caller updates it once per logging step. On a terminal tqdm
rewrites one line in place, with a bar and the current phase:

    step 12/100 |#1        | now: teacher | loss 2.34 | 1,234 tokens/s | 0.52 s/step | ETA 0:00:46 | ...

One rank prints; the others pass `enabled=False`. Speeds are means over the same last updates, so tokens/s times s/step
is the number of tokens of a step.
"""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, TextIO

WINDOW = 20  # updates that the speed, and with it the ETA, is taken from
_SLOW_S = 1.0  # what takes longer than that has a line of its own
_FEW = 0.05  # share of a step below which a phase is not shown
_FAST_S = 0.01  # below it the line says steps a second


class Progress(AbstractContextManager["Progress"]):
    """Progress over steps 1 .. total_steps, of which an earlier start did `done_steps`; `unit` is their name."""

    def __init__(
        self,
        total_steps: int,
        *,
        done_steps: int = 0,
        enabled: bool = True,
        unit: str = "step",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total_steps = total_steps
        self._unit = unit
        self._enabled = enabled
        self._stream = sys.stderr if stream is None else stream
        self._bar = _bar(self._stream, unit, total_steps, done_steps) if enabled and self._stream.isatty() else None
        self._clock = clock
        self._marks: deque[tuple[int, float]] = deque([(done_steps, clock())], maxlen=WINDOW)
        self._tokens: deque[float] = deque(maxlen=WINDOW - 1)  # of a step, by update
        self._text, self._now = "", ""

    def update(
        self,
        step: int,
        *,
        loss: float | None = None,
        tokens_per_step: float | None = None,
        length: float | None = None,
        phases: Mapping[str, float] | None = None,
    ) -> None:
        """Show that `step` steps are done.

        Args:
            length: mean tokens of the step's completions.
            phases: seconds of the last step by phase; the largest are shown as shares.
        """
        if not self._enabled:
            return
        self._marks.append((step, self._clock()))
        if tokens_per_step is not None:
            self._tokens.append(tokens_per_step)
        line = self.line(step, loss=loss)
        if length is not None:
            line += f" | {length:,.0f} tokens/completion"
        if phases and (shares := describe_phases(phases)):
            line += f" | {shares}"
        if self._bar is None:
            self._stream.write(f"{line}\n")
            self._stream.flush()
            return
        self._bar.n, self._text = step, line.partition(" | ")[2]
        self._draw()

    def doing(self, what: str) -> None:
        """Show the current phase; only on a terminal."""
        self._now = what.replace("_", " ")
        if self._bar is not None:
            self._draw()

    def _draw(self) -> None:
        assert self._bar is not None
        self._bar.ncols = shutil.get_terminal_size().columns - 1
        shown = [f"now: {self._now}"] if self._now else []
        self._bar.set_description_str(" | ".join([*shown, self._text]), refresh=False)
        self._bar.refresh()

    def line(self, step: int, *, loss: float | None = None) -> str:
        """The text of the line."""
        parts = [f"{self._unit} {step}/{self._total_steps}"]
        if loss is not None:
            parts.append(f"loss {loss:.4f}")
        step_time_s = self._step_time_s()
        if step_time_s is not None:
            if self._tokens:
                parts.append(f"{sum(self._tokens) / len(self._tokens) / step_time_s:,.0f} tokens/s")
            remaining_s = timedelta(seconds=round(step_time_s * max(self._total_steps - step, 0)))
            fast = step_time_s < _FAST_S
            speed = f"{1 / step_time_s:,.0f} {self._unit}s/s" if fast else f"{step_time_s:.2f} s/{self._unit}"
            parts += [speed, f"ETA {remaining_s}"]
        return " | ".join(parts)

    def close(self) -> None:
        """End the line, so that what follows starts on its own."""
        if self._bar is not None:
            self._bar.set_description_str(self._text, refresh=False)
            self._bar.close()
            self._bar = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def _step_time_s(self) -> float | None:
        """Seconds per step over the window."""
        (first, start_s), (last, end_s) = self._marks[0], self._marks[-1]
        return (end_s - start_s) / (last - first) if last > first and end_s > start_s else None


def _bar(stream: TextIO, unit: str, total_steps: int, done_steps: int) -> Any:
    from tqdm import tqdm

    tqdm.monitor_interval = 0  # no thread of its own: ranks fork
    tqdm.set_lock(threading.RLock())
    shape = f"{unit} {{n_fmt}}/{{total_fmt}} |{{bar:10}}| {{desc}}"
    return tqdm(total=total_steps, initial=done_steps, file=stream, bar_format=shape, mininterval=0, leave=True)


def describe_phases(seconds: Mapping[str, float]) -> str:
    """`student 71%, teacher 26%`: shares of the sum, the largest first, without negligible ones."""
    total = sum(seconds.values())
    shown = sorted(((value, name) for name, value in seconds.items() if total and value >= _FEW * total), reverse=True)
    return ", ".join(f"{name.replace('_', ' ')} {value / total:.0%}" for value, name in shown)


def took(seconds: float) -> str:
    """` (in 12.3 s)` for more than a second, otherwise the empty string."""
    return f" (in {seconds:,.1f} s)" if seconds > _SLOW_S else ""
