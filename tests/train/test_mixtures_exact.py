"""A training step of Qwen2-MoE, OLMoE, GLM-4 MoE and DeepSeek-V3 equals transformers + torch, in layouts of every kind.

As test_experts_exact.py: loss, norm, updated weights, and the gradient of every parameter by its HF name. What these
families have beside it: shared experts with and without a gate of their own; routers of sigmoids with a correction bias
and groups of experts, where the bias stays to the last bit; norms over all heads, which tensor-parallel ranks share;
latent attention, under tensor, sequence and context parallelism; a part of each head that is turned.

Not covered: bf16, CUDA, Transformer Engine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import DistillationConfig, RunConfig, TrainingConfig
from megatron_gkd.model import heads_norm as heads_norm_module
from megatron_gkd.model.latent_attention import WholeLinear
from megatron_gkd.model.router import BiasedRouter, Router
from megatron_gkd.schedule import plan_step
from megatron_gkd.train import student as student_module
from tests.support.checkpoints import MIXTURES, write_tiny_checkpoint
from tests.support.dense_step import (
    DenseStep,
    Objective,
    all_logits,
    by_checkpoint_name,
    dense_step,
    differences,
    load,
    loss_and_metrics,
    stored_tensors,
)
from tests.support.effort import FULL
from tests.support.mixtures import margins_of
from tests.support.numerics import LEAST_MARGIN, Float64, error_ratio, transformers_model
from tests.support.ranks import run_ranks
from tests.support.ranks_at_work import megatron
from tests.support.trainers import StepOutcome, T, Trainer, make_samples, run_config, write_rows

pytestmark = pytest.mark.slow

SAMPLES = make_samples([(5, 7), (3, 1), (9, 12), (2, 0), (1, 4), (6, 9), (4, 3), (7, 5)])
OPTIMIZER: dict[str, Any] = dict(lr=0.01, adam_eps=1e-4, weight_decay=0.1, clip_grad=0.02, adam_beta2=0.95)
OBJECTIVE = Objective(0.5, "full", 0.5)
PADDED, PACKED = dict(micro_batch_size=2), dict(micro_batch_size=1, packing=True, max_tokens=24)

SPREAD = dict(tensor=2, sequence=True, expert=2, expert_tensor=1)
ONE_TEACHER = dict(teacher_tensor=1, teacher_expert=1)
LAYOUTS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {  # ranks, flags, how samples are batched
    "EP2": (2, dict(expert=2, teacher_expert=1), PADDED),
    "TP2 SP EP2": (2, SPREAD | dict(teacher_tensor=2, teacher_expert=2, teacher_expert_tensor=1), PACKED),
    "CP2 EP2": (2, dict(context=2, expert=2, teacher_context=1), PACKED),
    "TP2 SP EP1": (2, SPREAD | dict(expert=1) | ONE_TEACHER | dict(teacher_expert_tensor=1), PADDED),
    "PP2": (2, dict(pipeline=2), PACKED),
    "CP2 EP2, padded": (2, dict(context=2, expert=2), PADDED),
    "PP2 EP2": (4, dict(pipeline=2, expert=2, teacher_pipeline=1, teacher_expert=4), PADDED),
    "PP2 TP2 SP EP2": (4, SPREAD | dict(pipeline=2, teacher_pipeline=1), PACKED),
    "TP2 SP CP2 EP2": (4, SPREAD | dict(context=2), PACKED),
    "TP2 SP DP2 EP2 ETP2": (4, SPREAD | dict(expert_tensor=2), PADDED),
}
GATE = [*((family, layout) for family in MIXTURES for layout in ("EP2", "TP2 SP EP2")), ("deepseek_v3", "CP2 EP2")]
ALL = [(family, layout) for family in (*MIXTURES, "moonlight") for layout in LAYOUTS]
CELLS = ALL if FULL else GATE

SIZES: dict[str, Any] = dict(layers=2, hidden_size=32, ffn_hidden_size=48)
OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen2_moe": dict(mlp_only_layers=[0], moe_intermediate_size=24, shared_expert_intermediate_size=40),
    "glm4_moe": dict(head_dim=16),
}
# DeepSeek-V3 without a latent vector of queries and without groups, and with scaled positions.
MOONLIGHT: dict[str, Any] = dict(q_lora_rank=None, n_group=1, topk_group=1) | dict(
    rope=dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=8)
    | dict(mscale=1.0, mscale_all_dim=0.8)
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mixtures")


def config_of(root: Path, family: str, layout: str, **flags: Any) -> RunConfig:
    paths = []
    for name, vocab_size, seed in (("student", 340, 11), ("teacher", 300, 12)):
        path = root / f"{family}_{name}"
        options = SIZES | OF_FAMILY.get(family, {}) | dict(vocab_size=vocab_size, seed=seed)
        if not path.exists():
            kind = "deepseek_v3" if family == "moonlight" else family
            write_tiny_checkpoint(path, kind, **options | (MOONLIGHT if family == "moonlight" else {}))
        paths.append(str(path))
    rows = root / "rows.jsonl"
    dataset = str(rows) if rows.exists() else write_rows(rows, 8)
    sizes = {T[name]: value for name, value in LAYOUTS[layout][1].items()}
    step = dict(micro_batch_size=1, global_batch_size=len(SAMPLES), train_iters=1, use_distributed_optimizer=False)
    constant = dict(lr_decay_style="constant", lr_warmup_fraction=0.0)
    return run_config(*paths, dataset, **step, **constant, **OPTIMIZER, **sizes, **flags)


def run_cells(cells: list[tuple[RunConfig, dict[str, Any], str | None]]) -> list[StepOutcome]:
    """One step each, on fresh models, with a fault where one is named."""
    outcomes = []
    for config, batching, name in cells:
        with megatron(), fault(name):
            trainer = Trainer(config)
            distillation = DistillationConfig(beta=OBJECTIVE.beta, sft_alpha=OBJECTIVE.sft_alpha)
            outcomes.append(trainer.step(SAMPLES, distillation, with_gradients=True, **batching))
    return outcomes


@cache
def dense(student: str, teacher: str) -> DenseStep:
    for path in (student, teacher):
        with Float64(), torch.no_grad():
            model = transformers_model(path, torch.float64)
            with margins_of(model) as margins:
                for sample in SAMPLES:
                    model(torch.tensor([[*sample.prompt_ids, *sample.completion_ids]]))
        assert min(margins) > LEAST_MARGIN, f"{path}: {min(margins):.1e} between two experts: take another seed"
    return dense_step(student, teacher, SAMPLES, OBJECTIVE, TrainingConfig(**OPTIMIZER), topk=12)


def faults_of(config: RunConfig, outcomes: list[StepOutcome]) -> dict[str, float]:
    """What is further from the truth than rounding explains; of the ranks of one cell."""
    expected = dense(config.model.model, str(config.teacher.teacher_model))
    assert expected.grad_norm > OPTIMIZER["clip_grad"]
    assert len({(outcome.loss, outcome.grad_norm) for outcome in outcomes}) == 1, "ranks report different numbers"
    (written,) = [outcome for outcome in outcomes if outcome.weights is not None]
    assert written.weights is not None
    return differences(written.loss, written.grad_norm, written.metrics, written.weights, expected, written.gradients)


@pytest.fixture(scope="module")
def results(root: Path) -> dict[tuple[str, str], tuple[RunConfig, list[StepOutcome]]]:
    """Every cell, in one call of the ranks for each number of them."""
    found = {}
    for world in sorted({LAYOUTS[layout][0] for _, layout in CELLS}):
        keys = [(family, layout) for family, layout in CELLS if LAYOUTS[layout][0] == world]
        configs = [config_of(root, *key) for key in keys]
        cells = [(config, LAYOUTS[key[1]][2], None) for config, key in zip(configs, keys, strict=True)]
        per_rank = run_ranks(run_cells, cells, world=world)
        for key, config, outcomes in zip(keys, configs, zip(*per_rank, strict=True), strict=True):
            found[key] = (config, list(outcomes))
    return found


@pytest.mark.parametrize(("family", "layout"), CELLS, ids=lambda value: str(value))
def test_a_step_equals_the_dense_step(results: Any, family: str, layout: str) -> None:
    config, outcomes = results[family, layout]
    assert not (wrong := faults_of(config, outcomes)), wrong


# ---- routers ---------------------------------------------------------------------------------------------------------

COEFFICIENT = 0.3
ROUTERS: dict[str, dict[str, Any]] = {  # family -> flags
    "glm4_moe": dict(moe_aux_loss_coeff=COEFFICIENT),
    "qwen2_moe": dict(moe_aux_loss_coeff=COEFFICIENT),
    "deepseek_v3": dict(freeze_router=True),
    "olmoe": dict(freeze_router=True),
}


def balanced_gradients(
    student: str, teacher: str, micro_batches: list[list[int]], dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """By transformers: of the distillation and of the routers' loss, c * mean over micro-batches of sum over layers of
    E / (k T^2) sum_e count_e sum_t p_te, with p the scores over their sum, and the counts those of the top k of p."""
    model = load(student, dtype)
    loss, _ = loss_and_metrics(model, all_logits(teacher, SAMPLES, dtype), SAMPLES, OBJECTIVE, 12, None)
    top_k, is_sigmoid = model.config.num_experts_per_tok, hasattr(model.config, "n_routed_experts")
    logits: list[torch.Tensor] = []
    gates = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _, __, output: logits.append(output[0])) for gate in gates]
    total = torch.zeros((), dtype=dtype)
    for positions in micro_batches:
        logits.clear()
        for sample in (SAMPLES[position] for position in positions):
            model(torch.tensor([[*sample.prompt_ids, *sample.completion_ids][:-1]]))
        for layer in range(len(gates)):
            scores = torch.cat(logits[layer :: len(gates)])
            p = scores.sigmoid() if is_sigmoid else scores.softmax(-1)
            p = p / p.sum(-1, keepdim=True)
            counts = torch.zeros_like(p).scatter(1, p.topk(top_k).indices, 1.0).sum(0)
            total = total + p.shape[1] / (top_k * p.shape[0] ** 2) * (counts * p.sum(0)).sum()
    (loss + COEFFICIENT * total / len(micro_batches)).backward()
    for hook in hooks:
        hook.remove()
    gradients = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()}
    return by_checkpoint_name(model, gradients)


@pytest.mark.parametrize("family", ROUTERS)
def test_routers_are_balanced_or_frozen(faulty: Any, family: str) -> None:
    config, outcomes = faulty[family]
    written = outcomes[0]
    if "freeze_router" in ROUTERS[family]:
        before = load(config.model.model, torch.float32)
        stored = by_checkpoint_name(before, stored_tensors(before))
        same = {name for name, tensor in stored.items() if torch.equal(written.weights[name], tensor)}
        assert same == {name for name in stored if ".mlp.gate." in name} != set()
        return
    models = config.model.model, str(config.teacher.teacher_model)
    plan = plan_step(0, SAMPLES, data_parallel_size=2, **PADDED)
    micro_batches = [list(positions) for replica in plan.student for positions in replica]
    with Float64():
        truth = balanced_gradients(*models, micro_batches, torch.float64)
    reference = balanced_gradients(*models, micro_batches, torch.float32)
    ratios = {name: error_ratio(written.gradients[name], reference[name], value) for name, value in truth.items()}
    assert {name: ratio for name, ratio in ratios.items() if not ratio <= 1} == {}
    alone = dense(*models).gradients
    moved = [name for name in truth if name.endswith("gate.weight") and not torch.equal(truth[name], alone[name])]
    assert moved, "the routers' loss has no part in it"


# ---- the comparison itself -------------------------------------------------------------------------------------------

FAULTS: dict[str, tuple[str, str, str]] = {  # name -> family, layout, what must tell it
    "shared experts counted twice": ("qwen2_moe", "EP2", r"gradient of .*shared_expert\."),
    "the shared experts' gate of one rank alone": ("qwen2_moe", "TP2 SP EP2", r"gradient of .*shared_expert_gate"),
    "the router's gradient dropped": ("glm4_moe", "EP2", r"gradient of .*mlp\.gate\.weight"),
    "the correction bias moved": ("deepseek_v3", "EP2", r".*e_score_correction_bias"),
    "the correction bias left out": ("deepseek_v3", "EP2", r"loss"),
    "the latent vectors' gradient of one rank alone": ("deepseek_v3", "TP2 SP EP2", r"gradient of .*kv_a_proj"),
    "norms over a rank's own heads": ("olmoe", "TP2 SP EP2", r"loss"),
    "norms' gradient of a rank's own heads": ("olmoe", "TP2 SP EP2", r"gradient of .*[qk]_proj"),
}


@contextmanager
def fault(name: str | None) -> Iterator[None]:
    """One of `FAULTS`, in the program of this rank."""
    finalize, routing, whole = student_module.finalize_model_grads, Router.routing, WholeLinear.__init__

    def change(pattern: str, act: Any) -> Any:
        def finalized(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
            finalize(chunks, *args, **kwargs)
            for chunk in chunks:
                for parameter, tensor in chunk.named_parameters():
                    if re.search(pattern, parameter):
                        act(tensor)

        return finalized

    def detached(self: Router, *args: Any, **kwargs: Any) -> Any:
        probs, routing_map = routing(self, *args, **kwargs)
        return probs.detach(), routing_map

    def unbiased(self: Router, *args: Any, **kwargs: Any) -> Any:
        kept = self.expert_bias.detach().clone()
        self.expert_bias.zero_()
        probs, routing_map = routing(self, *args, **kwargs)
        self.expert_bias.copy_(kept)
        return probs, routing_map

    def unmarked(self: WholeLinear, *args: Any) -> None:
        whole(self, *args)
        self.weight.sequence_parallel = False

    with pytest.MonkeyPatch.context() as patch:
        match list(FAULTS).index(name) if name else None:
            case 0:
                times_two = change(r"shared_experts\.linear", lambda tensor: tensor.main_grad.mul_(2))
                patch.setattr(student_module, "finalize_model_grads", times_two)
            case 1:

                def not_summed(chunks: list[Any], *args: Any, **kwargs: Any) -> None:
                    for chunk in chunks:
                        for parameter, tensor in chunk.named_parameters():
                            if parameter.endswith("gate_weight"):
                                tensor.sequence_parallel = False
                    finalize(chunks, *args, **kwargs)

                patch.setattr(student_module, "finalize_model_grads", not_summed)
            case 2:
                patch.setattr(Router, "routing", detached)
            case 3:  # as megatron-core moves it
                moved = change("expert_bias", lambda tensor: tensor.data.add_(1e-3))
                patch.setattr(student_module, "finalize_model_grads", moved)
            case 4:
                patch.setattr(BiasedRouter, "routing", unbiased)
            case 5:
                patch.setattr(WholeLinear, "__init__", unmarked)
            case 6:
                patch.setattr(heads_norm_module, "reduce_from_tensor_model_parallel_region", lambda x, group: 2 * x)
            case 7:
                patch.setattr(heads_norm_module, "copy_to_tensor_model_parallel_region", lambda x, group: x)
        yield


@pytest.fixture(scope="module")
def faulty(root: Path) -> dict[str, tuple[RunConfig, list[StepOutcome]]]:
    """Steps with a fault, and those of ROUTERS without one."""
    configs = {name: config_of(root, family, layout) for name, (family, layout, _) in FAULTS.items()}
    cells = [(config, LAYOUTS[FAULTS[name][1]][2], name) for name, config in configs.items()]
    routers = {family: config_of(root, family, "EP2", **flags) for family, flags in ROUTERS.items()}
    per_rank = run_ranks(run_cells, cells + [(config, PADDED, None) for config in routers.values()], world=2)
    names = (configs | routers).items()
    return {
        name: (config, list(outcomes))
        for (name, config), outcomes in zip(names, zip(*per_rank, strict=True), strict=True)
    }


@pytest.mark.parametrize("name", FAULTS)
def test_planted_faults_are_found(faulty: Any, name: str) -> None:
    wrong = faults_of(*faulty[name])
    assert any(re.match(FAULTS[name][2], found) for found in wrong), wrong
