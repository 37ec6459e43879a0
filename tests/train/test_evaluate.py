"""The evaluation's numbers equal a dense computation with transformers models, in every layout and batching.

Forward KL, reverse KL, symmetric JSD, negative log-likelihood and agreement, as means over all completion tokens of all
rows; full vocabulary, and on the teacher's top K. The number of rows divides by nothing: data-parallel ranks and
pipeline stages get batches with empty places, whose part in the means must be none.

Not covered: bf16, rows without completions (tests/data).
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import RunConfig
from megatron_gkd.train.evaluate import evaluate, run_evaluation
from tests.support.dense_step import all_logits, divergence
from tests.support.effort import FULL
from tests.support.numerics import EPS, FLOOR, Float64, within_reference_error
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.runs import command_line, metrics, train
from tests.support.trainers import PAIRS, build_run, write_pair, write_rows

pytestmark = pytest.mark.slow

NUM_ROWS, TOPK = 7, 9
ROUNDING = FLOOR * EPS * math.log(340)  # of log-probabilities, which are of this size
NAMES = ("forward_kl", "reverse_kl", "jsd", "nll", "agreement")
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "PP2": (2, dict(pipeline=2, teacher_tensor=2, teacher_pipeline=1)),
    "DP2": (2, dict(teacher_tensor=2)),
    "DP4": (4, {}),
    "TP2 SP": (2, dict(tensor=2, sequence=True, teacher_tensor=1)),
    "PP2 VPP2": (2, dict(pipeline=2, virtual=2)),
    "PP2 VPP2 DP2": (4, dict(pipeline=2, virtual=2)),
    "CP2": (2, dict(context=2, teacher_context=1)),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("evaluate")
    rows = write_rows(root / "held_out.jsonl", NUM_ROWS, seed=4)
    pairs = {family: write_pair(root, family) for family in PAIRS}
    return {
        family: dict(model=student, teacher_model=teacher, eval_dataset=rows)
        for family, (student, teacher) in pairs.items()
    }


@cache
def dense(
    student: str, teacher: str, rows: tuple[Any, ...], topk: int | None, dtype: torch.dtype = torch.float64
) -> dict[str, float]:
    """The means, by softmax over the token ids that both models have."""
    with Float64() if dtype == torch.float64 else nullcontext():
        logits = [all_logits(path, rows, dtype) for path in (student, teacher)]
    sums = dict.fromkeys(NAMES, 0.0)
    for row, ours, theirs in zip(rows, *logits, strict=True):
        size = min(ours.shape[1], theirs.shape[1])
        ours, theirs = ours[:, :size].double(), theirs[:, :size].double()
        labels = torch.tensor(row.completion_ids)
        sums["nll"] -= float(ours.log_softmax(-1).gather(1, labels[:, None]).sum())
        sums["agreement"] += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
        if topk:
            support = theirs.topk(topk, dim=-1).indices
            ours, theirs = ours.gather(1, support), theirs.gather(1, support)
        for name, beta in (("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.5)):
            sums[name] += float(divergence(theirs.log_softmax(-1), ours.log_softmax(-1), beta).sum())
    num_tokens = sum(len(row.completion_ids) for row in rows)
    return {name: total / num_tokens for name, total in sums.items()} | {"num_tokens": num_tokens}


def assert_dense(values: dict[str, float], student: Any, teacher: Any, rows: tuple[Any, ...], topk: int | None) -> None:
    truth, reference = (
        dense(str(student), str(teacher), rows, topk, dtype) for dtype in (torch.float64, torch.float32)
    )
    assert values.keys() == truth.keys()
    for name, value in values.items():
        within_reference_error(value, reference[name], truth[name], name)


def run_evaluations(configs: list[RunConfig]) -> list[tuple[dict[str, float], tuple[Any, ...]]]:
    """Per configuration the numbers, and the rows that they are of."""
    results = []
    with megatron():
        for config in configs:
            run = build_run(config, with_training_data=False)
            assert run.eval_rows is not None
            results.append((evaluate(run, run.eval_rows), tuple(run.eval_rows)))
    return results


def configs(inputs: dict[str, Any], layout: dict[str, Any]) -> list[RunConfig]:
    """Batches larger and smaller than the data, both signals; a loss temperature and a beta that must not matter. A
    layout has every second one, by turns, and all with GKD_TEST_FULL=1."""
    changes: list[dict[str, Any]] = [
        dict(global_batch_size=4, micro_batch_size=1),
        dict(global_batch_size=16, micro_batch_size=3, teacher_micro_batch_size=2, beta=1, loss_temperature=2),
        dict(global_batch_size=4, micro_batch_size=2, gkd_logits_topk=TOPK),
        dict(global_batch_size=4, micro_batch_size=2, packing=True, eval_samples=5),
    ]
    return [
        parse_run_config(command_line(**inputs, **layout, **change, report_to="none", device="cpu"), command="eval")
        for change in changes
    ]


@pytest.mark.parametrize(
    ("family", "layout"),
    [*(("qwen3", layout) for layout in LAYOUTS), ("llama", "PP2"), *([("llama", "DP2")] if FULL else [])],
)
def test_the_numbers_are_the_dense_ones(inputs: dict[str, dict[str, Any]], family: str, layout: str) -> None:
    world, flags = LAYOUTS[layout]
    turn = list(LAYOUTS).index(layout) + list(PAIRS).index(family)
    cells = [cell for index, cell in enumerate(configs(inputs[family], flags)) if FULL or (index + turn) % 2]
    for result in run_ranks(run_evaluations, cells, world=world):
        for config, (values, rows) in zip(cells, result, strict=True):
            assert len(rows) == (config.data.eval_samples or NUM_ROWS)
            models = inputs[family]["model"], inputs[family]["teacher_model"]
            assert_dense(values, *models, rows, config.distillation.gkd_logits_topk)
            assert values["forward_kl"] != pytest.approx(values["reverse_kl"], rel=0.01)


def test_a_model_against_itself_differs_by_nothing(inputs: dict[str, dict[str, Any]]) -> None:
    flags = inputs["qwen3"] | dict(teacher_model=inputs["qwen3"]["model"])
    for result in run_ranks(run_evaluations, configs(flags, dict(tensor=2, teacher_tensor=1)), world=2):
        for values, _ in result:
            assert values["agreement"] == 1.0
            assert max(values[name] for name in ("forward_kl", "reverse_kl", "jsd")) <= ROUNDING


def run_eval_command(config: RunConfig) -> dict[str, float]:
    with megatron():
        return run_evaluation(config)


def test_the_evaluation_of_a_run_is_that_of_its_student(tmp_path: Path, inputs: dict[str, dict[str, Any]]) -> None:
    """Step 0 is the student before training, then every --eval_steps, then the end: the exported student's."""
    flags = inputs["llama"] | dict(global_batch_size=4, report_to="none", device="cpu")
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    more = dict(dataset=rows, lmbda=0, train_iters=5, eval_steps=2, lr=5e-3, save=tmp_path / "run")
    run_dir = train(world=2, **flags, **more)
    steps = metrics(run_dir, first_step=0, file="evaluation.jsonl")
    assert [row["step"] for row in steps] == [0, 2, 4, 5]
    for step, model in ((steps[0], flags["model"]), (steps[-1], run_dir / "hf")):
        config = parse_run_config(command_line(**(flags | dict(model=model)), pipeline=2), command="eval")
        ((_, rows),) = run_ranks(run_evaluations, [config], world=2)[0]
        values = run_ranks(run_eval_command, config, world=2)
        assert values[0] == values[1]
        for found in (values[0], {name: step[name] for name in values[0]}):
            assert_dense(found, model, flags["teacher_model"], rows, None)
    assert steps[-1]["forward_kl"] < steps[0]["forward_kl"]


def evaluate_here(argv: list[str]) -> dict[str, float]:
    with megatron():
        return run_evaluation(parse_run_config(argv, command="eval"))


def test_a_student_alone_has_the_likelihood_of_the_text(inputs: dict[str, dict[str, Any]]) -> None:
    """Without a teacher, and without a `teacher_prompt` that would make it its own."""
    both = inputs["qwen3"] | dict(teacher_model=inputs["qwen3"]["model"], device="cpu")  # the same vocabulary
    alone = {name: value for name, value in both.items() if name != "teacher_model"}
    compared, by_itself = (run_ranks(evaluate_here, command_line(**flags), world=1)[0] for flags in (both, alone))
    assert set(by_itself) == {"nll", "num_tokens"}
    assert by_itself["num_tokens"] == compared["num_tokens"]
    assert by_itself["nll"] == pytest.approx(compared["nll"])
