"""A step of five kinds of models equals the dense step in each combination of context, expert, tensor, pipeline and
virtual pipeline parallelism, with data parallelism beside it, on eight ranks.

Loss, norm, updated weights and the gradient of every parameter by its HF name, of Llama, Qwen3, Qwen3-MoE, Mixtral and
DeepSeek-V3 (latent attention), padded and packed by turns, of full training and of adapters of all matrices; the
teacher has another layout in half of them, and ranks of its own in the last three. The batch has a sample without a
completion and samples shorter than the ranks that share them: with one sample a replica, a replica and many
context-parallel ranks have nothing to learn from.

With GKD_TEST_FULL=1 alone; what the gate has of it is in test_step_exact.py, test_experts_exact.py,
test_mixtures_exact.py, and of adapters in test_lora_exact.py and test_lora_families.py, with the planted faults. Not
covered: CUDA, Transformer Engine, the distributed optimizer.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.run import DistillationConfig, RunConfig, TrainingConfig
from megatron_gkd.schedule import plan_step
from megatron_gkd.train.setup import TeacherRun, build
from megatron_gkd.train.step import teacher_signals
from megatron_gkd.weights.adapters import leaf_names
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_lora import adapted, dense_lora_step, write_adapter
from tests.support.dense_step import DenseStep, Objective, dense_step, differences
from tests.support.effort import FULL
from tests.support.mixtures import margins_of
from tests.support.numerics import LEAST_MARGIN, Float64, transformers_model
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not FULL, reason="GKD_TEST_FULL=1: eight ranks for minutes")]

SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)])
OPTIMIZER: dict[str, Any] = dict(lr=0.01, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.02, adam_beta2=0.95)
OBJECTIVE = Objective(0.5, "full", 0.5)
PADDED, PACKED = dict(micro_batch_size=1), dict(micro_batch_size=1, packing=True, max_tokens=24)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": dict(tied=True),
    "qwen3_moe": dict(mlp_only_layers=[0, 1], moe_intermediate_size=24),
    "mixtral": {},
    "deepseek_v3": {},
}
DENSE = ("llama", "qwen3")
SIZES: dict[str, Any] = dict(hidden_size=32, ffn_hidden_size=48)

# Of eight ranks; data parallelism fills them.
SPREAD: dict[str, Any] = dict(tensor=2, sequence=True)
LAYOUTS: dict[str, dict[str, Any]] = {
    "CP2": dict(context=2, teacher_context=4),
    "CP4": dict(context=4),
    "TP2 SP CP2": SPREAD | dict(context=2, teacher_tensor=1),
    "CP2 PP2": dict(context=2, pipeline=2, teacher_pipeline=1, teacher_context=1),
    "PP2 VPP2": dict(pipeline=2, virtual=2),
    "CP2 PP2 VPP2": dict(context=2, pipeline=2, virtual=2),
}
ONE_EACH: dict[str, Any] = dict(expert_tensor=1)
OF_EXPERTS: dict[str, dict[str, Any]] = {
    "EP2": dict(expert=2, teacher_expert=4),
    "EP4": dict(expert=4),
    "TP2 SP EP2": SPREAD | ONE_EACH | dict(expert=2),
    "EP2 PP2": dict(expert=2, pipeline=2, teacher_pipeline=1, teacher_expert=1),
    "CP2 EP2": dict(context=2, expert=2),
    "TP2 SP CP2 EP4": SPREAD | ONE_EACH | dict(context=2, expert=4),
    "CP2 PP2 EP4": dict(context=2, pipeline=2, expert=4),
    "PP2 VPP2 EP2": dict(pipeline=2, virtual=2, expert=2),
}
APART: dict[str, tuple[int, dict[str, Any]]] = {  # ranks of the teacher's own, flags
    "CP2 beside TP2 CP2": (4, dict(context=2, teacher_tensor=2, teacher_context=2)),
    "PP2 beside CP2 PP2": (4, dict(pipeline=2, teacher_pipeline=2, teacher_context=2)),
}
EXPERTS_APART = {
    "CP2 beside TP2 CP2": dict(expert=2, expert_tensor=1, teacher_expert=4, teacher_expert_tensor=1),
    "PP2 beside CP2 PP2": dict(expert=2, teacher_expert=1),
}
# Ten ranks.
WIDE: dict[str, Any] = dict(context=2, expert=2, expert_tensor=1, teacher_tensor=2, teacher_pipeline=2)
WIDE |= dict(teacher_context=2, teacher_expert=4, teacher_expert_tensor=1)


TRAINED = ("all weights", "adapters")


def cells() -> list[tuple[str, str, str]]:
    """Family, layout and what is trained."""
    return [
        (family, layout, trained)
        for family in FAMILIES
        for layout in (*LAYOUTS, *(() if family in DENSE else OF_EXPERTS), *APART)
        for trained in TRAINED
    ]


def batching(family: str, layout: str) -> dict[str, Any]:
    """Packed where a virtual pipeline is, else by turns."""
    number = list(FAMILIES).index(family) + list(LAYOUTS | OF_EXPERTS | APART).index(layout)
    return PACKED if "VPP" in layout or number % 2 else PADDED


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("layouts")


def config_of(root: Path, family: str, sizes: dict[str, Any], own: int = 0, trained: str = TRAINED[0]) -> RunConfig:
    paths = []
    for name, more, seed in (("student", dict(vocab_size=340, layers=4), 21), ("teacher", dict(layers=2), 22)):
        path = root / f"{family}_{name}"
        if not path.exists():
            of_family = {k: v for k, v in FAMILIES[family].items() if name == "student" or k != "mlp_only_layers"}
            write_tiny_checkpoint(path, family, seed=seed, **SIZES, **more, **of_family)
        paths.append(str(path))
    rows = root / "rows.jsonl"
    dataset = str(rows) if rows.exists() else write_rows(rows, 8)
    step = dict(micro_batch_size=1, global_batch_size=len(SAMPLES), train_iters=1, use_distributed_optimizer=False)
    constant = dict(lr_decay_style="constant", lr_warmup_fraction=0.0, sft_alpha=OBJECTIVE.sft_alpha)
    apart: dict[str, Any] = dict(teacher_placement="separate", teacher_world_size=own) if own else {}
    flags = {T.get(name, name): value for name, value in sizes.items()} | apart
    if trained == "adapters":
        adapter, modules = root / f"{family}_adapter", leaf_names(read_architecture(paths[0]))
        if not adapter.exists():
            write_adapter(adapter, paths[0], rank=3, modules=modules)
        flags |= dict(tuner_type="lora", lora_rank=3, lora_alpha=8.0, adapters=str(adapter))
    return run_config(*paths, dataset, **step, **constant, **OPTIMIZER, **flags)


def one_step_each(steps: list[tuple[RunConfig, dict[str, Any]]]) -> list[StepOutcome | None]:
    """Per configuration: the outcome, None on a rank that the teacher has to itself."""
    outcomes: list[StepOutcome | None] = []
    with megatron():
        for config, options in steps:
            run = build(config)
            student = run.student_layout if isinstance(run, TeacherRun) else run.student.layout
            plan = plan_step(
                0,
                SAMPLES,
                data_parallel_size=student.data,
                teacher_data_parallel_size=run.teacher.layout.data,
                **options,
            )
            if isinstance(run, TeacherRun):
                teacher_signals(run.teacher, plan)
                outcomes.append(None)
            else:
                distillation = DistillationConfig(beta=OBJECTIVE.beta, sft_alpha=OBJECTIVE.sft_alpha)
                outcomes.append(Trainer(config, run).carry_out(plan, distillation, with_gradients=True))
            run.teacher.close()
    return outcomes


@cache
def truth(student: str, teacher: str, adapter: str | None, has_experts: bool) -> DenseStep:
    for path in (student, teacher) if has_experts else ():
        with Float64(), torch.no_grad():
            model = transformers_model(path, torch.float64)
            if adapter is not None and path == student:
                adapted(model, adapter)
            with margins_of(model) as margins:
                for sample in SAMPLES:
                    model(torch.tensor([[*sample.prompt_ids, *sample.completion_ids]]))
        assert min(margins) > LEAST_MARGIN, f"{path}: {min(margins):.1e} between two experts: take another seed"
    training = TrainingConfig(**OPTIMIZER)
    if adapter is None:
        return dense_step(student, teacher, SAMPLES, OBJECTIVE, training, topk=12)
    return dense_lora_step(student, teacher, adapter, SAMPLES, OBJECTIVE, training, topk=12)


def faults_of(config: RunConfig, outcomes: list[StepOutcome], has_experts: bool) -> dict[str, float]:
    expected = truth(config.model.model, str(config.teacher.teacher_model), config.tuner.adapters, has_experts)
    assert expected.grad_norm > OPTIMIZER["clip_grad"]
    assert len({(outcome.loss, outcome.grad_norm) for outcome in outcomes}) == 1, "ranks report different numbers"
    written = next(outcome for outcome in outcomes if outcome.weights is not None)
    assert written.weights is not None
    assert written.gradients is not None
    return differences(written.loss, written.grad_norm, written.metrics, written.weights, expected, written.gradients)


def configured(root: Path, family: str, layout: str, trained: str) -> RunConfig:
    if layout in APART:
        own, sizes = APART[layout]
        return config_of(root, family, sizes | ({} if family in DENSE else EXPERTS_APART[layout]), own, trained)
    return config_of(root, family, (LAYOUTS | OF_EXPERTS)[layout], trained=trained)


@pytest.mark.parametrize(("family", "layout", "trained"), cells(), ids=lambda value: str(value))
def test_a_step_equals_the_dense_step(root: Path, family: str, layout: str, trained: str) -> None:
    config = configured(root, family, layout, trained)
    # A call for each cell: process groups end with it, and eight ranks with the groups of many cells have no core left.
    per_rank = run_ranks(one_step_each, [(config, batching(family, layout))], world=8)
    outcomes = [outcome for (outcome,) in per_rank if outcome is not None]
    assert len(outcomes) == 8 - APART.get(layout, (0,))[0]
    assert not (wrong := faults_of(config, outcomes, family not in DENSE)), wrong


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_a_teacher_of_four_kinds_of_parallelism_on_ranks_of_its_own(root: Path, family: str) -> None:
    """TP2 x PP2 x CP2 with EP4, beside a student of CP2 EP2."""
    config = config_of(root, family, WIDE, own=8)
    per_rank = run_ranks(one_step_each, [(config, PACKED)], world=10)
    outcomes = [outcome for (outcome,) in per_rank if outcome is not None]
    assert len(outcomes) == 2
    assert not (wrong := faults_of(config, outcomes, True)), wrong
