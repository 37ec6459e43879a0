"""What the student is fed: metrics of a step's micro-batches are those of what is collated."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_gkd.parallel.layout import Layout
from megatron_gkd.records import StepPlan
from megatron_gkd.schedule import plan_step
from megatron_gkd.train.batches import Collator, batch_metrics
from tests.support.trainers import make_samples

SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)])
LAYOUTS = {
    "one": Layout(),
    "DP2": Layout(data=2),
    "TP2 SP DP2": Layout(tensor=2, data=2, sequence_parallel=True),
    "CP2": Layout(context=2),
    "PP2 VPP2": Layout(pipeline=2, virtual_pipeline=2),
}
SIZES: dict[str, dict[str, Any]] = {
    "samples": dict(micro_batch_size=2),
    "tokens": dict(micro_batch_size=1, max_tokens=48),
    "packs": dict(micro_batch_size=1, packing=True, max_tokens=48),
}


def plan_of(layout: Layout, **sizes: Any) -> StepPlan:
    return plan_step(0, SAMPLES, data_parallel_size=layout.data, multiple_of=layout.row_multiple, **sizes)


def fed(plan: StepPlan, layout: Layout) -> list[int]:
    """Tokens of each replica, as they are collated."""
    replicas = []
    for batches in plan.student:
        parts = [
            Collator(plan.samples, plan.student, layout, packing=plan.packing, cp_rank=rank)(positions)
            for positions in batches
            for rank in range(layout.context)
        ]
        replicas.append(sum(part.tokens.numel() for part in parts))
    return replicas


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", SIZES)
def test_they_are_those_of_what_is_collated(layout: str, size: str) -> None:
    plan = plan_of(LAYOUTS[layout], **SIZES[size])
    found, tokens = batch_metrics(plan, LAYOUTS[layout]), fed(plan, LAYOUTS[layout])
    inputs = sum(sample.num_inputs for sample in SAMPLES)
    assert found["batch/padding"] == pytest.approx(1 - inputs / sum(tokens))
    assert found["batch/imbalance"] == pytest.approx(max(tokens) / (sum(tokens) / len(tokens)))


def test_a_pack_has_no_padding_and_an_even_share_is_one() -> None:
    layout = Layout(data=2)
    packed = batch_metrics(plan_of(layout, **SIZES["packs"]), layout)
    padded = batch_metrics(plan_of(layout, **SIZES["samples"]), layout)
    assert packed["batch/padding"] == 0 < padded["batch/padding"]
    assert batch_metrics(plan_of(Layout(), **SIZES["samples"]), Layout())["batch/imbalance"] == 1
