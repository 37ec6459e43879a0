"""From a step's samples to the micro-batches that one model is fed, and the plan of a forward pass alone."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gkd.data.collate import MicroBatch, collate
from megatron_gkd.model.pipeline import common_shape
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import MicroBatchPlan, Sample
from megatron_gkd.schedule import plan_micro_batches
from megatron_gkd.train.fit import length_multiple


def plan_forward(
    lengths: Sequence[int], layout: Layout, *, micro_batch_size: int, max_tokens: int | None = None
) -> MicroBatchPlan:
    """Micro-batches of any number of samples for a forward pass alone: the last ones may be smaller, or empty.
    `max_tokens` sizes them in tokens, as in schedule.py.

    The interleaved pipeline wants one shape [B, S] and a multiple of PP micro-batches: there they are single samples,
    filled up with empty ones.
    """
    one_shape = common_shape(layout)
    plan = plan_micro_batches(
        lengths,
        data_parallel_size=layout.data,
        micro_batch_size=1 if one_shape else micro_batch_size,
        max_tokens=None if max_tokens is None or one_shape else max(max_tokens, *lengths),
        allow_partial=True,
    )
    if one_shape:
        missing = -len(plan[0]) % layout.pipeline
        plan = tuple((*batches, *[()] * missing) for batches in plan)
    return plan


class Collator:
    """Collates samples, by position in the global batch, for one model's layout.

    Sequence parallelism needs lengths that divide by TP. The interleaved pipeline needs one length for all
    micro-batches of a data-parallel rank's step (model/pipeline.py): the longest of the plan.
    """

    def __init__(
        self, samples: Sequence[Sample], plan: MicroBatchPlan, layout: Layout, *, packing: bool, pad_id: int = 0
    ) -> None:
        self.samples, self.packing, self.pad_id = samples, packing, pad_id
        self.multiple = length_multiple(layout)
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
