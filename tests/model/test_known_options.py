"""Options of a config.json: those that are not known to be harmless are refused by name, and what real checkpoints and
transformers itself write is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.architecture import SUPPORTED_MODEL_TYPES, read_architecture, read_config_json
from megatron_gkd.errors import CheckpointError
from megatron_gkd.model.known_options import refuse_unknown_options
from tests.test_architecture import CLASSES, of_family, read

# The names in config.json files as they were published.
PUBLISHED = {
    "llama": "architectures attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size "
    "initializer_range intermediate_size is_llama_config max_position_embeddings mlp_bias model_type "
    "num_attention_heads num_hidden_layers num_key_value_heads pad_token_id pretraining_tp rms_norm_eps rope_scaling "
    "rope_theta tie_word_embeddings torch_dtype transformers.js_config transformers_version use_cache vocab_size",
    "qwen2": "architectures attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range "
    "intermediate_size max_position_embeddings max_window_layers model_type num_attention_heads num_hidden_layers "
    "num_key_value_heads rms_norm_eps rope_theta sliding_window tie_word_embeddings torch_dtype transformers_version "
    "use_cache use_sliding_window vocab_size",
    "qwen3_moe": "architectures attention_bias attention_dropout bos_token_id decoder_sparse_step eos_token_id "
    "head_dim hidden_act hidden_size initializer_range intermediate_size max_position_embeddings max_window_layers "
    "mlp_only_layers model_type moe_intermediate_size norm_topk_prob num_attention_heads num_experts "
    "num_experts_per_tok num_hidden_layers num_key_value_heads output_router_logits rms_norm_eps rope_scaling "
    "rope_theta router_aux_loss_coef sliding_window tie_word_embeddings torch_dtype transformers_version use_cache "
    "use_sliding_window vocab_size",
    "mixtral": "architectures attention_dropout bos_token_id eos_token_id hidden_act hidden_size initializer_range "
    "intermediate_size max_position_embeddings model_type num_attention_heads num_experts_per_tok num_hidden_layers "
    "num_key_value_heads num_local_experts output_router_logits rms_norm_eps rope_theta router_aux_loss_coef "
    "sliding_window tie_word_embeddings torch_dtype transformers_version use_cache vocab_size",
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_what_real_checkpoints_say_is_known(tmp_path: Path, family: str) -> None:
    refuse_unknown_options(tmp_path, dict.fromkeys(PUBLISHED[family].split()), family)


@pytest.mark.parametrize("family", SUPPORTED_MODEL_TYPES)
def test_what_transformers_writes_is_known(tmp_path: Path, family: str) -> None:
    import transformers

    config = getattr(transformers, f"{CLASSES[family]}Config")(hidden_act="silu")
    refuse_unknown_options(tmp_path, config.to_dict(), family)
    config.architectures = [f"{CLASSES[family]}ForCausalLM"]
    config.save_pretrained(tmp_path)
    refuse_unknown_options(tmp_path, read_config_json(tmp_path), family)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "not causal": ({"is_causal": False}, r"is_causal 'False': not supported \(only True\)"),
    "causal or not": ({"is_causal": None}, "is_causal 'None'"),
    "a number for a truth": ({"is_causal": 1}, "is_causal '1'"),
    "interleaved rope": ({"rope_interleaved": True}, "rope_interleaved"),
    "three-dimensional rope": ({"use_mrope": True}, "use_mrope"),
    "an encoder": ({"is_encoder_decoder": True}, "is_encoder_decoder"),
    "an option of tomorrow": ({"residual_scale": 0.5}, "residual_scale, which is not known for model_type 'llama'"),
    "also where it is null": ({"residual_scale": None}, "residual_scale"),
    "of another family": ({"num_local_experts": 8}, "num_local_experts, which is not known"),
    "rope": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mrope_section": [1]}}, "rope_scaling.mrope_sect"),
    "several": ({f"x{i}": 1 for i in range(7)}, "x0, x1, x2, x3, x4 and 2 more, which is not known"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_to_be_harmless_is_refused_by_name(tmp_path: Path, name: str) -> None:
    changes, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path, **changes)


def test_harmless_with_one_value(tmp_path: Path) -> None:
    plain = read(tmp_path)
    assert read(tmp_path, is_causal=True, rope_interleaved=False, use_mrope=False, pruned_heads={}) == plain


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_window_that_no_layer_has(tmp_path: Path, family: str) -> None:
    """transformers gives a window to the layers from max_window_layers on."""
    window = dict(use_sliding_window=True, sliding_window=64)
    assert read(tmp_path, **of_family(family, **window, max_window_layers=4)) == read(tmp_path, **of_family(family))
    with pytest.raises(CheckpointError, match="sliding window"):
        read(tmp_path, **of_family(family, **window, max_window_layers=3))


def test_a_git_lfs_pointer_is_named(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "config.json").write_text(pointer)
    with pytest.raises(CheckpointError, match=r"config\.json is a Git LFS pointer.*git lfs pull"):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps("version"))
    with pytest.raises(CheckpointError, match="damaged"):
        read_architecture(tmp_path)
