"""Teachers with a prompt of their own, and the student as its own teacher: steps equal the dense ones in every layout.

The truth is support/dense_step.py: transformers models, one process, the teacher's logits at its own prompt and without
a graph. For self-distillation teacher and student are one checkpoint there. Every sample but two has a teacher's
prompt, some longer, some shorter than its own, so the two plans order the samples differently. A second step from the
weights that the first one left shows that the teacher follows.

Also whole runs: refusals, evaluation. Not covered: bf16, CUDA; teacher servers with such prompts
(teacher/test_served.py); sampling (test_on_policy.py).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import TrainingConfig
from megatron_gkd.records import Sample
from megatron_gkd.schedule import plan_step
from megatron_gkd.train.evaluate import evaluate
from megatron_gkd.train.step import teacher_signals
from tests.support.dense_step import (
    DenseStep,
    Fault,
    Objective,
    all_logits,
    dense_step,
    differences,
    divergence,
    load,
    wrong_numbers,
)
from tests.support.effort import FULL
from tests.support.numerics import Float64, within_reference_error
from tests.support.ranks import RankFailureError, run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import (
    PAIRS,
    StepOutcome,
    T,
    Trainer,
    build_run,
    make_samples,
    run_config,
    write_pair,
    write_rows,
)
from tests.train.test_step_exact import OPTIMIZER, TOPK, Cell

pytestmark = pytest.mark.slow

LENGTHS = [(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)]
TEACHER_PROMPTS = [11, 20, 2, 3, None, 6, 17, None]  # tokens
MAX_PACKED_TOKENS = 28


def with_teacher_prompts(samples: tuple[Sample, ...]) -> tuple[Sample, ...]:
    """Other tokens than the student's, of the lengths above."""
    prompts = make_samples([(n or 1, 0) for n in TEACHER_PROMPTS], seed=11)
    return tuple(
        replace(sample, teacher_prompt_ids=None if n is None else prompt.prompt_ids)
        for sample, prompt, n in zip(samples, prompts, TEACHER_PROMPTS, strict=True)
    )


SAMPLES = with_teacher_prompts(make_samples(LENGTHS))

CELLS = [
    Cell(Objective(0.5, "full", 0.5), 1, "fused"),
    Cell(Objective(1.0, "full"), 2, "logits"),
    Cell(Objective(0.5, "full", 0.5), 1, "fused", packing=True),
    Cell(Objective(0.0, "topk"), 2, "fused"),
    Cell(Objective(0.5, "bucket", 0.5), 1, "logits"),
    Cell(Objective(0.0, "topk"), 1, "fused", packing=True),
]


def cells_of(layout: str) -> list[Cell]:
    """The first one, and of the others every third, by turns; with GKD_TEST_FULL=1 all."""
    turn = list(LAYOUTS).index(layout)
    return [cell for index, cell in enumerate(CELLS) if FULL or index == 0 or (index + turn) % 3 == 0]


