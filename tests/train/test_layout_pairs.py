"""Every pair of layouts: loss, gradient norm and the updated weights equal a dense transformers + torch step, with the
teacher on the student's ranks and on ranks of its own, for hidden-state and top-K signals.

Student TP1, TP2, PP2, TP2 x PP2, DP2 against teacher TP1, TP2, PP2, TP4, PP4, DP2, wherever both fit on 4 ranks; on
the same ranks the data-parallel sizes fill the world. Student and teacher differ in hidden size, depth and padded
vocabulary. The teacher's micro-batches are of other sizes than the student's (in half of the cells sized in tokens).
A pair of layouts has one of the two signals, in turn. On four ranks pairs are left out that stand already on two; on
ranks of its own a teacher that stands already on the student's has half of the students. The nightly run has all with
both. A signal's route is a pure function of the layouts, which
teacher/test_signals.py tests for all of them.

With context parallelism: a few pairs, on ranks of the teacher's own. On the same ranks: test_step_exact.py.

Not covered: more than one step (test_separate_runs.py), CUDA.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from megatron_gkd.config.run import RunConfig, TrainingConfig
from megatron_gkd.schedule import plan_step
from megatron_gkd.train.setup import TeacherRun, build
from megatron_gkd.train.step import teacher_signals
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_step import DenseStep, Objective, dense_step, differences
from tests.support.effort import FULL
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_rows

pytestmark = pytest.mark.slow

TOPK = 12
SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)])
OPTIMIZER: dict[str, Any] = dict(lr=0.01, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.02, adam_beta2=0.95)
SIGNALS = {"full": None, "topk": TOPK}

STUDENTS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "TP2 PP2": (2, 2), "DP2": (1, 1)}  # TP, PP; DP2: beside
TEACHERS = {"TP1": (1, 1), "TP2": (2, 1), "PP2": (1, 2), "TP4": (4, 1), "PP4": (1, 4), "DP2": (1, 1)}


def ranks_of(name: str, sizes: dict[str, tuple[int, int]]) -> int:
    tensor, pipeline = sizes[name]
    return tensor * pipeline * (2 if name == "DP2" else 1)


def colocated() -> dict[str, tuple[int, list[str]]]:
    """Student, world -> the teachers that fit on the same ranks. DP2 is there what TP1 is."""
    cases = {}
    for student in (name for name in STUDENTS if name != "DP2"):
        for world in (1, 2, 4):
            fit = [t for t in TEACHERS if world % ranks_of(t, TEACHERS) == 0 and t != "DP2"]
            if world == 4 and student != "TP2 PP2" and not FULL:
                fit = [t for t in fit if ranks_of(t, TEACHERS) == 4]
            if world % ranks_of(student, STUDENTS) == 0 and fit:
                cases[f"{student} of {world}"] = world, fit
    return cases


def separate() -> dict[str, tuple[int, list[str]]]:
    """Student, teacher's ranks -> the teachers of that size."""
    cases = {}
    for number, student in enumerate(STUDENTS):
        for own in (1, 2):
            fit = [t for t in TEACHERS if ranks_of(t, TEACHERS) == own]
            if not FULL:
                fit = [t for index, t in enumerate(fit) if t in ("TP1", "DP2") or index % 2 == number // 2 % 2]
            if ranks_of(student, STUDENTS) + own <= 4:
                cases[f"{student} beside {own}"] = ranks_of(student, STUDENTS) + own, fit
    return cases


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    root = tmp_path_factory.mktemp("pairs")
    student = write_tiny_checkpoint(
        root / "student", "qwen3", tied=True, vocab_size=340, layers=2, hidden_size=32, ffn_hidden_size=48, seed=1
    )
    teacher = write_tiny_checkpoint(
        root / "teacher", "llama", vocab_size=300, layers=4, hidden_size=48, ffn_hidden_size=64, seed=2
    )
    return str(student), str(teacher), write_rows(root / "rows.jsonl", 8)


def config_of(models: tuple[str, str, str], student: str, teacher: str, topk: int | None, **flags: Any) -> RunConfig:
    (tensor, pipeline), (teacher_tensor, teacher_pipeline) = STUDENTS[student], TEACHERS[teacher]
    sizes = dict(tensor=tensor, pipeline=pipeline, teacher_tensor=teacher_tensor, teacher_pipeline=teacher_pipeline)
    return run_config(
        *models,
        micro_batch_size=1,
        global_batch_size=len(SAMPLES),
        train_iters=1,
        lr_decay_style="constant",
        lr_warmup_fraction=0.0,
        sft_alpha=0.5,
        gkd_logits_topk=topk,
        **OPTIMIZER,
        **{T[name]: value for name, value in sizes.items()},
        **flags,
    )


def one_step_each(configs: list[RunConfig]) -> list[StepOutcome | None]:
    """Per configuration: the outcome, None on a rank that the teacher has to itself."""
    outcomes: list[StepOutcome | None] = []
    with megatron():
        for index, config in enumerate(configs):
            run = build(config)
            teacher_run = isinstance(run, TeacherRun)
            student = run.student_layout if isinstance(run, TeacherRun) else run.student.layout
            plan = plan_step(
                0,
                SAMPLES,
                data_parallel_size=student.data,
                micro_batch_size=1,
                teacher_data_parallel_size=run.teacher.layout.data,
                teacher_micro_batch_size=3,
                teacher_max_tokens=30 if index % 2 else None,
            )
            if teacher_run:
                teacher_signals(run.teacher, plan)
                outcomes.append(None)
            else:
                outcomes.append(Trainer(config, run).carry_out(plan, config.distillation))
            run.teacher.close()
    return outcomes


@cache
def truth(student: str, teacher: str, signal: str) -> DenseStep:
    objective = Objective(0.5, signal, 0.5)  # type: ignore[arg-type]
    return dense_step(student, teacher, SAMPLES, objective, TrainingConfig(**OPTIMIZER), topk=TOPK)


def check(models: tuple[str, str, str], student: str, world: int, teachers: list[str], **flags: Any) -> None:
    kinds = list(SIGNALS)
    cells = [
        (teacher, signal)
        for teacher in teachers
        for signal in (kinds if FULL else [kinds[(list(STUDENTS).index(student) + list(TEACHERS).index(teacher)) % 2]])
    ]
    configs = [config_of(models, student, teacher, SIGNALS[signal], **flags) for teacher, signal in cells]
    check_steps(models, configs, cells, world, flags.get("teacher_world_size", 0))


def check_steps(
    models: tuple[str, str, str], configs: list[RunConfig], cells: list[tuple[str, str]], world: int, own: int
) -> None:
    results = run_ranks(one_step_each, configs, world=world)
    faults = {}
    for index, (teacher, signal) in enumerate(cells):
        outcomes = [result[index] for result in results if result[index] is not None]
        assert len(outcomes) == world - own
        assert len({(outcome.loss, outcome.grad_norm) for outcome in outcomes}) == 1, "ranks report different numbers"
        (written,) = [outcome for outcome in outcomes if outcome.weights is not None]
        wrong = differences(
            written.loss,
            written.grad_norm,
            written.metrics,
            written.weights,
            truth(models[0], models[1], signal),
        )
        if wrong:
            faults[teacher, signal] = wrong
    assert not faults, "\n".join(f"{cell}\n    {wrong}" for cell, wrong in faults.items())


@pytest.mark.parametrize("case", colocated())
def test_on_the_same_ranks(models: tuple[str, str, str], case: str) -> None:
    world, teachers = colocated()[case]
    check(models, case.split(" of ")[0], world, teachers)


@pytest.mark.parametrize("case", separate())
def test_on_ranks_of_its_own(models: tuple[str, str, str], case: str) -> None:
    world, teachers = separate()[case]
    own = world - ranks_of(case.split(" beside ")[0], STUDENTS)
    check(
        models,
        case.split(" beside ")[0],
        world,
        teachers,
        teacher_placement="separate",
        teacher_world_size=own,
        signal_memory_gb=1e-6,  # 1000 bytes: some samples' signals are larger, most wait in host memory
    )


def test_weights_and_signals_in_host_memory_change_nothing(models: tuple[str, str, str]) -> None:
    check(models, "TP2", 2, ["PP2", "TP2"], offload_teacher_model=True, signal_memory_gb=1e-6)


# (ranks, the teacher's, layout, signal)
CONTEXT: dict[str, tuple[int, int, dict[str, Any], str]] = {
    "CP2 beside 1": (3, 1, dict(context=2, teacher_context=1), "full"),
}
if FULL:
    CONTEXT |= {
        "CP2 beside CP2": (4, 2, dict(context=2), "topk"),
        "DP2 beside CP2": (4, 2, dict(teacher_context=2), "full"),
        "CP2 beside TP2": (4, 2, dict(context=2, teacher_context=1, teacher_tensor=2), "topk"),
    }


@pytest.mark.parametrize("case", CONTEXT)
def test_context_parallelism_beside_a_teacher_on_ranks_of_its_own(models: tuple[str, str, str], case: str) -> None:
    world, own, layout, signal = CONTEXT[case]
    sizes = {T[name]: value for name, value in layout.items()}
    config = config_of(models, "TP1", "TP1", SIGNALS[signal], teacher_placement="separate", teacher_world_size=own)
    check_steps(models, [RunConfig.from_flat(config.to_flat() | sizes)], [(case, signal)], world, own)
