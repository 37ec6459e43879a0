"""What a real rank holds, by category, as a rehearsal counts it (train/rehearsal.py)."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from typing import Any

from megatron_gkd.config.run import RunConfig
from megatron_gkd.observe.allocations import AllocationCounter
from megatron_gkd.train.rehearsal import NUM_STEPS, _Counted, _Phases, _plan
from megatron_gkd.train.rehearsed_pictures import RehearsedSight
from megatron_gkd.train.setup import Run, build
from megatron_gkd.train.step import distill, teacher_signals


def allocated(
    config: RunConfig,
    lengths: Sequence[tuple[int, int]],
    sight: RehearsedSight | None = None,
    *,
    num_steps: int = NUM_STEPS,
) -> tuple[dict[str, int], dict[str, int]]:
    """(built, at the peak of the last of `num_steps` steps) of this rank, by category; where the teacher has it to
    itself, of its part of a step. Collective."""
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
        peak = counter.peak.by_category
    run.teacher.close()
    return built, peak
