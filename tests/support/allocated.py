"""What a real rank holds, by category, as a rehearsal counts it (train/rehearsal.py).

Ranks are shared by tests. What an earlier run in the process left to be used again is put aside: megatron-core's buffer
of gathered hidden states, which may be too large for this run, and the places of tokens under context parallelism.
"""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

from megatron.core import parallel_state

from megatron_gkd.config.run import RunConfig
from megatron_gkd.model import context_attention
from megatron_gkd.observe.allocations import AllocationCounter
from megatron_gkd.train.rehearsal import NUM_STEPS, _Counted, _Phases, _plan
from megatron_gkd.train.rehearsed_pictures import RehearsedSight
from megatron_gkd.train.setup import Run, build
from megatron_gkd.train.step import distill, teacher_signals


class Allocated(NamedTuple):
    """Bytes by category."""

    built: dict[str, int]
    peak: dict[str, int]  # of the last step
    phases: dict[str, dict[str, int]]  # at the peak of each phase of it: "teacher", and "forward", the student's whole


def allocated(
    config: RunConfig,
    lengths: Sequence[tuple[int, int]],
    sight: RehearsedSight | None = None,
    *,
    num_steps: int = NUM_STEPS,
) -> Allocated:
    """Of this rank, after `num_steps` steps; where the teacher has it to itself, of its part of a step. Collective."""
    counter = AllocationCounter()
    timers: Any = _Phases(counter)
    context_attention.places_of.cache_clear()
    scratch = patch.object(parallel_state, "_GLOBAL_MEMORY_BUFFER", None)
    with scratch, counter, counter.category("built"):
        run = build(config)
        gc.collect()  # what a cycle still holds of the building
        _let_threads_finish()
        built = counter.now.by_category
        student = run.student.layout if isinstance(run, Run) else run.student_layout
        for step in range(num_steps):
            counter.restart()
            plan = _plan(step, config, lengths, student, run.teacher.layout, sight)
            if isinstance(run, Run):
                loss: Any = _Counted(run.loss, counter)
                distill(run.student, run.teacher, loss, plan, device=run.platform.device, timers=timers)
            else:
                with timers.phase("teacher"):
                    teacher_signals(run.teacher, plan)
        phases = {name: peak.by_category for name, peak in counter.peaks.items()}
        found = Allocated(built, counter.peak.by_category, phases)
    run.teacher.close()
    return found


def _let_threads_finish() -> None:
    """Wait until no other thread of the process wants to run: gloo's let go of a collective's tensors, pickled objects
    among them, only when they get a core, which on a busy machine is after the collective has returned."""
    own, quiet = threading.get_native_id(), 0
    while quiet < 2:
        time.sleep(0.05)
        states = {_state(task) for task in Path("/proc/self/task").iterdir() if int(task.name) != own}
        quiet = 0 if "R" in states else quiet + 1


def _state(task: Path) -> str | None:
    """Of a thread, by its letter in /proc; None: it has ended."""
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return None
