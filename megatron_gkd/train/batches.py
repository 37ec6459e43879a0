"""Collates a step's samples into the micro-batches of one model, and plans a forward pass."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gkd.data.collate import MicroBatch, collate
from megatron_gkd.data.cut import cut
from megatron_gkd.model.pipeline import common_shape
from megatron_gkd.model.sequences import Sequences
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import MicroBatchPlan, Sample, StepPlan
from megatron_gkd.schedule import plan_micro_batches


def plan_forward(
    lengths: Sequence[int], layout: Layout, *, micro_batch_size: int, max_tokens: int | None = None
) -> MicroBatchPlan:
    """Micro-batches of any number of samples for a forward pass: the last ones may be smaller, or empty. `max_tokens`
    sizes them in tokens, as in schedule.py.

    The interleaved pipeline needs one shape [B, S], so there each is a single sample.
    """
    one_shape = common_shape(layout)
    return plan_micro_batches(
        lengths,
        data_parallel_size=layout.data,
        micro_batch_size=1 if one_shape else micro_batch_size,
        max_tokens=None if max_tokens is None or one_shape else max(max_tokens, *lengths),
        allow_partial=True,
        multiple_of=1 if max_tokens is None else layout.row_multiple,
    )


def batch_metrics(plan: StepPlan, layout: Layout) -> dict[str, float]:
    """The fraction of padding in the student's micro-batches, and the most tokens of a replica over the mean (1:
    even)."""
    sequences = Sequences(plan.samples, plan.student, layout, packing=plan.packing)
    fed = [sum(sequences.num_fed(positions) for positions in batches) for batches in plan.student]
    num_inputs = sum(sample.num_inputs for sample in plan.samples)
    return {"batch/padding": 1 - num_inputs / sum(fed), "batch/imbalance": max(fed) * len(fed) / sum(fed)}


class Collator:
    """Collates samples, by position in the global batch, for one rank of a model's layout: its part of each sequence,
    padded as the layout requires (model/sequences.py)."""

    def __init__(
        self,
        samples: Sequence[Sample],
        plan: MicroBatchPlan,
        layout: Layout,
        *,
        packing: bool,
        cp_rank: int | None = None,
        pad_id: int = 0,
    ) -> None:
        """Args: cp_rank: this rank's; required under context parallelism."""
        assert layout.context == 1 or cp_rank is not None, "each context-parallel rank has its own part of a sequence"
        self.sequences = Sequences(samples, plan, layout, packing=packing)
        self.size, self.rank, self.pad_id = layout.context, cp_rank or 0, pad_id

    def __call__(self, positions: Sequence[int]) -> MicroBatch:
        sequences = self.sequences
        lengths = dict(zip(positions, sequences.lengths(positions), strict=True)) if positions else {}
        batch = collate(
            [sequences.samples[p] for p in positions],
            pad_to_multiple_of=sequences.row_multiple,
            pad_segments_to=sequences.segment_multiple,
            num_rows=sequences.num_rows,
            packing=sequences.packing,
            pad_id=self.pad_id,
            share_of=lambda sample: sequences.share(sample.position, lengths[sample.position], self.rank),
        )
        return cut(batch, self.size, self.rank)
