"""Configs become the numbers that transformers uses, or are refused by name. Logits are compared in tests/weights."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_gkd.architecture import SUPPORTED_MODEL_TYPES, Architecture, MixtureOfExperts, read_architecture
from megatron_gkd.errors import CheckpointError, NotBuiltError
from tests.support.checkpoints import FAMILIES, MIXTURES, ROPES

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "tie_word_embeddings": False,
    "vocab_size": 300,
}
CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"} | {
    "qwen3_moe": "Qwen3Moe",
    "mixtral": "Mixtral",
    "qwen2_moe": "Qwen2Moe",
    "olmoe": "Olmoe",
    "glm4_moe": "Glm4Moe",
    "deepseek_v3": "DeepseekV3",
}


def write_config(path: Path, **changes: Any) -> Path:
    """LLAMA with changes; `...` removes a key."""
    config = {key: value for key, value in (LLAMA | changes).items() if value is not ...}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    return path


def of_family(family: str, **changes: Any) -> dict[str, Any]:
    base: dict[str, Any] = {"model_type": family, "architectures": [f"{CLASSES[family]}ForCausalLM"]}
    if family == "mixtral":
        base["head_dim"] = 16  # without it transformers fails on yarn
    return base | changes


def read(path: Path, **changes: Any) -> Architecture:
    return read_architecture(write_config(path / "model", **changes))


def test_supported_families_are_those_of_the_test_checkpoints() -> None:
    assert set(SUPPORTED_MODEL_TYPES) == {*FAMILIES, *MIXTURES}


def test_llama_config_field_by_field(tmp_path: Path) -> None:
    arch = read(tmp_path)
    assert arch == Architecture(
        model_type="llama",
        num_layers=4,
        hidden_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        ffn_hidden_size=96,
        vocab_size=300,
        tied_embeddings=False,
        qkv_bias=False,
        qk_norm=False,
        norm_eps=1e-5,
        max_position_embeddings=256,
        rope=arch.rope,
    )
    assert (arch.query_size, arch.kv_size) == (64, 32)


def test_biases_and_norms_of_the_families(tmp_path: Path) -> None:
    found = {}
    for family in FAMILIES:
        arch = read(tmp_path, **of_family(family, sliding_window=None))
        found[family] = (arch.qkv_bias, arch.qk_norm)
    assert found == {
        "llama": (False, False),
        "mistral": (False, False),
        "qwen2": (True, False),
        "qwen3": (False, True),
        "qwen3_moe": (False, True),
        "mixtral": (False, False),
    }


def test_head_dim_is_explicit_or_hidden_over_heads(tmp_path: Path) -> None:
    arch = read(tmp_path, head_dim=32)
    assert arch.head_dim == 32
    assert arch.query_size == 128
    assert read(tmp_path, head_dim=...).head_dim == 16


@pytest.mark.parametrize(("vocab_size", "tp", "padded"), [(151936, 1, 151936), (151936, 2, 152064), (300, 3, 384)])
def test_padded_vocab_size(tmp_path: Path, vocab_size: int, tp: int, padded: int) -> None:
    assert read(tmp_path, vocab_size=vocab_size).padded_vocab_size(tp) == padded


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_rope_equals_the_module_of_transformers_bit_for_bit(tmp_path: Path, family: str, rope: str) -> None:
    from transformers import AutoConfig

    changes = of_family(family, rope_theta=..., rope_parameters=ROPES[rope], sliding_window=None)
    path = write_config(tmp_path / "model", **changes)
    arch = read_architecture(path)
    modelling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    module = getattr(modelling, f"{CLASSES[family]}RotaryEmbedding")(AutoConfig.from_pretrained(path))
    assert torch.equal(torch.tensor(arch.rope.inv_freq), module.inv_freq)
    assert arch.rope.attention_factor == module.attention_scaling
    assert (arch.rope.attention_factor != 1.0) == (rope == "yarn")


def test_rope_in_the_spelling_of_older_checkpoints(tmp_path: Path) -> None:
    """Llama 3.1 as published: theta at the top, the rest in rope_scaling."""
    new = ROPES["llama3"]
    scaling = {key: value for key, value in new.items() if key != "rope_theta"}
    older = read(tmp_path, rope_theta=new["rope_theta"], rope_scaling=scaling)
    assert older.rope == read(tmp_path, rope_theta=..., rope_parameters=new).rope
    assert older.rope != read(tmp_path, rope_theta=new["rope_theta"]).rope


def yarn(**changes: Any) -> dict[str, Any]:
    return {"rope_theta": ..., "rope_parameters": ROPES["yarn"] | changes}


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown model type": ({"model_type": "gpt2"}, "gpt2.*supported are llama"),
    "no model type": ({"model_type": ...}, "None is not supported"),
    "another head": ({"architectures": ["LlamaForSequenceClassification"]}, "only LlamaForCausalLM"),
    "remote code": ({"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "remote code"),
    "quantised": ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised"),
    "activation": ({"hidden_act": "gelu"}, "gelu"),
    "mlp bias": ({"mlp_bias": True}, "mlp_bias"),
    "attention bias": ({"attention_bias": True}, "bias to o_proj"),
    "qwen3 attention bias": (of_family("qwen3", attention_bias=True), "bias to o_proj"),
    "dropout": ({"attention_dropout": 0.1}, "attention_dropout"),
    "mistral's window": (of_family("mistral", sliding_window=64), "sliding window"),
    "mistral's default window": (of_family("mistral"), "sliding window"),
    "qwen2's window": (of_family("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=2), "sliding"),
    "layer types": (of_family("qwen3", layer_types=["full_attention"] * 3 + ["sliding_attention"]), "sliding"),
    "rope dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
    "rope longrope": (
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 2.0,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0] * 8,
                "original_max_position_embeddings": 64,
            }
        },
        "'longrope' is not supported",
    ),
    "rope unknown": ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral"),
    "rope partial": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "rope incomplete": ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "llama3|low_freq_factor"),
    "rope factor": (yarn(factor="four"), "yarn|factor|four"),
    "head counts": ({"num_key_value_heads": 3}, "3 key/value heads"),
    "odd head": ({"head_dim": 15}, "odd|even"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "a size in words": ({"intermediate_size": "many"}, "intermediate_size|many"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, name: str) -> None:
    changes, message = REFUSALS[name]
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, **changes)


def test_qwen2_ignores_attention_bias_as_transformers_does(tmp_path: Path) -> None:
    assert read(tmp_path, **of_family("qwen2", attention_bias=True)).qkv_bias


def test_mixture_of_experts_is_not_built_yet(tmp_path: Path) -> None:
    with pytest.raises(NotBuiltError, match=r"gpt_oss.*mixture of experts that is not built.*sinks"):
        read(tmp_path, model_type="gpt_oss")
    with pytest.raises(NotBuiltError, match=r"deepseek_v2.*groups of experts"):
        read(tmp_path, model_type="deepseek_v2")


EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24}


def test_routing_field_by_field(tmp_path: Path) -> None:
    every = (0, 1, 2, 3)
    assert read(tmp_path, **of_family("qwen3_moe", **EXPERTS, norm_topk_prob=True)).moe == MixtureOfExperts(
        8, 3, 24, True, every
    )
    moe = read(tmp_path, **of_family("qwen3_moe", **EXPERTS, decoder_sparse_step=2, norm_topk_prob=False)).moe
    assert moe == MixtureOfExperts(8, 3, 24, False, (1, 3))
    moe = read(tmp_path, **of_family("qwen3_moe", **EXPERTS, mlp_only_layers=[1], norm_topk_prob=False)).moe
    assert moe == MixtureOfExperts(8, 3, 24, False, (0, 2, 3))
    moe = read(tmp_path, **of_family("mixtral", num_local_experts=4, num_experts_per_tok=2, sliding_window=None)).moe
    assert moe == MixtureOfExperts(4, 2, 96, True, every)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (of_family("qwen3_moe", **EXPERTS | {"num_experts_per_tok": 9}), "9 experts per token, and the layer has 8"),
        (of_family("qwen3_moe", **EXPERTS | {"num_experts_per_tok": 0}), "num_experts_per_tok"),
        (of_family("qwen3_moe", **EXPERTS, mlp_only_layers=[0, 1, 2, 3]), "no layer has experts"),
        (of_family("qwen3_moe", **EXPERTS, mlp_only_layers=[9]), "out of range"),
        (of_family("qwen3_moe", **EXPERTS | {"num_experts_per_tok": 1}, norm_topk_prob=True), "always 1"),
        (of_family("qwen3_moe", **EXPERTS, attention_bias=True), "bias to o_proj"),
        (of_family("mixtral", num_local_experts=4, router_jitter_noise=0.1), "router_jitter_noise"),
        (of_family("mixtral", num_local_experts=4, sliding_window=64), "sliding window"),
    ],
)
def test_routing_that_is_not_understood(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, **changes)


def test_damaged_or_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"not a directory.*download"):
        read_architecture(tmp_path / "org/model")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_architecture(tmp_path)
    path = write_config(tmp_path / "model")
    text = (path / "config.json").read_text()
    for damaged in (text[:-30], "[]", ""):
        (path / "config.json").write_text(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            read_architecture(path)
    (path / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match="damaged"):
        read_architecture(path)
