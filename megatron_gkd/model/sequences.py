"""The padded lengths of the sequences in a step, and the loss tokens that each rank holds of them. Pure.

A layout requires multiples:

    sequence parallelism    the TP ranks share the tokens that a rank is fed
    context parallelism     a sequence is split into 2 * cp chunks (parallel/zigzag.py)
    both                    whole lengths are multiples of cp * lcm(2, tp); segments of a pack, of 2 * cp
    interleaved schedule    all micro-batches of a step have one length, the longest, and in the padded form the same
                            number of rows, the largest
    one shape               all micro-batches of training and evaluation have it (--tp_comm_overlap)

Collation (train/batches.py) and the routing of signals (teacher/signals.py) both use this module, so they agree.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_gkd.model.pipeline import common_shape
from megatron_gkd.parallel.layout import Layout, round_up
from megatron_gkd.parallel.zigzag import held_spans
from megatron_gkd.records import LossShare, MicroBatchPlan, Sample, StepPlan

Shares = Sequence[Sequence[LossShare]]  # [position in the global batch][context-parallel rank]


class Sequences:
    """The sequences of one model in one step."""

    def __init__(self, samples: Sequence[Sample], plan: MicroBatchPlan, layout: Layout, *, packing: bool) -> None:
        """`samples`: as this model is fed them, by position."""
        self.samples, self.layout, self.packing = samples, layout, packing
        self.segment_multiple, self.row_multiple = layout.segment_multiple, layout.row_multiple
        self.num_rows = 1  # at least, of a padded micro-batch
        if layout.micro_batch_shape is not None:
            fed = max((self.num_fed(batch) for batches in plan for batch in batches), default=0)
            self.num_rows, self.row_multiple = layout.micro_batch_shape
            assert fed <= self.num_rows * self.row_multiple, f"{fed} tokens do not fit {layout.micro_batch_shape}"
        elif common_shape(layout):
            self.num_rows = 1 if packing else max(1, max(len(batch) for batches in plan for batch in batches))
            self.row_multiple = max(
                round_up(sum(self.lengths(batch)) if packing else self.lengths(batch)[0], self.row_multiple)
                if batch
                else self.row_multiple
                for batches in plan
                for batch in batches
            )

    def lengths(self, positions: Sequence[int]) -> list[int]:
        """Padded lengths of a micro-batch's sequences: rows of equal length, or segments of a pack."""
        own = [self.samples[position].num_inputs for position in positions]
        if self.packing:
            return [round_up(length, self.segment_multiple) for length in own]
        return [round_up(max(own), self.row_multiple)] * len(own)

    def num_fed(self, positions: Sequence[int]) -> int:
        """Tokens of a micro-batch that a replica is fed, padding included."""
        if not positions:
            return self.row_multiple * self.num_rows
        lengths = self.lengths(positions)
        if self.packing:
            return round_up(sum(lengths), self.row_multiple)
        return lengths[0] * max(len(positions), self.num_rows)

    def share(self, position: int, length: int, rank: int) -> LossShare:
        """The loss tokens that context-parallel rank `rank` holds of a sample in a sequence of `length`."""
        return LossShare.of(self.samples[position], held_spans(length, self.layout.context, rank))


def loss_shares(samples: Sequence[Sample], plan: MicroBatchPlan, layout: Layout, *, packing: bool) -> Shares:
    """The shares of all samples of a step."""
    sequences, shares = Sequences(samples, plan, layout, packing=packing), dict[int, tuple[LossShare, ...]]()
    for positions in (positions for batches in plan for positions in batches if positions):
        for position, length in zip(positions, sequences.lengths(positions), strict=True):
            shares[position] = tuple(sequences.share(position, length, rank) for rank in range(layout.context))
    assert shares.keys() == set(range(len(samples))), "micro-batches and the step plan different samples"
    return [shares[position] for position in range(len(samples))]


def student_shares(plan: StepPlan, layout: Layout) -> Shares:
    """The shares of the student's ranks."""
    return loss_shares(plan.samples, plan.student, layout, packing=plan.packing)


def teacher_shares(plan: StepPlan, layout: Layout) -> Shares:
    """The shares of a local teacher's ranks."""
    samples = [sample.for_teacher for sample in plan.samples]
    return loss_shares(samples, plan.teacher, layout, packing=plan.packing)
