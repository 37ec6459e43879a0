"""A training step of adapters equals the formula in plain torch, in every layout: loss, norm, every gradient and every
updated matrix of every adapter (tests/support/dense_lora.py), of experts' too, and of every module that is trained
whole beside them.

The adapter begins with a B that is not 0, from a file in peft's format; of a student with tied embeddings and norms of
heads, and of one without. Layouts of every kind that changes who holds what (the gate has some), each
padded and packed.

Not covered: bf16, CUDA.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from megatron_gkd.config.run import DistillationConfig, TrainingConfig
from megatron_gkd.model import lora
from megatron_gkd.parallel.together import from_first
from megatron_gkd.train.step import distill
from megatron_gkd.weights import adapters, whole_modules
from tests.support.dense_lora import ALL, dense_lora_step, write_adapter
from tests.support.dense_step import DenseStep, Objective, differences
from tests.support.effort import FULL
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
OF_MIXTRAL: dict[str, Any] = dict(modules=("q_proj", "w1", "w2"), rank=6)
MODULES = ("embed_tokens", "norm", "input_layernorm", "post_attention_layernorm", "q_norm", "k_norm")  # of Qwen3
WHOLE: dict[str, Any] = dict(modules=("q_proj", "down_proj"), rank=7, whole=MODULES)  # tied: the head too
APART: dict[str, Any] = dict(modules=("v_proj", "up_proj"), rank=8, whole=("lm_head", "input_layernorm"))
CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, Any]]] = {
    "TP2": (2, "qwen3", dict(tensor=2, sharded=False), {}),
    "TP2 SP, some": (2, "qwen3", dict(tensor=2, sequence=True, sharded=False), SOME),
    "PP2, tied modules": (2, "qwen3", dict(pipeline=2, sharded=False), WHOLE),
    "EP2, experts": (2, "qwen3_moe", dict(expert=2, sharded=False, teacher_expert=1), EXPERTS),
    "TP4 above the KV heads": (4, "llama", dict(tensor=4, sequence=True, sharded=False), VALUES),
}
moe: dict[str, Any] = dict(sharded=False, teacher_expert=1, teacher_expert_tensor=1)
OF_FAULTS = CASES | {"ETP2 alone": (2, "mixtral", dict(expert_tensor=2, **moe), OF_MIXTRAL)}
if FULL:
    CASES |= {
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
        "PP2": (2, "qwen3", dict(pipeline=2, sharded=False), {}),
        "one": (1, "llama", dict(sharded=False), {}),
        "TP2 SP": (2, "llama", dict(tensor=2, sequence=True, sharded=False), {}),
        "PP2 VPP2": (2, "llama", dict(pipeline=2, virtual=2, sharded=False), {}),
        "DP2, sharded optimizer": (2, "llama", dict(sharded=True), {}),
        "CP2": (2, "llama", dict(context=2, sharded=False), {}),
        "TP2 PP2": (4, "qwen3", dict(tensor=2, pipeline=2, sharded=False), {}),
        "TP2 SP PP2 VPP2": (4, "llama", dict(tensor=2, sequence=True, pipeline=2, virtual=2, sharded=True), {}),
        "TP2 SP CP2": (4, "qwen3", dict(tensor=2, sequence=True, context=2, sharded=False), SOME),
        "DP2 TP2": (4, "llama", dict(tensor=2, sharded=False), {}),
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


def step_of(
    trainer: Trainer, *, packing: bool, max_tokens: int = 24
) -> tuple[StepOutcome, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """One update: its numbers; gradients (of a sharded optimizer none) and matrices of the adapters."""
    run = trainer.run
    whole, gradients = not trainer.config.parallel.use_distributed_optimizer, dict[str, torch.Tensor]()

    def collected(read: Any = torch.Tensor.detach) -> dict[str, torch.Tensor]:
        student: Any = (run.student.models, run.architecture, run.student.groups)
        whole = trainer.config.tuner.modules_to_save
        layers = [*adapters.collect(*student, read=read)]
        of_modules = [*whole_modules.collect(*student, whole, read=lambda parameter: read(parameter.tensor))]
        return {name: tensor for layer in layers + from_first(of_modules) for name, tensor in layer.items()}

    def keep(*args: Any, **kwargs: Any) -> Any:
        def before_update(*_: object) -> bool:
            gradients.update(collected(lambda p: p.main_grad) if whole else {})
            return True

        return distill(*args, **kwargs | dict(loss_is_finite=before_update))

    distillation = DistillationConfig(beta=MIDDLE.beta, sft_alpha=MIDDLE.sft_alpha)
    sizes: dict[str, Any] = dict(micro_batch_size=1, packing=True, max_tokens=max_tokens) if packing else {}
    with patch("tests.support.trainers.distill", keep):
        outcome = trainer.step(SAMPLES, distillation, with_weights=False, **dict(micro_batch_size=2) | sizes)
    return outcome, gradients, collected()


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


def run_step(config: Any) -> list[Any]:
    with megatron():
        found = []
        trainer = Trainer(config)
        models = trainer.run.student.models
        before = {name: p.detach().clone() for m in models for name, p in m.named_parameters() if not p.requires_grad}
        for packing in (False, True):
            trainer.rewind()
            if trainer.config.parallel.use_distributed_optimizer:
                trainer.run.student.optimizer.reload_model_params()
            found.append(step_of(trainer, packing=packing))
        wrong = frozen_is_untouched(trainer, before if len(models) == 1 else {})
        return [*found, wrong]


@cache
def truth(student: str, teacher: str, adapter: str) -> DenseStep:
    return dense_lora_step(student, teacher, adapter, SAMPLES, MIDDLE, TrainingConfig(**OPTIMIZER), topk=TOPK)


@pytest.mark.parametrize("case", CASES)
def test_a_step_equals_the_formula(root: Path, case: str) -> None:
    world, family, layout, of_adapter = CASES[case]
    config = config_of(root, family, layout, of_adapter)
    expected = truth(config.model.model, config.teacher.teacher_model, config.tuner.adapters)
    assert expected.grad_norm > OPTIMIZER["clip_grad"]
    for *steps, wrong in run_ranks(run_step, config, world=world):
        assert not wrong
        for outcome, gradients, weights in steps:
            found = differences(outcome.loss, outcome.grad_norm, outcome.metrics, weights, expected, gradients or None)
            assert not found


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
def test_planted_faults_are_found(root: Path, fault: str, case: str) -> None:
    world, family, layout, of_adapter = OF_FAULTS[case]
    config = config_of(root, family, layout, of_adapter)
    expected = truth(config.model.model, config.teacher.teacher_model, config.tuner.adapters)
    for outcome, gradients, weights in run_ranks(run_faulty_step, config, fault, world=world)[0][:2]:
        assert differences(outcome.loss, outcome.grad_norm, outcome.metrics, weights, expected, gradients)
