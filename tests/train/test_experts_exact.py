"""A training step of a mixture of experts equals a plain transformers + torch implementation of it, in every layout.

As test_step_exact.py, with the gradient of every parameter by its HF name besides (with the distributed optimizer no
rank has whole gradients: there the updated weights stand for them). Student and teacher are Qwen3-MoE or Mixtral, and
differ in sizes, in the number of layers with experts and in layout: expert parallel, experts cut otherwise than the
dense layers, expert parallelism of one of the two alone. The first half of the Qwen3-MoE student's layers has no
experts, so that a pipeline stage has none.

Not covered: bf16, CUDA and the grouped products of Transformer Engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from megatron_gkd.config.run import DistillationConfig, RunConfig, TrainingConfig
from megatron_gkd.model import build as build_module
from megatron_gkd.model.router import Router
from megatron_gkd.records import Sample
from megatron_gkd.train import student as student_module
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_step import DenseStep, Objective, dense_step, differences
from tests.support.effort import FULL
from tests.support.numerics import LEAST_MARGIN, Float64, routing_margin, transformers_model
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import MOE_PAIRS, StepOutcome, T, Trainer, make_samples, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

TOPK = 12
SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)])
OPTIMIZER: dict[str, Any] = dict(lr=0.01, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.02, adam_beta2=0.95)
MIDDLE, AHEAD = Objective(0.5, "full", 0.5), Objective(0.0, "topk")
CELLS: list[tuple[Objective, dict[str, Any]]] = [
    (MIDDLE, dict(micro_batch_size=1)),
    *([(AHEAD, dict(micro_batch_size=2))] if FULL else []),
    (MIDDLE, dict(micro_batch_size=1, packing=True, max_tokens=24)),
]

# name -> (ranks, layout of student and teacher)
SPREAD = dict(tensor=2, sequence=True, expert=2, expert_tensor=1)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "EP2": (2, dict(expert=2, sharded=False, teacher_expert=1)),
    "EP2, sharded optimizer": (2, dict(expert=2, teacher_tensor=2, teacher_expert=2, teacher_expert_tensor=1)),
    "TP2 SP EP2": (2, dict(**SPREAD, sharded=False, teacher_tensor=1, teacher_expert=2, teacher_expert_tensor=1)),
    "TP2 SP ETP1": (2, dict(**SPREAD | dict(expert=1), sharded=False, teacher_expert_tensor=2)),
    "PP2 EP2": (4, dict(pipeline=2, expert=2, sharded=False, teacher_pipeline=1, teacher_expert=4)),
    "CP2 EP2": (2, dict(context=2, expert=2, sharded=False, teacher_context=1)),
}
MORE: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, dict(sharded=False)),
    "DP2": (2, dict(sharded=True)),
    "TP2 SP": (2, dict(tensor=2, sequence=True, sharded=False)),
    "TP2 SP EP2, sharded optimizer": (2, SPREAD),
    "TP2 SP ETP1, sharded optimizer": (2, SPREAD | dict(expert=1)),
    "ETP2": (2, dict(expert_tensor=2, sharded=False)),
    "PP2": (2, dict(pipeline=2, sharded=False)),
    "PP2 VPP2": (2, dict(pipeline=2, virtual=2, sharded=False)),
    "EP4": (4, dict(expert=4, sharded=False)),
    "EP4, sharded optimizer": (4, dict(expert=4)),
    "DP4 EP2": (4, dict(expert=2, sharded=False)),
    "DP4 EP2, sharded optimizer": (4, dict(expert=2)),
    "EP2 ETP2": (4, dict(expert=2, expert_tensor=2, sharded=False)),
    "TP2 SP DP2 EP4": (4, SPREAD | dict(expert=4, sharded=False)),
    "TP2 SP DP2 EP4, sharded optimizer": (4, SPREAD | dict(expert=4)),
    "TP2 SP DP2 EP2": (4, SPREAD | dict(sharded=False)),
    "TP2 SP DP2 EP2 ETP2": (4, SPREAD | dict(expert_tensor=2, sharded=False)),
    "TP4 SP EP2 ETP2": (4, dict(tensor=4, sequence=True, expert=2, expert_tensor=2, sharded=False, teacher_tensor=2)),
    "PP2 EP2, sharded optimizer": (4, dict(pipeline=2, expert=2)),
    "PP2 VPP2 EP2": (4, dict(pipeline=2, virtual=2, expert=2, sharded=False)),
    "PP2 TP2 SP EP2": (4, SPREAD | dict(pipeline=2, sharded=False)),
    "PP2 TP2 SP EP2, sharded optimizer": (4, SPREAD | dict(pipeline=2)),
    "CP2": (2, dict(context=2, sharded=False)),
    "CP2 DP2 EP4": (4, dict(context=2, expert=4, sharded=False)),
    "CP2 DP2 EP2, sharded optimizer": (4, dict(context=2, expert=2)),
    "TP2 SP CP2 EP2": (4, SPREAD | dict(context=2, sharded=False)),
    "TP2 SP CP2 EP2 ETP2": (4, SPREAD | dict(context=2, expert_tensor=2, sharded=False)),
    "CP2 PP2 EP2": (4, dict(context=2, pipeline=2, expert=2, sharded=False)),
}


def grid() -> list[tuple[str, str]]:
    """Family and layout; the gate has one of each kind."""
    gate = ("EP2", "TP2 SP EP2", "PP2 EP2, sharded optimizer")
    chosen = [*(("qwen3_moe", layout) for layout in gate), ("mixtral", "EP2")]
    if FULL:
        chosen = [(family, layout) for family in MOE_PAIRS for layout in LAYOUTS | MORE]
        chosen.remove(("mixtral", "PP2 VPP2"))  # its two layers are too few
        chosen.remove(("mixtral", "PP2 VPP2 EP2"))
    return chosen


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("experts")


def config_of(root: Path, family: str, layout: dict[str, Any], **flags: Any) -> RunConfig:
    student, teacher = write_pair(root, family)
    rows = root / "rows.jsonl"
    dataset = str(rows) if rows.exists() else write_rows(rows, 8)
    sizes = {T[name]: value for name, value in layout.items()}
    step = dict(micro_batch_size=1, global_batch_size=len(SAMPLES), train_iters=1)
    constant = dict(lr_decay_style="constant", lr_warmup_fraction=0.0)
    return run_config(student, teacher, dataset, **step, **constant, **OPTIMIZER, **sizes, **flags)


def distillation(objective: Objective) -> DistillationConfig:
    topk = None if objective.signal == "full" else TOPK
    return DistillationConfig(beta=objective.beta, sft_alpha=objective.sft_alpha, gkd_logits_topk=topk)


def run_cells(config: RunConfig, cells: list[tuple[Objective, dict[str, Any]]]) -> list[StepOutcome]:
    """One step per cell, each from the same state."""
    outcomes = []
    with megatron():
        trainer = Trainer(config)
        whole = not config.parallel.use_distributed_optimizer
        for objective, options in cells:
            trainer.rewind()
            outcomes.append(trainer.step(SAMPLES, distillation(objective), with_gradients=whole, **options))
    return outcomes


@cache
def truth(student: str, teacher: str, objective: Objective) -> DenseStep:
    for path in (student, teacher):
        check_margin(path, SAMPLES)
    return dense_step(student, teacher, SAMPLES, objective, TrainingConfig(**OPTIMIZER), topk=TOPK)


def check_margin(path: str, samples: tuple[Sample, ...]) -> None:
    """No token of the samples stands between two experts, where rounding would decide."""
    with Float64(), torch.no_grad():
        model = transformers_model(path, torch.float64)
        ids = [torch.tensor([[*sample.prompt_ids, *sample.completion_ids]]) for sample in samples]
        logits = [layer for row in ids for layer in model(row, output_router_logits=True).router_logits]
        margin = routing_margin([layer for layer in logits if layer is not None], model.config.num_experts_per_tok)
    assert margin > LEAST_MARGIN, f"{path}: {margin:.1e} between a chosen and another expert: take another seed"


def faults_of(config: RunConfig, results: list[list[StepOutcome]]) -> dict[int, dict[str, float]]:
    """What is wrong in which cell."""
    faults = {}
    for index, (objective, _) in enumerate(CELLS[: len(results[0])]):
        expected = truth(config.model.model, str(config.teacher.teacher_model), objective)
        assert expected.grad_norm > OPTIMIZER["clip_grad"]
        outcomes = [outcome[index] for outcome in results]
        assert len({(outcome.loss, outcome.grad_norm) for outcome in outcomes}) == 1, "ranks report different numbers"
        (written,) = [outcome for outcome in outcomes if outcome.weights is not None]
        assert written.weights is not None
        assert (written.gradients is None) == config.parallel.use_distributed_optimizer
        numbers = written.loss, written.grad_norm, written.metrics, written.weights
        wrong = differences(*numbers, expected, written.gradients)
        if wrong:
            faults[index] = wrong
    return faults


@pytest.mark.parametrize(("family", "layout"), grid(), ids=lambda value: str(value))
def test_a_step_equals_the_dense_step(root: Path, family: str, layout: str) -> None:
    world, options = (LAYOUTS | MORE)[layout]
    config = config_of(root, family, options)
    results = run_ranks(run_cells, config, CELLS, world=world)
    faults = faults_of(config, results)
    assert not faults, "\n".join(f"{CELLS[index]}\n    {wrong}" for index, wrong in faults.items())


# ---- experts without tokens ------------------------------------------------------------------------------------------


def write_idle(path: Path) -> str:
    """A Qwen3-MoE of 8 experts whose second half is never chosen: their logits are 0, and two of the first four, which
    are a, -a, b, -b, are above."""
    write_tiny_checkpoint(path, **MOE_PAIRS["qwen3_moe"][0] | dict(mlp_only_layers=[0], num_experts=8))
    file = path / "model.safetensors"
    with safe_open(file, "pt") as stored:
        tensors, metadata = {name: stored.get_tensor(name) for name in stored.keys()}, stored.metadata()  # noqa: SIM118
    for name, tensor in tensors.items():
        if name.endswith("mlp.gate.weight"):
            tensor[1], tensor[3] = -tensor[0], -tensor[2]
            tensor[4:] = 0
    save_file(tensors, file, metadata)
    return str(path)


def test_a_rank_whose_experts_get_no_token(root: Path) -> None:
    """It takes part in every exchange, and its experts have gradients of zero."""
    config = config_of(root, "qwen3_moe", dict(expert=2, sharded=False, teacher_expert=1))
    config = replace(config, model=replace(config.model, model=write_idle(root / "idle")))
    results = run_ranks(run_cells, config, CELLS[:1], world=2)
    assert not faults_of(config, results)
    gradients = results[0][0].gradients
    idle = [gradient for name, gradient in gradients.items() if re.search(r"experts\.[4-7]\.", name)]
    assert len(idle) == 3 * 4 * 3
    assert not any(gradient.any() for gradient in idle)


# ---- the comparison itself -------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, str]] = {  # name -> layout, what must tell it
    "the router's gradient dropped": ("EP2", r"gradient of .*mlp\.gate"),
    "the router's gradient of one tensor rank alone": ("TP2 SP EP2", r"gradient of .*mlp\.gate"),
    "experts' gradients summed over the wrong ranks": ("TP2 SP ETP1", r"gradient of .*\.experts\."),
    "experts' gradients times EP": ("EP2", r"gradient of .*\.experts\."),
}


@contextmanager
def fault(name: str) -> Iterator[None]:
    """One of `FAULTS`, in the program of this rank."""
    routing, finalize = Router.routing, student_module.finalize_model_grads

    def detached(self: Router, *args: Any, **kwargs: Any) -> Any:
        probs, routing_map = routing(self, *args, **kwargs)
        return probs.detach(), routing_map

    def not_summed(self: Router, *args: Any, **kwargs: Any) -> Any:
        self.weight.sequence_parallel = False
        return routing(self, *args, **kwargs)

    def times_two(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
        finalize(chunks, *args, **kwargs)
        for chunk in chunks:
            for parameter, tensor in chunk.named_parameters():
                if ".experts." in parameter:
                    tensor.main_grad.mul_(2)

    with pytest.MonkeyPatch.context() as patch:
        match list(FAULTS).index(name):
            case 0:
                patch.setattr(Router, "routing", detached)
            case 1:
                patch.setattr(Router, "routing", not_summed)
            case 2:
                patch.setattr(build_module, "_mark_experts", lambda model: None)
            case 3:
                patch.setattr(student_module, "finalize_model_grads", times_two)
        yield


def run_faulty(config: RunConfig, name: str) -> list[StepOutcome]:
    with fault(name):
        return run_cells(config, CELLS[:1])


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(root: Path, name: str) -> None:
    layout, telling = FAULTS[name]
    world, options = LAYOUTS[layout]
    config = config_of(root, "qwen3_moe", options)
    wrong = faults_of(config, run_ranks(run_faulty, config, name, world=world))[0]
    assert any(re.match(telling, found) for found in wrong), wrong
    assert "loss" not in wrong, "the value is right, and the gradient alone is wrong"
