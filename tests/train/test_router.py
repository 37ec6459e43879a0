"""The routers' load-balancing loss, frozen routers and the metrics of their loads, against transformers + torch.

    loss of the step  +  c * mean over its micro-batches of  sum over layers of  E / (k T^2) sum_e count_e sum_t p_te

with every parameter's gradient by its HF name, in float64, for the micro-batches of the plan: padded and packed, cut
over tensor ranks, on later pipeline stages, one of padding alone. Loads are counted on the transformers model too.

Not covered: CUDA; more than one step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.transformer.moe.router import TopKRouter

from megatron_gkd.config.run import DistillationConfig, RunConfig
from megatron_gkd.data import collate as collate_module
from megatron_gkd.errors import ConfigError
from megatron_gkd.model.router import Router
from megatron_gkd.records import Sample
from megatron_gkd.schedule import plan_step
from megatron_gkd.train.inputs import read_inputs
from tests.support.checkpoints import write_tiny_checkpoint
from tests.support.dense_step import Objective, all_logits, by_checkpoint_name, load, loss_and_metrics
from tests.support.effort import FULL
from tests.support.numerics import Float64, error_ratio
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_pair, write_rows

pytestmark = pytest.mark.slow

OBJECTIVE = Objective(0.5, "full")
SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)])
SPREAD = dict(tensor=2, sequence=True, expert=2, expert_tensor=1, teacher_tensor=1, teacher_expert=1)
PADDED, LARGER = dict(micro_batch_size=2), dict(micro_batch_size=4)
PACKED = dict(micro_batch_size=1, packing=True, max_tokens=24)
THREE = make_samples([(5, 7), (6, 9), (9, 12)])  # packed for two replicas, one of four micro-batches has none of them
Steps = list[tuple[tuple[Sample, ...], dict[str, Any]]]
LAYOUTS: dict[str, tuple[int, dict[str, Any], Steps]] = {  # ranks, flags, steps
    "EP2": (2, dict(expert=2), [(SAMPLES, PADDED), (THREE, PACKED)]),
    "TP2 SP EP2": (2, SPREAD, [(SAMPLES, LARGER), *([(SAMPLES, PACKED)] if FULL else [])]),
    "PP2 TP2 SP EP2": (4, SPREAD | dict(pipeline=2, teacher_pipeline=1), [(SAMPLES, PADDED)]),
    "CP2 EP2": (2, dict(context=2, expert=2), [(SAMPLES, LARGER), (SAMPLES, PACKED)]),
}


class Balanced(NamedTuple):
    """A step by transformers and torch."""

    loss: float  # of the distillation alone
    gradients: dict[str, torch.Tensor]
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("router")


def config_of(root: Path, layout: dict[str, Any], **flags: Any) -> RunConfig:
    student, teacher = write_pair(root, "qwen3_moe")
    rows = root / "rows.jsonl"
    dataset = str(rows) if rows.exists() else write_rows(rows, 8)
    sizes = {T[name]: value for name, value in layout.items()}
    return run_config(student, teacher, dataset, train_iters=1, use_distributed_optimizer=False, **sizes, **flags)


@cache
def dense_balanced(
    student_path: str,
    teacher_path: str,
    coefficient: float,
    freeze: bool,
    samples: tuple[Sample, ...],
    micro_batches: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
) -> Balanced:
    """One step. The model's layers with experts route the inputs of a micro-batch, sample by sample."""
    student = load(student_path, dtype)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(not (freeze and name.endswith("mlp.gate.weight")))
    teacher = all_logits(teacher_path, samples, dtype)
    loss, _ = loss_and_metrics(student, teacher, samples, OBJECTIVE, 1, None)
    of_layers: Any = 0  # the losses, without coefficient, over all micro-batches
    loads = None
    for positions in micro_batches:
        rows = [torch.tensor([[*samples[p].prompt_ids, *samples[p].completion_ids][:-1]]) for p in positions]
        of_rows = [student(row, output_router_logits=True).router_logits for row in rows]
        probs = [torch.cat(layer).softmax(-1) for layer in zip(*of_rows, strict=True)]  # of each layer, [T, E]
        if not rows:
            continue
        counts = torch.stack([torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0).sum(0) for p in probs])
        factor = counts.shape[1] / (2 * probs[0].shape[0] ** 2)
        of_layers = of_layers + factor * torch.stack([(n * p.sum(0)).sum() for n, p in zip(counts, probs, strict=True)])
        loads = counts if loads is None else loads + counts
    assert loads is not None
    aux_losses = of_layers / len(micro_batches)
    (loss + coefficient * aux_losses.sum()).backward()
    named = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in student.named_parameters()}
    busiest = loads.amax(1) / loads.mean(1)
    entropies = torch.distributions.Categorical(loads).entropy() / math.log(loads.shape[1])
    first = student.config.num_hidden_layers - len(loads)  # all behind it have experts
    named_layers = range(first, first + len(loads))
    metrics = {
        **{f"moe/load/{layer}": float(load) for layer, load in zip(named_layers, busiest, strict=True)},
        **{f"moe/entropy/{layer}": float(entropy) for layer, entropy in zip(named_layers, entropies, strict=True)},
        "moe/load_max": float(busiest.max()),
        "moe/load_mean": float(busiest.mean()),
        "moe/idle_experts": float((loads == 0).double().mean()),
    }
    if coefficient:
        metrics["moe/aux_loss"] = float(aux_losses.detach().mean())
        metrics |= {
            f"moe/aux_loss/{layer}": float(x) for layer, x in zip(named_layers, aux_losses.tolist(), strict=True)
        }
    return Balanced(float(loss.detach()), by_checkpoint_name(student, named), metrics)


