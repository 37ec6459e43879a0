"""A run beside its plan: SAVE/plan.json, which is what `megatron-gkd plan ... --output json` printed for it.

Where the file is there when a run starts, its summary is logged; on GPUs a rank that comes to hold more than the plan
foresaw for its stages (what is reserved there included, a sampler's part not) says so, once. On a CPU nothing is
compared: what the kernel counts of a process is more than its tensors. A file that is no plan is named and left.

Communication: none; a rank on whose machine the file is absent compares nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch.distributed as dist

from megatron_gkd.config.json_file import read_json
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.layout import Layout

logger = get_logger(__name__)

FILE: Final = "plan.json"
_GB: Final = 1e9
_KEYS: Final = ("student_stage", "needed_bytes", "sampler_bytes", "peak_bytes")


class PlannedMemory:
    """Of one rank."""

    def __init__(self, run_dir: Path, layout: Layout, peak_bytes: Callable[[], int] | None) -> None:
        """
        Args:
            layout: the student's.
            peak_bytes: the most that this rank has held so far; None: it is not known.
        """
        self._peak_bytes = peak_bytes
        self._planned: int | None = None
        plan = _read(run_dir / FILE)
        if not plan:
            return
        self._rank = dist.get_rank()
        stage = layout.coordinate(self._rank).pp
        mine = [record for record in plan if record["student_stage"] == stage] or plan
        self._planned = max(
            record.get("own_bytes", record["needed_bytes"] - record["sampler_bytes"]) for record in mine
        )
        if self._rank == 0:
            logger.info("%s", _summary(plan))

    def check(self, step: int) -> None:
        """After a step."""
        if self._planned is None or self._peak_bytes is None or (seen := self._peak_bytes()) <= self._planned:
            return
        logger.warning(
            "step %d: rank %d has held %.1f GB, and %s foresaw %.1f: it was made for another run, or for other rows "
            "(docs/memory.md)",
            *(step, self._rank, seen / _GB, FILE, self._planned / _GB),
        )
        self._planned = None  # said once


def _read(path: Path) -> list[dict[str, Any]]:
    """[] where there is none."""
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


def _summary(plan: list[dict[str, Any]]) -> str:
    """The fullest rank, and what it holds."""
    most = max(plan, key=lambda record: record["needed_bytes"])
    peak = max(most["peak_bytes"], key=lambda categories: sum(categories.values()))
    parts = ", ".join(f"{name} {num_bytes / _GB:.1f}" for name, num_bytes in peak.items())
    return f"planned ({FILE}): {most['needed_bytes'] / _GB:.1f} GB on the fullest rank at the peak of a step: {parts}"
