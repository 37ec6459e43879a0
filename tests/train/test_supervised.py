"""`--objective sft`: a step equals the dense cross entropy of a plain transformers implementation in every layout, and
a run resumes bit for bit, evaluates and exports as any other.

A teacher is neither given nor read: the configuration has none. Not covered: bf16, CUDA; the fused loss alone is in
tests/loss/test_fused_cross_entropy.py, what is refused in tests/config/test_run.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import TrainingConfig
from megatron_gkd.errors import DataError
from megatron_gkd.observe.timers import PHASES
from megatron_gkd.observe.writers import read_rows
from megatron_gkd.schedule import plan_step
from megatron_gkd.train.evaluate import run_evaluation
from tests.support.checkpoint_runs import FLAGS, SAVED_AT, STEPS, assert_same_bits, checkpoint_of
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_step import Fault, Objective, dense_step, differences
from tests.support.effort import FULL
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line, metrics, train
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)], sources=("dataset",))
OPTIMIZER: dict[str, Any] = dict(lr=0.01, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.02, adam_beta2=0.95)
ALONE = Objective(0.0, sft_alpha=1.0, alone=True)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "DP2": (2, dict(sharded=True)),
    "TP2 PP2": (4, dict(tensor=2, pipeline=2)),
    "CP2": (2, dict(context=2)),
}
if FULL:
    LAYOUTS["TP2 SP"] = 2, dict(tensor=2, sequence=True)
# micro-batch size, fused, packed to so many tokens
CELLS = ((1, True, None), (4, True, None), (2, False, None), (1, True, 24))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("supervised")


def cells_of(layout: str) -> list[tuple[int, bool, int | None]]:
    """Every second one, by turns; with GKD_TEST_FULL=1 all."""
    turn = list(LAYOUTS).index(layout)
    return [cell for index, cell in enumerate(CELLS) if FULL or (index + turn) % 2 == 0]


def run_cells(config: Any, cells: list[tuple[int, bool, int | None]]) -> list[StepOutcome]:
    outcomes = []
    with megatron():
        trainer = Trainer(config)
        for size, fuse, max_tokens in cells:
            trainer.rewind()
            loss: Any = trainer.run.loss
            loss.fuse = fuse
            plan = plan_step(
                0,
                SAMPLES,
                data_parallel_size=trainer.run.student.layout.data,
                micro_batch_size=size,
                packing=max_tokens is not None,
                max_tokens=max_tokens,
            )
            outcomes.append(trainer.carry_out(plan, config.distillation))
    return outcomes


def config_of(root: Path, layout: dict[str, Any], family: str = "qwen3") -> Any:
    student, _ = write_pair(root, family)
    rows = write_rows(root / "rows.jsonl", 8)
    once = dict(global_batch_size=len(SAMPLES), train_iters=1, lr_decay_style="constant", lr_warmup_fraction=0.0)
    return run_config(student, None, rows, objective="sft", **once, **OPTIMIZER, **{T[n]: v for n, v in layout.items()})


def wrong(outcome: StepOutcome, student: str, objective: Objective = ALONE, fault: Fault | None = None) -> Any:
    """What is further from the dense step than rounding explains."""
    truth = dense_step(student, student, SAMPLES, objective, TrainingConfig(**OPTIMIZER), topk=4, fault=fault)
    assert outcome.weights is not None
    return differences(outcome.loss, outcome.grad_norm, outcome.metrics, outcome.weights, truth)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", ["qwen3", "llama"] if FULL else ["qwen3"])
def test_a_step_equals_the_dense_cross_entropy(root: Path, family: str, layout: str) -> None:
    world, options = LAYOUTS[layout]
    config = config_of(root, options, family)
    cells = cells_of(layout)
    for cell, outcomes in zip(cells, zip(*run_ranks(run_cells, config, cells, world=world), strict=True), strict=True):
        (written,) = [outcome for outcome in outcomes if outcome.weights is not None]
        assert {outcome.loss for outcome in outcomes} == {written.loss}
        assert written.metrics.keys() == {"loss", "cross_entropy"}
        assert not wrong(written, config.model.model), (layout, cell)


def test_a_wrong_dense_step_is_told_apart(root: Path) -> None:
    config = config_of(root, {})
    ((outcome,),) = run_ranks(run_cells, config, list(CELLS[:1]), world=1)
    student = config.model.model
    assert {"loss", "grad_norm"} <= wrong(outcome, student, fault="label_shift").keys()
    assert {"loss", "grad_norm"} <= wrong(outcome, student, fault="mean_per_sample").keys()
    assert {"loss", "grad_norm"} <= wrong(outcome, student, Objective(0.0, sft_alpha=1.001, alone=True)).keys()


@pytest.fixture(scope="module")
def inputs(root: Path) -> dict[str, Any]:
    return dict(
        model=write_tiny_checkpoint(
            root / "student", "qwen3", tied=True, layers=2, seed=1, hidden_size=32, ffn_hidden_size=48
        ),
        objective="sft",
        dataset=write_rows(root / "train.jsonl", 13),
        eval_dataset=write_rows(root / "held_out.jsonl", 5, seed=9),
    ) | {name: value for name, value in FLAGS.items() if name not in ("sft_alpha", "lmbda")}


def test_a_resumed_run_is_the_same_run(root: Path, inputs: dict[str, Any]) -> None:
    whole = train(world=2, **inputs, save=root / "whole", tensor=2)
    rows, held_out = metrics(whole), metrics(whole, first_step=0, file="evaluation.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["loss"] == row["cross_entropy"] for row in rows)
    assert_phases_add_up(whole)
    assert {name for row in held_out for name in row} == {"step", "nll", "num_tokens"}
    assert held_out[-1]["nll"] < held_out[0]["nll"]
    resumed = root / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "hf")
    shutil.rmtree(checkpoint_of(resumed, STEPS))
    (resumed / "checkpoints" / "latest").write_text(checkpoint_of(resumed).name)
    train(world=2, **inputs, save=resumed, load=resumed, tensor=2)
    assert_same_bits(resumed, whole, 1)
    teacher = inputs | dict(objective="gkd", teacher_model=inputs["model"], lmbda=0)
    with pytest.raises(RankFailureError, match=r"--objective sft \(saved\) -> gkd"):
        train(world=2, **teacher, save=root / "other", load=checkpoint_of(whole, SAVED_AT), tensor=2)


def assert_phases_add_up(run_dir: Path) -> None:
    """To 2 % of a step, of the best one: a busy machine may take any of them away between two phases."""
    shares = []
    for row in read_rows(run_dir / "metrics.jsonl"):
        assert sum(row.get(f"{name}_s", 0.0) for name in PHASES) == pytest.approx(row["step_time_s"], rel=1e-6)
        shares.append(row["other_s"] / row["step_time_s"])
    assert min(shares) < 0.02, shares


def evaluate_here(argv: list[str]) -> dict[str, float]:
    with megatron():
        return run_evaluation(parse_run_config(argv, command="eval"))


def test_eval_without_a_teacher_has_the_likelihood_alone(inputs: dict[str, Any]) -> None:
    shared = dict(model=inputs["model"], eval_dataset=inputs["eval_dataset"], device="cpu")
    alone, compared = (
        run_ranks(evaluate_here, command_line(**shared, **flags), world=1)[0]
        for flags in (dict(objective="sft"), dict(teacher_model=inputs["model"]))
    )
    assert alone.keys() == {"nll", "num_tokens"}
    assert alone["nll"] == pytest.approx(compared["nll"], rel=1e-6)


def test_rows_without_completions_are_refused(tmp_path: Path, inputs: dict[str, Any]) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "water"}\n')
    given = inputs | dict(dataset=tmp_path / "prompts.jsonl", save=tmp_path / "run")
    with pytest.raises(RankFailureError, match="--objective sft needs a completion in every row") as caught:
        train(**given)
    assert DataError.__name__ in str(caught.value)
