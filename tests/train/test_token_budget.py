"""`--max_tokens_per_gpu`: the numbers of a run without it, and what it is refused beside.

The plan's properties (no micro-batch above the budget, every sample once, as many micro-batches on every rank) are in
test_schedule.py. Not covered: how much faster it is.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.schedule import plan_step
from megatron_gkd.train.fit import check_batch, max_tokens, teacher_max_tokens
from megatron_gkd.train.setup import Run
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_pair, write_rows

# Nine, for two ranks.
SAMPLES = make_samples([(25, 7), (3, 11), (39, 12), (8, 24), (1, 4), (16, 9), (2, 0), (1, 2), (14, 4)])
BUDGET = 64
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "DP2": (2, {}),
    "TP2 SP": (2, dict(tensor=2, sequence=True)),
    "DP2 TP2 SP": (4, dict(tensor=2, sequence=True)),
    "DP2 PP2": (4, dict(pipeline=2)),
    "TP2 PP2": (4, dict(tensor=2, pipeline=2)),
    "DP4": (4, {}),
}


def train(config: RunConfig) -> tuple[list[StepOutcome], list[int]]:
    """Two steps padded and two packed, planned as the run plans them; and the tokens of this rank's micro-batches."""
    from megatron_gkd.train.step import student_batches

    sizes: list[int] = []
    with megatron():
        trainer = Trainer(config)
        run: Run = trainer.run
        layout, found = run.student.layout, []
        for packing in (False, True):
            trainer.rewind()
            budget = max_tokens(config, layout)
            for step in range(2):
                plan = plan_step(
                    step,
                    SAMPLES,
                    data_parallel_size=layout.data,
                    micro_batch_size=1,
                    teacher_data_parallel_size=run.teacher.layout.data,
                    teacher_max_tokens=teacher_max_tokens(config),
                    packing=packing and budget is not None,
                    max_tokens=budget,
                    multiple_of=layout.row_multiple,
                )
                sizes += [batch.tokens.numel() for batch in student_batches(plan, run.student)]
                found.append(trainer.carry_out(plan, config.distillation))
    return found, sizes


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS if FULL else ["DP2", "TP2 SP"])
def test_the_numbers_are_those_of_samples(tmp_path_factory: pytest.TempPathFactory, layout: str) -> None:
    root = tmp_path_factory.mktemp("budget")
    models = *write_pair(root, "qwen3"), write_rows(root / "rows.jsonl", 8)
    world, sizes = LAYOUTS[layout]
    common: dict[str, Any] = dict(
        global_batch_size=8, max_length=BUDGET, lr=0.01, adam_eps=1e-4, lr_decay_style="constant", train_iters=9
    )
    ((expected, _),) = run_ranks(train, run_config(*models, **common), world=1)
    flags = {T[name]: value for name, value in sizes.items()}
    for found, tokens in run_ranks(
        train, run_config(*models, max_tokens_per_gpu=BUDGET, **common, **flags), world=world
    ):
        assert max(tokens) <= BUDGET
        for one, other in zip(found, expected, strict=True):
            assert (one.loss, one.grad_norm) == pytest.approx((other.loss, other.grad_norm), rel=2e-6)
            assert one.counts == other.counts
            if one.weights is not None:
                assert other.weights is not None
                assert max(float((one.weights[n] - w).abs().max()) for n, w in other.weights.items()) < 3e-6


def config_of(**flags: Any) -> RunConfig:
    given = dict(model="S", teacher_model="T", dataset=["d"], lmbda=0.0, max_length=64, max_tokens_per_gpu=64)
    config = RunConfig.from_flat(given | flags)
    config.validate("train")
    return config


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(micro_batch_size=2), "both size a micro-batch"),
        (dict(max_tokens_per_gpu=63), "is below --max_length 64"),
    ],
)
def test_what_contradicts(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(**flags)


def test_what_does_not_fit_the_layout() -> None:
    check_batch(config_of(global_batch_size=5), Layout(data=4))  # any number, from one a rank on
    with pytest.raises(ConfigError, match="global_batch_size 3 cannot be shared by token count by 4"):
        check_batch(config_of(global_batch_size=3), Layout(data=4))
    check_batch(config_of(), Layout(pipeline=2, virtual_pipeline=2))
    check_batch(config_of(), Layout(tensor=3, sequence_parallel=True))
    with pytest.raises(ConfigError, match=r"lengths are multiples of 5 here .* and rows of --max_length 64 need 65"):
        check_batch(config_of(), Layout(tensor=5, sequence_parallel=True))


def test_the_teacher_has_the_budget_unless_it_is_told() -> None:
    assert teacher_max_tokens(config_of()) == 64
    assert teacher_max_tokens(config_of(teacher_micro_batch_tokens=9)) == 9
    assert teacher_max_tokens(config_of(teacher_micro_batch_size=3)) is None
