"""Levers that need CUDA or a package: refused by name where it is missing, on by default where it is there, and handed
to megatron-core under its names.

What they do on a GPU is not covered. Recomputation, overlap and uneven pipelines have tests of their own in train/.
"""

from __future__ import annotations

import gc
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_gkd.config.no_effect import without_effect
from megatron_gkd.config.run import RunConfig, TrainingConfig
from megatron_gkd.errors import ConfigError, LayoutError, NotBuiltError
from megatron_gkd.model import levers
from megatron_gkd.model.build import build_model
from megatron_gkd.model.context_attention import ContextAttention
from megatron_gkd.model.levers import (
    Kind,
    check_contexts,
    check_student,
    optimizer_options,
    rehearsed_options,
    student_options,
    teacher_options,
)
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.groups import build_groups
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.rollout.vllm.local_server import as_flags
from megatron_gkd.train.fit import check_warmup
from megatron_gkd.train.garbage import Garbage
from megatron_gkd.train.rehearsal import without_peers
from tests.support.models import small
from tests.support.ranks_at_work import megatron


def config_of(**flags: Any) -> RunConfig:
    given = dict(model="S", teacher_model="T", dataset=["d"], lmbda=0.0, dtype="fp32")
    config = RunConfig.from_flat(given | flags)
    config.validate("train")
    return config


AWARE = dict(use_precision_aware_optimizer=True)
CUDA_ALONE: list[tuple[dict[str, Any], str]] = [
    (dict(attention_backend="flash"), "--attention_backend flash"),
    (dict(cp_comm_type=["a2a"]), "--cp_comm_type a2a"),
    (dict(cp_comm_type=["p2p", "all_gather"], context_parallel_size=2), "--cp_comm_type p2p all_gather"),
    (dict(apply_rope_fusion=True), "--apply_rope_fusion true"),
    (dict(gradient_accumulation_fusion=True), "--gradient_accumulation_fusion true"),
    (dict(bias_dropout_fusion=True), "--bias_dropout_fusion true"),
    (dict(bias_activation_fusion=True), "--bias_activation_fusion true"),
    (dict(moe_grouped_gemm=True), "--moe_grouped_gemm true"),
    (dict(moe_permute_fusion=True), "--moe_permute_fusion true"),
    (dict(empty_unused_memory_level=1), "--empty_unused_memory_level 1"),
    (AWARE, "--use_precision_aware_optimizer true"),
    (dict(AWARE, optimizer_cpu_offload=True), "--use_precision_aware_optimizer true"),
]


@pytest.mark.parametrize(("flags", "named"), CUDA_ALONE)
def test_what_needs_cuda_is_refused_on_a_cpu(flags: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named} needs CUDA, and this run is on a CPU"):
        student_options(config_of(**flags), "cpu")


@pytest.mark.parametrize(
    ("flags", "package"),
    [
        (dict(attention_backend="fused"), "transformer_engine"),
        (dict(cp_comm_type=["all_gather"]), "transformer_engine"),
        (dict(apply_rope_fusion=True), "transformer_engine"),
        (dict(gradient_accumulation_fusion=True), "fused_weight_gradient_mlp_cuda"),
        (AWARE, "transformer_engine"),
    ],
)
def test_what_needs_a_package(flags: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"needs the package {package}, which is not installed"):
        student_options(config_of(**flags), "cuda")
    monkeypatch.setattr(levers, "find_spec", lambda name: object())
    student_options(config_of(**flags), "cuda")


FUSIONS = (
    *("apply_rope_fusion", "gradient_accumulation_fusion", "bias_dropout_fusion", "bias_activation_fusion"),
    *("moe_grouped_gemm", "moe_permute_fusion"),
)


