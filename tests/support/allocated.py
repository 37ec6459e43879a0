"""What a real rank holds, by category, as a rehearsal counts it (train/rehearsal.py)."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from megatron_gkd.config.run import RunConfig
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
    with counter, counter.category("built"):
        run = build(config)
        gc.collect()  # what a cycle still holds of the building
        time.sleep(0.1)  # gloo's threads let go of the last collective's tensors when they get to run
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
