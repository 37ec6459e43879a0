"""A training step of adapters equals peft's on transformers' model, in every layout: loss, norm, every gradient and
every updated matrix of every adapter, of experts' too, and of every module that is trained whole beside them, within
what float32 does to peft's own step (tests/support/numerics.py: 1e-6 and less). Where peft does not load an adapter as
it is, the truth is the formula in plain torch (tests/support/dense_lora.py).

The adapter begins with a B that is not 0, from a file that peft has saved where it can; of a student with tied
embeddings and norms of heads, and of one without. Layouts that change who holds what (the gate has some), each padded
and packed; all of them, with all matrices adapted: test_every_layout.py.

Not covered: bf16, CUDA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.run import DistillationConfig, TrainingConfig
from megatron_gkd.model import lora
from megatron_gkd.train.adapting import lora_of
from megatron_gkd.weights import adapters
from tests.support.dense_lora import ALL, MIXTRAL, dense_lora_step, write_adapter
from tests.support.dense_step import DenseStep, Objective, differences
from tests.support.effort import FULL
from tests.support.peft_itself import need_peft, peft_steps, saved_by_peft
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_pair, write_rows

TOPK = 12
SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)])
OPTIMIZER: dict[str, Any] = dict(lr=0.01, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.02, adam_beta2=0.95)
MIDDLE = Objective(0.5, "full", 0.5)

# name -> (ranks, family, layout, adapter)
SOME: dict[str, Any] = dict(modules=("q_proj", "v_proj", "up_proj", "o_proj"), rslora=True, rank=3)
ATTENTION: dict[str, Any] = dict(modules=("q_proj", "k_proj", "v_proj", "o_proj"), rank=5)
VALUES: dict[str, Any] = dict(modules=("v_proj",), rank=2)  # of which half of the ranks have no row
EXPERTS: dict[str, Any] = dict(modules=ALL, rank=3)
WHOLE_EXPERTS: dict[str, Any] = dict(modules=("q_proj", "v_proj", *MIXTRAL), rank=4)
OF_MIXTRAL: dict[str, Any] = dict(modules=("q_proj", "w1", "w2"), rank=6)
MODULES = ("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")  # of Qwen3
WHOLE: dict[str, Any] = dict(modules=("q_proj", "down_proj"), rank=7, whole=MODULES)  # tied: the head too
APART: dict[str, Any] = dict(modules=("v_proj", "up_proj"), rank=8, whole=("lm_head", "input_layernorm"))
CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "TP2": (2, "qwen3", dict(tensor=2, sharded=False), {}),
    "TP2 SP, some": (2, "qwen3", dict(tensor=2, sequence=True, sharded=False), SOME),
    "PP2, tied modules": (2, "qwen3", dict(pipeline=2, sharded=False), WHOLE),
    "EP2, experts": (2, "mixtral", dict(expert=2, sharded=False, teacher_expert=1), WHOLE_EXPERTS),
    "TP4 above the KV heads": (4, "llama", dict(tensor=4, sequence=True, sharded=False), VALUES),
}
moe: dict[str, Any] = dict(sharded=False, teacher_expert=1, teacher_expert_tensor=1)
OF_FAULTS = CASES | {"ETP2 alone": (2, "mixtral", dict(expert_tensor=2, **moe), OF_MIXTRAL)}
if FULL:
    CASES |= {
        "EP2, experts of some layers": (2, "qwen3_moe", dict(expert=2, **moe), EXPERTS),
        "EP2, attention": (2, "qwen3_moe", dict(expert=2, **moe), ATTENTION),
        "EP2, Mixtral": (2, "mixtral", dict(expert=2, **moe), OF_MIXTRAL),
        "ETP2 TP2 SP": (2, "qwen3_moe", dict(tensor=2, sequence=True, expert_tensor=2, **moe), EXPERTS),
        "ETP2 alone": OF_FAULTS["ETP2 alone"],
        "EP2 TP2 SP": (2, "qwen3_moe", dict(tensor=2, sequence=True, expert=2, expert_tensor=1, **moe), EXPERTS),
        "EP2 ETP2 TP2 SP DP2": (
            4,
            "mixtral",
            dict(tensor=2, sequence=True, expert=2, expert_tensor=2, **moe),
            OF_MIXTRAL,
        ),
        "EP2 PP2, sharded optimizer": (4, "mixtral", dict(expert=2, pipeline=2) | moe | dict(sharded=True), OF_MIXTRAL),
        "TP2 SP, tied modules": (2, "qwen3", dict(tensor=2, sequence=True, sharded=False), WHOLE),
        "TP2, modules": (2, "llama", dict(tensor=2, sharded=False), APART),
        "PP2 VPP2, modules": (2, "llama", dict(pipeline=2, virtual=2, sharded=False), APART),
        "TP2 PP2, tied modules, sharded optimizer": (
            4,
            "qwen3",
            dict(tensor=2, pipeline=2, sequence=True, sharded=True),
            WHOLE,
        ),
        "DP2, sharded optimizer": (2, "llama", dict(sharded=True), {}),
        "TP2 SP PP2 VPP2": (4, "llama", dict(tensor=2, sequence=True, pipeline=2, virtual=2, sharded=True), {}),
        "TP2 SP CP2": (4, "qwen3", dict(tensor=2, sequence=True, context=2, sharded=False), SOME),
    }


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lora")


def config_of(root: Path, family: str, layout: dict[str, Any], of_adapter: dict[str, Any], **flags: Any) -> Any:
    student, teacher = write_pair(root, family)
    rows, adapter = root / "rows.jsonl", root / f"{family}_{of_adapter.get('rank', 'all')}"
    dataset = str(rows) if rows.exists() else write_rows(rows, 8)
    if not adapter.exists():
        write_adapter(adapter, student, **of_adapter)
    tuner = dict(tuner_type="lora", lora_rank=of_adapter.get("rank", 4), lora_alpha=8.0, adapters=str(adapter))
    tuner |= dict(use_rslora=of_adapter.get("rslora", False), target_modules=list(of_adapter.get("modules", ALL)))
    tuner |= dict(modules_to_save=list(of_adapter.get("whole", ())))
    sizes = {T[name]: value for name, value in layout.items()}
    step = dict(micro_batch_size=1, global_batch_size=len(SAMPLES), train_iters=1)
    constant = dict(lr_decay_style="constant", lr_warmup_fraction=0.0)
    return run_config(student, teacher, dataset, **step, **constant, **OPTIMIZER, **sizes, **tuner | flags)


def step_of(trainer: Trainer, *, packing: bool, max_tokens: int = 24) -> StepOutcome:
    """One update, with the gradients of what is trained (none with a sharded optimizer)."""
    distillation = DistillationConfig(beta=MIDDLE.beta, sft_alpha=MIDDLE.sft_alpha)
    sizes: dict[str, Any] = dict(micro_batch_size=1, packing=True, max_tokens=max_tokens) if packing else {}
    sizes |= dict(with_gradients=not trainer.config.parallel.use_distributed_optimizer)
    return trainer.step(SAMPLES, distillation, **dict(micro_batch_size=2) | sizes)


def faults_of(outcome: StepOutcome, expected: DenseStep) -> dict[str, float]:
    assert outcome.weights is not None
    numbers = outcome.loss, outcome.grad_norm, outcome.metrics
    return differences(*numbers, outcome.weights, expected, outcome.gradients)


def frozen_is_untouched(trainer: Trainer, before: dict[str, torch.Tensor]) -> list[str]:
    """What of the base has changed, or has memory for training."""
    student = trainer.run.student
    named = [(name, p) for chunk in student.models for name, p in chunk.named_parameters()]
    held = {id(p) for group in student.optimizer.param_groups for p in group["params"]}
    wrong = [name for name, p in named if name in before and not torch.equal(p, before[name])]
    wrong += [name for name, p in named if not p.requires_grad and (hasattr(p, "main_grad") or id(p) in held)]
    buffers = [b for chunk in student.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    in_buffers = sum(p.numel() for buffer in buffers for p in buffer.params)
    trained = sum(p.numel() for _, p in named if p.requires_grad)
    return wrong + ([] if in_buffers == trained else [f"{in_buffers} gradients of {trained} parameters"])


def run_step(config: Any, faults: Sequence[str] = ()) -> list[Any]:
    """A step padded, a step packed, one with each of the faults; and what of the base has changed."""
    with megatron():
        found = []
        trainer = Trainer(config)
        models = trainer.run.student.models
        before = {name: p.detach().clone() for m in models for name, p in m.named_parameters() if not p.requires_grad}
        for packing in (False, True):
            _rewind(trainer)
            found.append(step_of(trainer, packing=packing))
        for fault in faults:
            _rewind(trainer)
            with IN_THE_STEP[fault]:
                found.append(step_of(trainer, packing=False))
        wrong = frozen_is_untouched(trainer, before if len(models) == 1 else {})
        return [*found, wrong + new_adapters_differ(trainer)]


def new_adapters_differ(trainer: Trainer) -> list[str]:
    """Matrices of a new adapter that are not the ones that the seed and their names say, whatever the layout."""
    student, draw = (
        (trainer.run.student.models, trainer.run.architecture, trainer.run.student.groups),
        adapters.initial(5),
    )
    adapters.fill(*student, draw)
    named = [item for layer in adapters.collect(*student) for item in layer.items()]
    return [name for name, tensor in named if not torch.equal(tensor, draw(name, *tensor.shape))]


def _rewind(trainer: Trainer) -> None:
    trainer.rewind()
    if trainer.config.parallel.use_distributed_optimizer:
        trainer.run.student.optimizer.reload_model_params()


@pytest.fixture(scope="module")
def truths(root: Path) -> dict[str, DenseStep]:
    """By adapter: peft's step, or the formula's. The adapters that peft can save are then there by it, too."""
    need_peft()
    by_peft, by_formula = dict[str, Any](), dict[str, Any]()
    for _, family, layout, of_adapter in (CASES | OF_FAULTS).values():
        config = config_of(root, family, layout, of_adapter)
        arch = read_architecture(config.model.model)
        changed = adapters.what_peft_changes(arch, lora_of(config), config.tuner.target_modules)
        paths = config.model.model, config.teacher.teacher_model, config.tuner.adapters
        cell = (*paths, SAMPLES, MIDDLE, TrainingConfig(**OPTIMIZER))
        (by_formula if changed else by_peft)[config.tuner.adapters] = cell
    (steps,) = run_ranks(peft_steps, list(by_peft.values()), TOPK, world=1, fresh=True)
    found = {adapter: dense_lora_step(*cell, topk=TOPK) for adapter, cell in by_formula.items()}
    return found | dict(zip(by_peft, steps, strict=True))


# Faults in the forward pass, made after the model: each is a step of the layout's own test.
IN_THE_STEP: dict[str, Any] = {
    "alpha / r where sqrt(r) is asked for": patch.object(lora.Lora, "scale", property(lambda s: s.alpha / s.rank)),
    "a part of the sequence, repeated": patch.object(
        lora,
        "gather_from_sequence_parallel_region",
        lambda low, *, group, **_: low.repeat(group.size(), *[1] * (low.ndim - 1)),
    ),
    "a gradient of own rows alone": patch.object(
        lora,
        "gather_from_sequence_parallel_region",
        lambda low, *, group, **_: gather_from_sequence_parallel_region(
            low, tensor_parallel_output_grad=False, group=group
        ),
    ),
    "own columns alone": patch.object(lora, "reduce_from_tensor_model_parallel_region", lambda low, *, group: low),
}
FAULTS = {"TP2 SP, some": tuple(IN_THE_STEP)[:3], "TP2": tuple(IN_THE_STEP)[3:]}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_pefts(root: Path, truths: dict[str, DenseStep], case: str) -> None:
    """And one with a fault does not."""
    world, family, layout, of_adapter = CASES[case]
    config = config_of(root, family, layout, of_adapter)
    expected, by_peft = truths[config.tuner.adapters], saved_by_peft(config.tuner.adapters)
    assert expected.grad_norm > OPTIMIZER["clip_grad"]
    if by_peft.exists():
        config = config_of(root, family, layout, of_adapter, adapters=str(by_peft))
    for *steps, wrong in run_ranks(run_step, config, FAULTS.get(case, ()), world=world):
        assert not wrong
        for outcome in steps[:2]:
            assert not (found := faults_of(outcome, expected)), found
        for fault, outcome in zip(FAULTS.get(case, ()), steps[2:], strict=True):
            assert faults_of(outcome, expected), fault


# ---- faults ----------------------------------------------------------------------------------------------------------


def run_faulty_step(config: Any, fault: str) -> list[Any]:
    def as_dense(adapter: Any, mark: Any = lora.Adapter._mark) -> None:
        mark(adapter)
        for parameter in adapter.parameters():
            parameter.allreduce = True

    def counted_twice(adapter: Any, mark: Any = lora.Adapter._mark) -> None:
        mark(adapter)
        for parameter in adapter.parameters():
            parameter.shared = False

    faults: dict[str, Any] = {
        "not summed over the expert-tensor ranks": patch.object(lora, "_summed", lambda parameter, group: parameter),
        "summed as a dense layer's": patch.object(lora.Adapter, "_mark", as_dense),
        "a copy counted in the norm": patch.object(lora.Adapter, "_mark", counted_twice),
    }
    with faults[fault]:
        return run_step(config)


@pytest.mark.parametrize(
    ("fault", "case"),
    [
        ("summed as a dense layer's", "EP2, experts"),
        ("not summed over the expert-tensor ranks", "ETP2 alone"),
        ("a copy counted in the norm", "ETP2 alone"),
    ],
)
def test_planted_faults_are_found(root: Path, truths: dict[str, DenseStep], fault: str, case: str) -> None:
    world, family, layout, of_adapter = OF_FAULTS[case]
    config = config_of(root, family, layout, of_adapter)
    expected = truths[config.tuner.adapters]
    for outcome in run_ranks(run_faulty_step, config, fault, world=world)[0][:2]:
        assert faults_of(outcome, expected)