@pytest.mark.parametrize(
    ("kind", "installed", "on"),
    [
        ("cpu", True, ()),
        ("cuda", False, ("bias_dropout_fusion", "bias_activation_fusion")),
        ("cuda", True, FUSIONS),
    ],
)
def test_fusions_that_are_not_set(
    kind: Kind, installed: bool, on: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(levers, "find_spec", lambda name: object() if installed else None)
    options, teacher = student_options(config_of(), kind), teacher_options(config_of(), kind)
    assert {name for name in FUSIONS if getattr(options, name)} == set(on)
    assert {name for name in FUSIONS if getattr(teacher, name)} == set(on) - {"gradient_accumulation_fusion"}
    off = student_options(config_of(**dict.fromkeys(FUSIONS, False)), kind)
    assert not any(getattr(off, name) for name in FUSIONS)


def test_both_models_have_one_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "find_spec", lambda name: object())
    config = config_of(attention_backend="flash")
    for options in (student_options(config, "cuda"), teacher_options(config, "cuda")):
        assert options.transformer_fields()["attention_backend"] is AttnBackend.flash


# ---- how the ranks of a sequence exchange keys and values ------------------------------------------------------------


@pytest.mark.parametrize(("kinds", "told"), [(["a2a"], "a2a"), (["p2p", "a2a"] * 2, ["p2p", "a2a"] * 2)])
def test_both_models_exchange_alike(kinds: list[str], told: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levers, "find_spec", lambda name: object())
    config = config_of(cp_comm_type=kinds, context_parallel_size=2)
    for options in (student_options(config, "cuda"), teacher_options(config, "cuda")):
        assert options.transformer_fields()["cp_comm_type"] == told
    assert student_options(config_of(), "cpu").transformer_fields()["cp_comm_type"] == "p2p"
    assert rehearsed_options(config).cp_comm_type == ("p2p",)  # which moves as many bytes