# (name, teacher is the student) -> (ranks, layout)
LAYOUTS: dict[str, tuple[int, bool, dict[str, Any]]] = {
    "other, TP1": (1, False, {}),
    "other, TP2 and PP2": (2, False, dict(tensor=2, teacher_tensor=1, teacher_pipeline=2)),
    "other, PP2 and TP2": (2, False, dict(pipeline=2, teacher_tensor=2, teacher_pipeline=1)),
    "other, DP2": (2, False, {}),
    "self, TP1": (1, True, {}),
    "self, TP2 SP": (2, True, dict(tensor=2, sequence=True)),
    "self, PP2": (2, True, dict(pipeline=2)),
    "self, PP2 VPP2": (2, True, dict(pipeline=2, virtual=2)),
    "self, DP2": (2, True, dict(sharded=True)),
    "self, CP2": (2, True, dict(context=2)),
}
# Each layout with one of the two models, by turns; with GKD_TEST_FULL=1 with both.
FAMILY_AND_LAYOUT = [
    (family, layout)
    for number, layout in enumerate(LAYOUTS)
    for turn, family in enumerate(PAIRS)
    if FULL or number % 2 == turn
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("privileged")


def config_of(root: Path, family: str, *, own: bool, **flags: Any) -> Any:
    student, teacher = write_pair(root, family)
    rows = root / "rows.jsonl"
    dataset = str(rows) if rows.exists() else write_rows(rows, 8, teacher_prompts=True)
    common: dict[str, Any] = dict(
        micro_batch_size=1,
        global_batch_size=len(SAMPLES),
        train_iters=1,
        lr_decay_style="constant",
        lr_warmup_fraction=0.0,
    )
    named = {T.get(name, name): value for name, value in flags.items()}
    return run_config(student, None if own else teacher, dataset, **(common | OPTIMIZER | named))


def run_cells(config: Any, cells: list[Cell]) -> list[list[StepOutcome]]:
    """Per cell one step from the initial state, and a second one of the first cell."""
    outcomes = []
    with megatron():
        trainer = Trainer(config)
        for index, cell in enumerate(cells):
            trainer.rewind()
            outcomes.append(
                [
                    trainer.step(
                        SAMPLES,
                        cell.distillation(),
                        micro_batch_size=cell.micro_batch_size,
                        packing=cell.packing,
                        max_tokens=MAX_PACKED_TOKENS if cell.packing else None,
                    )
                    for _ in range(2 if index == 0 else 1)
                ]
            )
    return outcomes


@cache
def truth(student: str, teacher: str, objective: Objective, fault: Fault | None = None) -> DenseStep:
    return dense_step(student, teacher, SAMPLES, objective, TrainingConfig(**OPTIMIZER), topk=TOPK, fault=fault)


def wrong_in(outcomes: list[StepOutcome], expected: DenseStep) -> dict[str, float]:
    """Differences of one step, of all ranks' outcomes."""
    assert len({(outcome.loss, outcome.grad_norm) for outcome in outcomes}) == 1, "ranks report different numbers"
    (written,) = [outcome for outcome in outcomes if outcome.weights is not None]
    assert written.weights is not None
    return differences(written.loss, written.grad_norm, written.metrics, written.weights, expected)


def save_with(path: Path, source: str, weights: dict[str, torch.Tensor]) -> str:
    """The checkpoint of other weights, as transformers writes it."""
    model = load(source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    model.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(("family", "layout"), FAMILY_AND_LAYOUT)
def test_a_step_equals_the_dense_step(root: Path, tmp_path: Path, family: str, layout: str) -> None:
    world, own, flags = LAYOUTS[layout]
    config = config_of(root, family, own=own, **flags)
    cells = cells_of(layout)
    results = run_ranks(run_cells, config, cells, world=world)
    student, other = write_pair(root, family)
    teacher = student if own else other
    faults = {}
    for index, cell in enumerate(cells):
        expected = truth(student, teacher, cell.objective)
        if wrong := wrong_in([outcome[index][0] for outcome in results], expected):
            faults[cell] = wrong
    assert not faults, "\n".join(f"{cell}\n    {wrong}" for cell, wrong in faults.items())
    # The second step, against a dense one from the weights after the first: a teacher that stayed behind is found.
    firsts, seconds = ([outcome[0][number] for outcome in results] for number in (0, 1))
    (weights,) = [outcome.weights for outcome in firsts if outcome.weights is not None]
    moved = save_with(tmp_path / "moved", student, weights)
    second = truth(moved, moved if own else other, cells[0].objective)
    assert not wrong_numbers(seconds[0].loss, seconds[0].grad_norm, second)
    if own:
        stale = truth(moved, student, cells[0].objective)
        assert abs(stale.loss - second.loss) > 1e-3 * second.loss


def test_faults_are_told_apart(root: Path) -> None:
    """The student's prompt for the teacher, and a gradient through the teacher, both differ from the truth."""
    (student, other), objective = write_pair(root, "llama"), CELLS[0].objective
    for teacher, fault, telling in (
        (other, "students_prompt", {"loss", "grad_norm"}),
        (student, "students_prompt", {"loss", "grad_norm"}),
        (student, "attached_teacher", {"grad_norm", "lm_head.weight"}),
    ):
        right, wrong = truth(student, teacher, objective), truth(student, teacher, objective, fault)  # type: ignore[arg-type]
        found = differences(right.loss, right.grad_norm, right.metrics, right.weights, wrong)
        assert telling <= found.keys(), fault


# ---- the student's state --------------------------------------------------------------------------------------------


def look_at_a_self_teacher(config: Any) -> list[str]:
    """What is changed by asking a student for its signals."""
    changed = []
    with megatron():
        run = build_run(config)
        plan = plan_step(0, SAMPLES, data_parallel_size=run.student.layout.data, micro_batch_size=1)
        for training in (True, False):
            for model in run.student.models:
                model.train(training)
            before = [p.detach().clone() for chunk in run.student.chunks for p in chunk.parameters()]
            signals, _ = teacher_signals(run.teacher, plan)
            after = [p for chunk in run.student.chunks for p in chunk.parameters()]
            if any(module.training != training for model in run.student.models for module in model.modules()):
                changed.append(f"mode, was training {training}")
            if not all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
                changed.append("weights")
            if any(p.grad is not None or float(p.main_grad.abs().sum()) for p in after):
                changed.append("gradients")
        head = run.loss.teacher_head
        if head is not None:
            parameter = run.student.models[-1].head_weight()
            if head.requires_grad or head.data_ptr() != parameter.data_ptr():
                changed.append("the head is a copy, or carries a graph")
        elif run.student.groups.pp.rank() == run.student.layout.pipeline - 1:
            changed.append("no head")
        columns = [column for columns in signals._samples.values() for column in columns]
        if any(column.requires_grad for column in columns):
            changed.append("signals with a graph")
    return changed


@pytest.mark.parametrize("flags", [{}, dict(pipeline=2)], ids=["one", "PP2"])
def test_asking_the_student_changes_nothing(root: Path, flags: dict[str, Any]) -> None:
    config = config_of(root, "qwen3", own=True, **flags)
    for changed in run_ranks(look_at_a_self_teacher, config, world=2 if flags else 1):
        assert not changed


# ---- whole runs -----------------------------------------------------------------------------------------------------


def build(config: Any) -> None:
    with megatron():
        build_run(config)


def test_self_distillation_without_a_teacher_prompt_is_refused(root: Path) -> None:
    bare = write_rows(root / "bare.jsonl", 8)
    config = config_of(root, "qwen3", own=True)
    for data, purpose in (
        (replace(config.data, dataset=[bare]), "training"),
        (replace(config.data, eval_dataset=[bare]), "evaluation"),
    ):
        with pytest.raises(RankFailureError, match=rf"{purpose}: no row has a column `teacher_prompt`.*--teacher_mode"):
            run_ranks(build, replace(config, data=data), world=1)


def evaluations(configs: list[Any]) -> list[tuple[dict[str, float], tuple[Any, ...]]]:
    found = []
    with megatron():
        for config in configs:
            run = build_run(config, with_training_data=False)
            assert run.eval_rows is not None
            found.append((evaluate(run, run.eval_rows), tuple(run.eval_rows)))
    return found


@pytest.mark.parametrize("flags", [{}, dict(pipeline=2, virtual=2)], ids=["DP2", "PP2 VPP2"])
def test_evaluation_gives_the_teacher_its_prompt(root: Path, flags: dict[str, Any]) -> None:
    held_out = write_rows(root / "held_out.jsonl", 5, seed=3, teacher_prompts=True)
    configs = [
        config_of(root, "llama", own=own, eval_dataset=[held_out], global_batch_size=4, **flags)
        for own in (True, False)
    ]
    student, other = write_pair(root, "llama")
    for (values, rows), teacher in zip(run_ranks(evaluations, configs, world=2)[0], (student, other), strict=True):
        assert sum(row.teacher_prompt_ids is not None for row in rows) == 4
        with Float64():
            truth = forward_kl(student, teacher, rows, torch.float64)
        within_reference_error(values["forward_kl"], forward_kl(student, teacher, rows, torch.float32), truth)


def forward_kl(student: str, teacher: str, rows: tuple[Any, ...], dtype: torch.dtype) -> float:
    """Mean over the tokens, the teacher after its own prompts."""
    of_teacher = tuple(replace(row, prompt_ids=row.prompt_ids_for_teacher) for row in rows)
    total, tokens = 0.0, 0
    both = zip(all_logits(student, rows, dtype), all_logits(teacher, of_teacher, dtype), strict=True)
    for ours, theirs in both:
        size = min(ours.shape[1], theirs.shape[1])
        log_p, log_q = (logits[:, :size].double().log_softmax(-1) for logits in (theirs, ours))
        total += float(divergence(log_p, log_q, 0.0).sum())
        tokens += ours.shape[0]
    return total / tokens
