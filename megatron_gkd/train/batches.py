"""From a step's samples to the micro-batches that one model is fed."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gkd.data.collate import collate
from megatron_gkd.model.pipeline import common_shape
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import MicroBatch, MicroBatchPlan, Sample


class Collator:
    """Collates samples, by position in the global batch, for one model's layout.

    Sequence parallelism needs lengths that divide by TP. The interleaved pipeline needs one length for all
    micro-batches of a data-parallel rank's step (model/pipeline.py): the longest of the plan.
    """

    def __init__(
        self, samples: Sequence[Sample], plan: MicroBatchPlan, layout: Layout, *, packing: bool, pad_id: int = 0
    ) -> None:
        self.samples, self.packing, self.pad_id = samples, packing, pad_id
        self.multiple = layout.tensor if layout.sequence_parallel else 1
        if common_shape(layout):
            join = sum if packing else max
            longest = max(
                join(samples[p].num_inputs for p in batch) if batch else 1 for batches in plan for batch in batches
            )
            self.multiple = -(-longest // self.multiple) * self.multiple

    def __call__(self, positions: Sequence[int]) -> MicroBatch:
        return collate(
            [self.samples[p] for p in positions],
            pad_to_multiple_of=self.multiple,
            packing=self.packing,
            pad_id=self.pad_id,
        )
