"""`--max_tokens_per_gpu` without packing in a virtual pipeline, whose micro-batches all have one shape [B, S]: the
properties of its plan, and the numbers of a run without it.

Not covered: evaluation, where such a pipeline is fed one sample at a time.
"""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.collate import collate
from megatron_gkd.schedule import plan_micro_batches
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_pair, write_rows

SAMPLES = make_samples([(25, 7), (3, 11), (39, 12), (8, 24), (1, 4), (16, 9), (2, 0), (1, 2), (14, 4)])
BUDGET = 112  # two rows of the longest
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP2 VPP2": (2, dict(pipeline=2, virtual=2, teacher_pipeline=1)),
    "DP2 PP2 VPP2": (4, dict(pipeline=2, virtual=2, teacher_pipeline=1)),
    "TP2 SP PP2 VPP2": (4, dict(tensor=2, sequence=True, pipeline=2, virtual=2, teacher_pipeline=1)),
}


@given(
    lengths=st.lists(st.integers(1, 40), min_size=4, max_size=30),
    num_ranks=st.integers(1, 4),
    multiple=st.sampled_from([1, 2, 8]),
    rows=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_as_many_rows_as_fit_beside_the_longest(lengths: list[int], num_ranks: int, multiple: int, rows: int) -> None:
    longest = -(-max(lengths) // multiple) * multiple
    common: dict[str, Any] = dict(data_parallel_size=num_ranks, micro_batch_size=1, multiple_of=multiple)
    plan = plan_micro_batches(lengths, max_tokens=rows * longest + multiple - 1, one_shape=True, **common)
    fullest = max(len(batch) for batches in plan for batch in batches)
    num_batches = len(plan[0])
    assert sorted(position for batches in plan for batch in batches for position in batch) == list(range(len(lengths)))
    assert {len(batches) for batches in plan} == {num_batches}
    assert fullest <= rows
    assert num_batches == -(-len(lengths) // (num_ranks * rows)), "no plan within the budget has fewer"


def test_rows_of_padding_follow_the_samples() -> None:
    batch = collate(SAMPLES[:2], num_rows=4)
    alone = collate(SAMPLES[:2])
    assert batch.tokens.shape == (4, 31)
    assert batch.tokens[:2].equal(alone.tokens)
    assert batch.loss_index.equal(alone.loss_index)
    assert batch.padding is not None
    assert batch.padding[2:].all()
    assert not batch.padding[0].any()


def train(config: RunConfig) -> tuple[list[StepOutcome], list[tuple[int, ...]]]:
    """Two steps, planned as the run plans them, and the shapes of this rank's micro-batches."""
    from megatron_gkd.train.plans import plan_of
    from megatron_gkd.train.step import student_batches

    found, shapes = [], []
    with megatron():
        trainer = Trainer(config)
        run = trainer.run
        for step in range(2):
            plan = plan_of(config, step, SAMPLES, run.student.layout, run.teacher.layout)
            shapes += [tuple(batch.tokens.shape) for batch in student_batches(plan, run.student)]
            found.append(trainer.carry_out(plan, config.distillation))
    return found, shapes


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS if FULL else ["PP2 VPP2"])
def test_the_numbers_are_those_of_samples(tmp_path_factory: pytest.TempPathFactory, layout: str) -> None:
    root = tmp_path_factory.mktemp("interleaved")
    models = *write_pair(root, "llama"), write_rows(root / "rows.jsonl", 8)
    world, sizes = LAYOUTS[layout]
    common: dict[str, Any] = dict(
        global_batch_size=9, max_length=64, lr=0.01, adam_eps=1e-4, lr_decay_style="constant", train_iters=9
    )
    ((expected, _),) = run_ranks(train, run_config(*models, **common), world=1)
    flags = {T[name]: value for name, value in sizes.items()}
    for found, shapes in run_ranks(
        train, run_config(*models, max_tokens_per_gpu=BUDGET, **common, **flags), world=world
    ):
        ((rows, length),) = set(shapes)
        assert rows * length <= BUDGET
        assert rows == 2, "several samples a micro-batch, and one of the nine beside a row of padding"
        for one, other in zip(found, expected, strict=True):
            assert (one.loss, one.grad_norm) == pytest.approx((other.loss, other.grad_norm), rel=1e-6)
            assert one.counts == other.counts
            if one.weights is not None:
                assert other.weights is not None
                assert max(float((one.weights[n] - w).abs().max()) for n, w in other.weights.items()) < 3e-6
