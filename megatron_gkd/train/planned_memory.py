"""Compares a run's memory with its plan: SAVE/plan.json, the output of `megatron-gkd plan ... --output json`, or
without it the closed formula (formula.py) for rows of --max_length.

The plan's summary is logged at the start. On GPUs a rank that comes to hold more than the plan foresaw for its stages
(including what is reserved there, without a sampler's part) logs that once. On a CPU nothing is compared, because the
kernel counts more than a process's tensors. A file that is not a plan is named in a warning and ignored.

Communication: none; a rank on a machine without the file compares nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.json_file import read_json
from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.servers import LocalTeacher
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.fit import kinds
from megatron_gkd.train.formula import formula, not_covered

logger = get_logger(__name__)

FILE: Final = "plan.json"
_GB: Final = 1e9
_KEYS: Final = ("student_stage", "needed_bytes", "sampler_bytes", "peak_bytes")


class PlannedMemory:
    """The comparison of one rank."""

    def __init__(
        self,
        run_dir: Path,
        layout: Layout,
        peak_bytes: Callable[[], int] | None,
        by_formula: Callable[[], list[dict[str, Any]]] = list,
    ) -> None:
        """Args:
        layout: the student's.
        peak_bytes: the most that this rank has held so far; None: not known.
        by_formula: makes the plan if there is no file.
        """
        self._peak_bytes = peak_bytes
        self._planned: int | None = None
        plan, self._source = _read(run_dir / FILE), FILE
        if not plan and not (run_dir / FILE).is_file():
            plan, self._source = by_formula(), "by formula, of rows as long as --max_length"
        if not plan:
            return
        self._rank = dist.get_rank()
        stage = layout.coordinate(self._rank).pp
        mine = [record for record in plan if record["student_stage"] == stage] or plan
        self._planned = max(
            record.get("own_bytes", record["needed_bytes"] - record["sampler_bytes"]) for record in mine
        )
        if self._rank == 0:
            logger.info("%s", _summary(plan, self._source))

    def check(self, step: int) -> None:
        """After a step."""
        if self._planned is None or self._peak_bytes is None or (seen := self._peak_bytes()) <= self._planned:
            return
        logger.warning(
            "step %d: rank %d has held %.1f GB, and the plan (%s) foresaw %.1f: it was made for another run, or for "
            "other rows (docs/memory.md)",
            *(step, self._rank, seen / _GB, self._source, self._planned / _GB),
        )
        self._planned = None  # said once


def _read(path: Path) -> list[dict[str, Any]]:
    """The plan; [] if there is none."""
    if not path.is_file():
        return []
    try:
        found = read_json(path)
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read, and nothing is compared with it: %s", path, error)
        return []
    if not isinstance(found, list) or not all(isinstance(one, dict) and one.keys() >= set(_KEYS) for one in found):
        logger.warning(
            "%s is not what `megatron-gkd plan --output json` prints (without --search), and nothing is compared", path
        )
        return []
    return found


def by_formula(
    config: RunConfig, arch: Architecture, student: Layout, teacher: Layout
) -> Callable[[], list[dict[str, Any]]]:
    """A function that makes a plan's records, with the reserve that `plan` adds; none for a run that the formula does
    not cover. `arch`: the student's."""

    def records() -> list[dict[str, Any]]:
        kind, asked, found = config.teacher.kind, PlanConfig(), list[dict[str, Any]]()
        local = isinstance(kind, LocalTeacher) and not config.base_teaches
        archs = arch, read_architecture(kind.path) if local and isinstance(kind, LocalTeacher) else None
        if not_covered(config, archs) is not None:
            return found
        for rank in kinds(student, teacher):
            phases = formula(config, archs, (student, teacher), rank, asked.lengths(config.data.max_length))
            fullest = max(phases.values(), key=lambda parts: sum(parts.values()))
            own = round(sum(fullest.values()) + asked.reserved_gb * _GB)
            stage = student.coordinate(rank).pp if student.holds(rank) else None
            peak_bytes = [{name: round(number) for name, number in fullest.items()}]
            found.append(dict(student_stage=stage, needed_bytes=own, sampler_bytes=0, peak_bytes=peak_bytes))
        return found

    return records


def _summary(plan: list[dict[str, Any]], source: str) -> str:
    """The rank that holds most, and what it holds."""
    most = max(plan, key=lambda record: record["needed_bytes"])
    peak = max(most["peak_bytes"], key=lambda categories: sum(categories.values()))
    largest = sorted(peak.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{name} {num_bytes / _GB:.1f}" for name, num_bytes in largest if num_bytes)
    return f"planned ({source}): {most['needed_bytes'] / _GB:.1f} GB on the fullest rank at the peak of a step: {parts}"
