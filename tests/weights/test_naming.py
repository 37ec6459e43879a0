"""Every parameter name of both layer specs has one meaning; every other name is refused.

The TransformerEngine names come from reading megatron-core 0.16.1 (gpt_layer_specs.py), not from a model on a GPU.
"""

from __future__ import annotations

import pytest

from megatron_gkd.errors import CheckpointError, NotBuiltError
from megatron_gkd.weights.naming import (
    ROLES,
    ParsedName,
    hf_names,
    is_extra_state,
    is_ignored_hf_name,
    layer_roles,
    parse,
)
from tests.weights.models import small

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
    assert tested == {name for role in ROLES.values() for name in role.core_names}


@pytest.mark.parametrize(
    "name",
    [
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
        ("decoder.layers.0.mlp.router.weight", "mixture"),
        ("decoder.layers.0.mlp.experts.local_experts.3.linear_fc1.weight", "mixture"),
        ("decoder.layers.0.mlp.experts.linear_fc2.weight7", "mixture"),
        ("decoder.layers.0.mlp.shared_experts.linear_fc1.weight", "mixture"),
        ("mtp.layers.0.eh_proj.weight", "multi-token"),
    ],
)
def test_what_is_not_built_is_named(name: str, what: str) -> None:
    with pytest.raises(NotBuiltError, match=what):
        parse(name)


def test_roles_of_the_families() -> None:
    common = {"attention_norm", "qkv", "attention_output", "mlp_norm", "gate_up", "down"}
    assert set(layer_roles(small("llama"))) == common
    assert set(layer_roles(small("mistral"))) == common
    assert set(layer_roles(small("qwen2"))) == common | {"qkv_bias"}
    assert set(layer_roles(small("qwen3"))) == common | {"query_norm", "key_norm"}


def test_a_tied_head_is_the_embedding() -> None:
    assert hf_names("head", None, small(tied=True)) == ("model.embed_tokens.weight",)
    assert hf_names("head", None, small(tied=False)) == ("lm_head.weight",)


def test_what_is_skipped_is_little() -> None:
    assert is_extra_state("decoder.layers.0.mlp.linear_fc1._extra_state")
    assert not is_extra_state("decoder.layers.0.mlp.linear_fc1.weight")
    assert is_ignored_hf_name("model.layers.11.self_attn.rotary_emb.inv_freq")
    assert is_ignored_hf_name("model.rotary_emb.inv_freq")
    assert not is_ignored_hf_name("model.layers.11.self_attn.o_proj.bias")
    assert not is_ignored_hf_name("lm_head.weight")
