"""Every parameter name of both layer specs has one meaning; every other name is refused.

The TransformerEngine names come from reading megatron-core 0.16.1 (gpt_layer_specs.py), not from a model on a GPU.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_gkd.architecture import SUPPORTED_MODEL_TYPES
from megatron_gkd.errors import CheckpointError, NotBuiltError
from megatron_gkd.weights.chunks import ExpertRank, check_chunks
from megatron_gkd.weights.naming import (
    ROLES,
    ParsedName,
    Unit,
    hf_names,
    is_extra_state,
    is_ignored_hf_name,
    layer_roles,
    parse,
)
from tests.support.models import fake_chunk, small

BOTH = {
    "embedding.word_embeddings.weight": ("embedding", None),
    "output_layer.weight": ("head", None),
    "decoder.final_layernorm.weight": ("final_norm", None),
    "decoder.layers.3.self_attention.linear_qkv.weight": ("qkv", 3),
    "decoder.layers.3.self_attention.linear_qkv.bias": ("qkv_bias", 3),
    "decoder.layers.3.self_attention.q_layernorm.weight": ("query_norm", 3),
    "decoder.layers.3.self_attention.k_layernorm.weight": ("key_norm", 3),
    "decoder.layers.3.self_attention.linear_proj.weight": ("attention_output", 3),
    "decoder.layers.3.mlp.linear_fc1.weight": ("gate_up", 3),
    "decoder.layers.3.mlp.linear_fc2.weight": ("down", 3),
    "decoder.layers.3.mlp.router.weight": ("router", 3),
    "decoder.layers.3.mlp.router.expert_bias": ("correction_bias", 3),
    "decoder.layers.3.mlp.shared_experts.linear_fc1.weight": ("shared_gate_up", 3),
    "decoder.layers.3.mlp.shared_experts.linear_fc2.weight": ("shared_down", 3),
    "decoder.layers.3.mlp.shared_experts.gate_weight": ("shared_gate", 3),
    "decoder.layers.3.self_attention.q_layernorm.weight_over_heads": ("query_norm_over_heads", 3),
    "decoder.layers.3.self_attention.k_layernorm.weight_over_heads": ("key_norm_over_heads", 3),
    "decoder.layers.3.self_attention.linear_q_proj.weight": ("query", 3),
    "decoder.layers.3.self_attention.linear_q_down_proj.weight": ("query_down", 3),
    "decoder.layers.3.self_attention.linear_q_up_proj.weight": ("query_up", 3),
    "decoder.layers.3.self_attention.linear_kv_down_proj.weight": ("latent_down", 3),
    "decoder.layers.3.self_attention.kv_layernorm.weight": ("latent_norm", 3),
    "decoder.layers.3.self_attention.linear_kv_up_proj.weight": ("latent_up", 3),
}
EXPERTS = {
    "decoder.layers.3.mlp.experts.local_experts.17.linear_fc1.weight": ("expert_gate_up", 3, 17),
    "decoder.layers.3.mlp.experts.local_experts.0.linear_fc2.weight": ("expert_down", 3, 0),
    "decoder.layers.3.mlp.experts.linear_fc1.weight17": ("expert_gate_up", 3, 17),
    "decoder.layers.3.mlp.experts.linear_fc2.weight0": ("expert_down", 3, 0),
}
LOCAL = {
    "decoder.layers.12.input_layernorm.weight": ("attention_norm", 12),
    "decoder.layers.12.pre_mlp_layernorm.weight": ("mlp_norm", 12),
}
TRANSFORMER_ENGINE = {
    "decoder.layers.12.self_attention.linear_qkv.layer_norm_weight": ("attention_norm", 12),
    "decoder.layers.12.mlp.linear_fc1.layer_norm_weight": ("mlp_norm", 12),
}


@pytest.mark.parametrize(("name", "meaning"), (BOTH | LOCAL | TRANSFORMER_ENGINE).items())
def test_names_of_both_specs(name: str, meaning: tuple[str, int | None]) -> None:
    assert parse(name) == ParsedName(*meaning, None)


def test_the_table_has_no_name_that_this_file_does_not_know() -> None:
    tested = {name.removeprefix("decoder.layers.").lstrip("0123456789.") for name in BOTH | LOCAL | TRANSFORMER_ENGINE}
    tested |= {
        re.sub(r"(?<=local_experts\.)\d+|\d+$", "{expert}", name[len("decoder.layers.3.") :]) for name in EXPERTS
    }
    assert tested == {name for role in ROLES.values() for name in role.core_names}


@pytest.mark.parametrize(("name", "meaning"), EXPERTS.items())
def test_names_of_experts(name: str, meaning: tuple[str, int, int]) -> None:
    assert parse(name) == ParsedName(*meaning)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.mlp.linear_fc1.weight7",
        "decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight2",
        "decoder.layers.0.mlp.experts.local_experts.linear_fc1.weight",
        "decoder.layers.0.self_attention.linear_proj.bias",
        "decoder.layers.0.mlp.linear_fc1.bias",
        "decoder.layers.0.input_layernorm.bias",
        "decoder.layers.0.self_attention.linear_qkv.weight_scale",
        "decoder.layers.x.mlp.linear_fc2.weight",
        "xdecoder.layers.0.mlp.linear_fc2.weight",
        "decoder.layers.0.output_layer.weight",
        "mlp.linear_fc2.weight",
        "module.embedding.word_embeddings.weight",
        "embedding.position_embeddings.weight",
        "embedding.word_embeddings.weight.lora_A",
    ],
)
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no rule.*known are.*linear_fc1\.layer_norm_weight"):
        parse(name)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("decoder.layers.0.mlp.router.bias", "router biases"),
        ("decoder.layers.0.mlp.experts.weight1", "experts in one tensor"),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight", "experts in one tensor"),
        ("mtp.layers.0.eh_proj.weight", "multi-token"),
    ],
)
def test_what_is_not_built_is_named(name: str, what: str) -> None:
    with pytest.raises(NotBuiltError, match=what):
        parse(name)


def engine_names(model_type: str, num_experts: int) -> set[str]:
    """What te_parameter_names.txt lists for a family."""
    found, applies = set(), False
    for line in Path(__file__).with_name("te_parameter_names.txt").read_text().splitlines():
        if heading := re.fullmatch(r"# \[(.+)\]", line):
            applies = heading[1] == "all" or model_type in heading[1].split()
        elif applies:
            found |= {line.format(e=expert) for expert in range(num_experts if "{e}" in line else 1)}
    return found


@pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
def test_names_of_transformer_engine_against_the_list(model_type: str) -> None:
    """Both ways: each listed name is understood, and the map expects no other."""
    arch = small(model_type)
    listed = engine_names(model_type, 4)
    assert {name for name, _ in fake_chunk(arch, layers=[0], spec="te").named_parameters()} == listed
    chunk = fake_chunk(arch, layers=[0], spec="te")
    assert len(check_chunks([chunk], arch, ExpertRank())) == len(listed)


def test_roles_of_the_families() -> None:
    common = {"attention_norm", "qkv", "attention_output", "mlp_norm", "gate_up", "down"}
    assert set(layer_roles(small("llama"), 0)) == common
    assert set(layer_roles(small("mistral"), 0)) == common
    assert set(layer_roles(small("qwen2"), 0)) == common | {"qkv_bias"}
    assert set(layer_roles(small("qwen3"), 0)) == common | {"query_norm", "key_norm"}
    routed = common - {"gate_up", "down"} | {"router", "expert_gate_up", "expert_down"}
    assert set(layer_roles(small("mixtral"), 0)) == routed
    assert set(layer_roles(small("qwen3_moe"), 0)) == routed | {"query_norm", "key_norm"}
    shared = {"shared_gate_up", "shared_down"}
    assert set(layer_roles(small("qwen2_moe"), 0)) == routed | {"qkv_bias", "shared_gate"} | shared
    assert set(layer_roles(small("olmoe"), 0)) == routed | {"query_norm_over_heads", "key_norm_over_heads"}
    assert set(layer_roles(small("glm4_moe"), 0)) == routed | {"correction_bias"} | shared
    latent = {"query_down", "query_norm", "query_up", "latent_down", "latent_norm", "latent_up"}
    assert set(layer_roles(small("deepseek_v3"), 0)) == routed - {"qkv"} | {"correction_bias"} | shared | latent


def test_a_layer_without_experts_among_layers_with_them() -> None:
    arch = small("qwen3_moe")
    assert arch.moe is not None
    mixed = replace(arch, moe=replace(arch.moe, layers=(1, 3)))
    assert layer_roles(mixed, 0) == layer_roles(small("qwen3"), 0)
    assert layer_roles(mixed, 1) == layer_roles(arch, 1)


def test_mixtral_has_names_of_its_own() -> None:
    prefix = "model.layers.2.block_sparse_moe."
    assert hf_names(Unit("router", 2), small("mixtral")) == (prefix + "gate.weight",)
    names = hf_names(Unit("expert_gate_up", 2, 3), small("mixtral"))
    assert names == (prefix + "experts.3.w1.weight", prefix + "experts.3.w3.weight")
    assert hf_names(Unit("expert_down", 2, 3), small("mixtral")) == (prefix + "experts.3.w2.weight",)
    assert hf_names(Unit("expert_down", 2, 3), small("qwen3_moe")) == ("model.layers.2.mlp.experts.3.down_proj.weight",)


def test_a_tied_head_is_the_embedding() -> None:
    assert hf_names(Unit("head"), small(tied=True)) == ("model.embed_tokens.weight",)
    assert hf_names(Unit("head"), small(tied=False)) == ("lm_head.weight",)


def test_what_is_skipped_is_little() -> None:
    assert is_extra_state("decoder.layers.0.mlp.linear_fc1._extra_state")
    assert is_extra_state("decoder.layers.0.mlp.experts.linear_fc1._extra_state12")
    assert not is_extra_state("decoder.layers.0.mlp.linear_fc1.weight")
    assert is_ignored_hf_name("model.layers.11.self_attn.rotary_emb.inv_freq")
    assert is_ignored_hf_name("model.rotary_emb.inv_freq")
    assert not is_ignored_hf_name("model.layers.11.self_attn.o_proj.bias")
    assert not is_ignored_hf_name("lm_head.weight")