def run_steps(config: RunConfig, steps: Steps) -> list[tuple[StepOutcome, dict[str, float]]]:
    """Outcome and load metrics of each step, from the same state."""
    found = []
    with megatron():
        trainer = Trainer(config)
        for samples, options in steps:
            trainer.rewind()
            outcome = trainer.step(samples, DistillationConfig(beta=0.5), with_gradients=True, **options)
            found.append((outcome, trainer.run.student.routers.loads(torch.device("cpu"))))
    return found


def wrong_in(
    config: RunConfig, replicas: int, steps: Steps, results: list[list[tuple[StepOutcome, dict[str, float]]]]
) -> dict[str, float]:
    """What is further from the truth than rounding explains."""
    wrong: dict[str, float] = {}
    for index, (samples, options) in enumerate(steps):
        plan = plan_step(0, samples, data_parallel_size=replicas, **options)
        micro_batches = tuple(positions for replica in plan.student for positions in replica)
        assert (() in micro_batches) == (samples is THREE)
        models = config.model.model, str(config.teacher.teacher_model)
        step = *models, config.training.moe_aux_loss_coeff, config.model.freeze_router, samples, micro_batches
        with Float64():
            truth = dense_balanced(*step, torch.float64)
        reference = dense_balanced(*step, torch.float32)
        outcome, metrics = results[0][index]
        assert outcome.gradients is not None
        assert all(rank[index][1] == metrics for rank in results), "ranks report different loads"
        assert metrics.keys() == truth.metrics.keys()
        assert outcome.gradients.keys() == truth.gradients.keys()
        ratios = {"loss": error_ratio(outcome.loss, reference.loss, truth.loss)}
        for name, value in truth.metrics.items():
            ratios[name] = error_ratio(metrics[name], reference.metrics[name], value)
        for name, gradient in truth.gradients.items():
            ratios[name] = error_ratio(outcome.gradients[name], reference.gradients[name], gradient)
        wrong |= {
            f"{name}, {len(samples)} samples, {options}": ratio for name, ratio in ratios.items() if not ratio <= 1
        }
    return wrong


def replicas_of(layout: dict[str, Any], world: int) -> int:
    return world // (layout.get("tensor", 1) * layout.get("pipeline", 1) * layout.get("context", 1))


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_load_balancing_loss_has_its_weight(root: Path, name: str) -> None:
    world, layout, steps = LAYOUTS[name]
    config = config_of(root, layout, moe_aux_loss_coeff=0.3)
    results = run_ranks(run_steps, config, steps, world=world)
    assert not (wrong := wrong_in(config, replicas_of(layout, world), steps, results)), wrong


