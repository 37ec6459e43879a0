"""Phases of a step and categories of memory, by the names that `plan` prints (rehearsal.py, formula.py), and what of
them is in host memory when.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import LocalTeacher

WEIGHTS, HEAD = "teacher: weights", "teacher: head on the student's ranks"
STUDENT_WEIGHTS, GRADIENTS, OPTIMIZER = "student: weights", "student: gradients", "student: optimizer"
LOAD_TEACHER: Final = "load, the teacher"  # the part of "load" in which the student is there
PHASES: Final = ("load", "sampling", "teacher", "forward", "backward", "step 1", "step 2", "save")


def away(config: RunConfig, phase: str) -> Iterator[str]:
    """Categories that are in host memory in this phase (config/levers.py, `OffloadConfig`; HostWeights)."""
    local = isinstance(config.teacher.kind, LocalTeacher) and not config.base_teaches
    if config.teacher.offload_teacher_model and local and phase not in ("other", "load", LOAD_TEACHER, "teacher"):
        yield WEIGHTS
    colocated = local and config.teacher.teacher_placement == "colocate"
    beside = colocated and phase in ("teacher", LOAD_TEACHER)
    if config.offload.offload_model and (phase == "sampling" or beside):
        yield STUDENT_WEIGHTS
        yield GRADIENTS
    if config.offload.offload_optimizer and (beside or phase in ("sampling", "teacher", "forward", "backward")):
        yield OPTIMIZER
