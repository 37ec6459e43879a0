"""What a real rank holds, by category, as a rehearsal counts it (train/rehearsal.py)."""

from __future__ import annotations

import gc
from collections.abc import Sequence

from megatron_gkd.config.run import RunConfig
from megatron_gkd.observe.allocations import AllocationCounter
from megatron_gkd.train.rehearsal import _Counted, _Phases, _plan
from megatron_gkd.train.rehearsed_pictures import RehearsedSight
from megatron_gkd.train.step import distill
from tests.support.trainers import build_run


def allocated(
    config: RunConfig, lengths: Sequence[tuple[int, int]], sight: RehearsedSight | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """(built, at the peak of the second step) of this rank, by category. Collective."""
    counter = AllocationCounter()
    with counter, counter.category("built"):
        run = build_run(config)
        gc.collect()  # what a cycle still holds of the building
        built = counter.now.by_category
        student, teacher = run.student.layout, run.teacher.layout
        for step in range(2):
            counter.restart()
            distill(
                run.student,
                run.teacher,
                _Counted(run.loss, counter),  # type: ignore[arg-type]
                _plan(step, config, lengths, student, teacher, sight),
                device=run.platform.device,
                timers=_Phases(counter),  # type: ignore[arg-type]
            )
        return built, counter.peak.by_category