def test_a_frozen_router_stays_and_all_else_learns(root: Path) -> None:
    config = config_of(root, dict(expert=2), freeze_router=True, lr=0.1, lr_warmup_fraction=0.0)
    results = run_ranks(run_steps, config, [(SAMPLES, PADDED)], world=2)
    assert not (wrong := wrong_in(config, 2, [(SAMPLES, PADDED)], results)), wrong
    weights, before = results[0][0][0].weights, load(config.model.model)
    assert weights is not None
    same = {name for name, p in by_checkpoint_name(before, dict(before.named_parameters())).items()
            if torch.equal(weights[name], p)}  # fmt: skip
    assert same == {name for name in weights if name.endswith("mlp.gate.weight")}


# ---- the comparison itself -------------------------------------------------------------------------------------------

FAULTS = {"weighed by positions": "TP2 SP EP2", "padding counted": "EP2", "padding for tokens": "EP2"}


@contextmanager
def fault(name: str) -> Iterator[None]:
    """One of `FAULTS`, in the program of this rank."""
    padding = collate_module._padding
    with pytest.MonkeyPatch.context() as patch:
        match list(FAULTS).index(name):
            case 0:  # megatron-core's own
                patch.setattr(Router, "_apply_aux_loss", TopKRouter._apply_aux_loss)
            case 1:
                patch.setattr(collate_module, "_padding", lambda *args: torch.zeros_like(padding(*args)))
            case 2:
                patch.setattr(collate_module, "_padding", lambda *args: ~padding(*args))
        yield


def run_faulty(config: RunConfig, name: str, steps: Steps) -> list[tuple[StepOutcome, dict[str, float]]]:
    with fault(name):
        return run_steps(config, steps)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(root: Path, name: str) -> None:
    world, layout, (step, *_) = LAYOUTS[FAULTS[name]]
    config = config_of(root, layout, moe_aux_loss_coeff=0.3)
    results = run_ranks(run_faulty, config, name, [step], world=world)
    wrong = wrong_in(config, replicas_of(layout, world), [step], results)
    assert any("mlp.gate.weight" in what for what in wrong), wrong
    assert not any(what.startswith("loss,") for what in wrong)


# ---- types and refusals ----------------------------------------------------------------------------------------------


def bf16_types(config: RunConfig) -> tuple[set[torch.dtype], bool]:
    """(types that a bf16 model routes in, whether a step's numbers are finite)."""
    seen, routing = set[torch.dtype](), Router.routing

    def noted(self: Router, logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.add(logits.dtype)
        return routing(self, logits, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "routing", noted)
        ((outcome, _),) = run_steps(config, [(SAMPLES, PADDED)])
    finite = bool(torch.isfinite(torch.tensor([outcome.loss, outcome.grad_norm])).all())
    return seen, finite and outcome.grad_norm > 0


def test_a_bf16_model_routes_in_fp32(root: Path) -> None:
    config = config_of(root, dict(expert=2), moe_aux_loss_coeff=0.3, dtype="bf16")
    assert run_ranks(bf16_types, config, world=2) == [({torch.float32}, True)] * 2


def refusal(config: RunConfig) -> str:
    with megatron():
        try:
            read_inputs(config, 1)
        except ConfigError as error:
            return str(error)
    return "accepted"


@pytest.mark.parametrize("flags", [dict(freeze_router=True), dict(moe_aux_loss_coeff=0.1)], ids=lambda f: next(iter(f)))
def test_a_dense_student_has_no_router(root: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    dense = str(write_tiny_checkpoint(tmp_path / "dense", "llama", layers=2))
    config = run_config(dense, dense, write_rows(tmp_path / "rows.jsonl", 4), train_iters=1, **flags)
    assert run_ranks(refusal, config, world=1) == [
        f"--{next(iter(flags))} is for a mixture of experts, and a llama model has no router; leave it out"
    ]