@pytest.mark.parametrize(("family", "rank", "layers"), [("qwen3", 0, (1, 2)), ("olmoe", 2, (3, 4))])
def test_a_layer_has_its_own_of_a_list(
    family: str, rank: int, layers: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a stage of a pipeline, counted over the whole model."""
    kinds, seen = ("p2p", "a2a", "all_gather", "p2p"), []
    begin = ContextAttention.__init__

    def noted(self: Any, *args: Any, layer_number: int, cp_comm_type: str, **kwargs: Any) -> None:
        seen.append((layer_number, cp_comm_type))
        begin(self, *args, layer_number=layer_number, cp_comm_type=cp_comm_type, **kwargs)

    monkeypatch.setattr(ContextAttention, "__init__", noted)
    layout, options = Layout(context=2, pipeline=2), replace(ModelOptions.on("cpu"), cp_comm_type=kinds)
    with megatron(), without_peers(layout.world_size, rank):
        build_model(small(family), layout, build_groups(layout), options, dtype="fp32")
    assert seen == [(layer, kinds[layer - 1]) for layer in layers]


@pytest.mark.parametrize(
    ("flags", "family", "layout", "said"),
    [
        (dict(cp_comm_type=["p2p", "a2a"]), "qwen3", Layout(context=2), "2 values, and --model has 4 layers"),
        (dict(cp_comm_type=["a2a"]), "qwen3", Layout(context=4), "4 heads and 2 of keys and values on a rank"),
        (dict(cp_comm_type=["a2a"]), "qwen3", Layout(tensor=2, context=2), "2 heads and 1 of keys and values"),
        (dict(cp_comm_type=["a2a"]), "deepseek_v3", Layout(context=2), "latent attention .* or give --context"),
        (dict(cp_comm_type=["a2a"], tuner_type="lora"), "qwen3", Layout(context=2), "a student with adapters"),
    ],
)
def test_an_exchange_that_a_model_does_not_have(flags: dict[str, Any], family: str, layout: Layout, said: str) -> None:
    with pytest.raises((ConfigError, LayoutError), match=f"^--cp_comm_type .*{said}"):
        check_contexts(config_of(**flags), "model", small(family), layout)
    check_contexts(config_of(**flags), "model", small(family), Layout())
    check_contexts(config_of(), "model", small(family), layout)


def test_exchanges_that_divide() -> None:
    for kinds, layout in ((["a2a"], Layout(context=2)), (["p2p"] * 3 + ["a2a"], Layout(context=2))):
        check_contexts(config_of(cp_comm_type=kinds), "teacher_model", small(), layout)
    check_contexts(config_of(cp_comm_type=["all_gather"]), "model", small(), Layout(tensor=2, context=4))


@pytest.mark.parametrize(("kind", "too_old", "enough"), [("a2a", "2.9.0", "2.10"), ("all_gather", "2.17.1", "2.20.2")])
def test_packs_need_a_newer_transformer_engine(
    kind: str, too_old: str, enough: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = config_of(cp_comm_type=["p2p", kind, "p2p", "p2p"], packing=True)
    monkeypatch.setattr(levers, "version", lambda name: too_old)
    check_contexts(config_of(cp_comm_type=[kind]), "model", small(), Layout(context=2))
    with pytest.raises(ConfigError, match=f"beside --packing needs Transformer Engine 2.*{too_old[:3]}"):
        check_contexts(packed, "model", small(), Layout(context=2))
    monkeypatch.setattr(levers, "version", lambda name: enough)
    check_contexts(packed, "model", small(), Layout(context=2))


def test_two_levels_of_groups_are_not_built() -> None:
    with pytest.raises(NotBuiltError, match=r"--cp_comm_type a2a\+p2p \(its two levels of groups"):
        config_of(cp_comm_type=["a2a+p2p"])
    with pytest.raises(ConfigError, match="--cp_comm_type is empty"):
        config_of(cp_comm_type=[])


@pytest.mark.parametrize("command", ["train", "eval"])
def test_without_contexts_nothing_is_exchanged(command: Any) -> None:
    given: dict[str, Any] = dict(cp_comm_type=["a2a"], eval_dataset=["e"])
    assert ["cp_comm_type"] in without_effect(config_of(**given), command).values()
    for flag in ("context_parallel_size", "teacher_context_parallel_size"):
        assert ["cp_comm_type"] not in without_effect(config_of(**given, **{flag: 2}), command).values()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (dict(attention_softmax_in_fp32=False), "every attention here has its softmax in fp32"),
        (dict(masked_softmax_fusion=True), "no attention here has a separate masked softmax"),
        (dict(cross_entropy_loss_fusion=True, loss_path="logits"), "true means --loss_path fused here"),
        (dict(cross_entropy_loss_fusion=False), "false means --loss_path logits here"),
        (dict(exp_avg_dtype="bf16"), "--exp_avg_dtype is for --use_precision_aware_optimizer"),
        (dict(AWARE, use_distributed_optimizer=False), "needs --use_distributed_optimizer"),
        (dict(optimizer_cpu_offload=True), "--optimizer_cpu_offload needs --use_precision_aware_optimizer"),
        (dict(AWARE, optimizer_offload_fraction=0.5), "--optimizer_offload_fraction needs --optimizer_cpu_offload"),
        (dict(AWARE, overlap_cpu_optimizer_d2h_h2d=True), "_d2h_h2d needs --optimizer_cpu_offload"),
        (dict(manual_gc_interval=5), "--manual_gc_interval needs --manual_gc"),
        (dict(lr_warmup_iters=5, lr_warmup_fraction=0.1), "both say how long the warm-up is"),
        (dict(megatron_extra_kwargs="[1]"), "it must be a JSON object"),
        (dict(vllm_engine_kwargs='{"seed": 3}'), "has seed, which the run sets itself"),
    ],
)
def test_what_contradicts(flags: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_of(**flags)


def test_the_loss_says_what_is_fused() -> None:
    config_of(cross_entropy_loss_fusion=True)
    config_of(cross_entropy_loss_fusion=False, loss_path="logits")


def test_gradients_are_reduced_in_fp32_unless_not() -> None:
    assert student_options(config_of(), "cpu").ddp_fields()["grad_reduce_in_fp32"]
    narrow = config_of(accumulate_allreduce_grads_in_fp32=False, dtype="bf16")
    assert not student_options(narrow, "cpu").ddp_fields()["grad_reduce_in_fp32"]


def test_the_optimizer_is_told() -> None:
    assert optimizer_options(config_of()) == {}
    flags = dict(AWARE, exp_avg_dtype="fp8", main_grads_dtype="bf16", optimizer_cpu_offload=True)
    told = optimizer_options(config_of(**flags, optimizer_offload_fraction=0.5, overlap_cpu_optimizer_d2h_h2d=True))
    assert set(told) <= {item.name for item in fields(OptimizerConfig)}
    assert (told["exp_avg_dtype"], told["main_grads_dtype"]) == (torch.uint8, torch.bfloat16)
    assert (told["optimizer_offload_fraction"], told["overlap_cpu_optimizer_d2h_h2d"]) == (0.5, True)
    overlapped = config_of(overlap_grad_reduce=True, overlap_param_gather=True)
    assert optimizer_options(overlapped) == {"overlap_param_gather": True}


def test_determinism_on_cuda_needs_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(deterministic_mode=True)
    assert student_options(config, "cpu").deterministic_mode
    monkeypatch.delenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", raising=False)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    with pytest.raises(ConfigError, match="needs NVTE_ALLOW_NONDETERMINISTIC_ALGO=0 in the environment"):
        student_options(config, "cuda")
    monkeypatch.setenv("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    assert student_options(config, "cuda").deterministic_mode


# ---- further fields of megatron-core's -------------------------------------------------------------------------------


def test_further_fields_arrive() -> None:
    config = config_of(megatron_extra_kwargs='{"qk_clip": true}')
    check_student(config, small(), Layout(), "cpu")
    assert student_options(config, "cpu").transformer_fields()["qk_clip"] is True
    assert "qk_clip" not in teacher_options(config, "cpu").transformer_fields()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"qk_clap": true}', "has no field qk_clap; did you mean qk_clip"),
        ('{"zzzzzz": 1}', "has no field zzzzzz$"),
        ('{"overlap_grad_reduce": true}', "has no field overlap_grad_reduce"),
        ('{"recompute_granularity": "full"}', "recompute_granularity is set by the run; use its own flag"),
        ('{"window_size": [1, 2]}', "window_size is set by the run"),
        ('{"hidden_size": 3}', "hidden_size: megatron-core refuses them: .*multiple values"),
        ('{"moe_expert_capacity_factor": "x"}', "moe_expert_capacity_factor: megatron-core refuses them"),
    ],
)
def test_further_fields_that_are_none(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_student(config_of(megatron_extra_kwargs=text), small(), Layout(), "cpu")


# ---- small things ----------------------------------------------------------------------------------------------------


def test_warm_up_in_steps() -> None:
    assert TrainingConfig(lr_warmup_iters=7).warmup_steps(100) == 7
    assert TrainingConfig(lr_warmup_iters=0).warmup_steps(100) == 0
    assert TrainingConfig(lr_warmup_fraction=0.25).warmup_steps(100) == 25
    check_warmup(config_of(lr_warmup_iters=9), 9)
    with pytest.raises(ConfigError, match="--lr_warmup_iters 9: the run has 8 steps"):
        check_warmup(config_of(lr_warmup_iters=9), 8)


def test_garbage_is_collected_by_hand() -> None:
    collected: list[int] = []
    note = lambda phase, info: collected.append(0) if phase == "start" else None  # noqa: E731
    assert gc.isenabled()
    with Garbage(2) as garbage:
        assert not gc.isenabled()
        gc.callbacks.append(note)
        try:
            for step, number in ((1, 0), (2, 1), (3, 1), (4, 2)):
                garbage.after_step(step)
                assert len(collected) == number
        finally:
            gc.callbacks.remove(note)
    assert gc.isenabled()
    with Garbage(None) as garbage:
        assert gc.isenabled()
        garbage.after_step(1)


def test_arguments_of_engines_as_flags_of_servers() -> None:
    given = '{"enable_prefix_caching": false, "a": {"b": 1}}'
    config = config_of(vllm_enforce_eager=True, vllm_max_num_seqs=8, vllm_engine_kwargs=given)
    options = config.sampling.engine_options
    assert options == {"enable_prefix_caching": False, "a": {"b": 1}, "enforce_eager": True, "max_num_seqs": 8}
    flags = ["--no-enable-prefix-caching", "--a", '{"b": 1}', "--enforce-eager", "--max-num-seqs", "8"]
    assert as_flags(options) == flags
