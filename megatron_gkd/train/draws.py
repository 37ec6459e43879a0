"""The rows of each step, and the source of each completion: known for every step in advance.

A step's draw is used several times (by the plan, by the samplers, and one step ahead by whatever works beside the
training), and for streamed rows it reads and tokenises them. So `Draws` keeps the last two.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import NamedTuple

from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.dataset import Rows
from megatron_gkd.records import Row, Source
from megatron_gkd.schedule import sample_sources

_KEPT = 2  # the step that trains, and the next


class Draw(NamedTuple):
    """Rows and sources of a step, by position in the global batch."""

    indices: list[int]
    rows: list[Row]
    sources: list[Source]


class Draws:
    """The draws of a run's steps, counted from 0. Thread-safe."""

    def __init__(self, config: RunConfig, rows: Rows) -> None:
        self._config, self.rows = config, rows
        self._kept: OrderedDict[int, Draw] = OrderedDict()  # the latest asked for last
        self._lock = threading.Lock()

    def __getitem__(self, step: int) -> Draw:
        with self._lock:
            if step not in self._kept:
                self._kept[step] = draw_step(self._config, self.rows, step)
            self._kept.move_to_end(step)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return self._kept[step]


def draw_step(config: RunConfig, rows: Rows, step: int) -> Draw:
    """A pure function of the configuration, the data and the step."""
    training = config.training
    size = training.global_batch_size
    indices = rows.indices(training.seed, step * size, size, shuffle=config.data.shuffle)
    sources = sample_sources(
        training.seed, step, size, lmbda=config.lmbda.at(step + 1), seq_kd=config.distillation.seq_kd
    )
    return Draw(indices, [rows[i] for i in indices], sources)
