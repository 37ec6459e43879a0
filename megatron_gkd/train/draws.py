"""Which rows a step trains on, and where the completion of each comes from: known for every step in advance."""

from __future__ import annotations

from typing import NamedTuple

from megatron_gkd.config import RunConfig
from megatron_gkd.data.dataset import Rows
from megatron_gkd.records import Row, Source
from megatron_gkd.schedule import sample_sources


class Draw(NamedTuple):
    """Rows and sources of a step, by position in the global batch."""

    indices: list[int]
    rows: list[Row]
    sources: list[Source]


def draw_step(config: RunConfig, rows: Rows, step: int) -> Draw:
    """A pure function of the configuration, the data and the step."""
    training, distillation = config.training, config.distillation
    size = training.global_batch_size
    indices = rows.indices(training.seed, step * size, size, shuffle=config.data.shuffle)
    sources = sample_sources(training.seed, step, size, lmbda=distillation.lmbda, seq_kd=distillation.seq_kd)
    return Draw(indices, [rows[i] for i in indices], sources)
