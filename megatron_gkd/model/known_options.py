"""The options of a config.json that are supported: a closed list per family, like the closed map of tensors.

An option that is not listed is refused by name. Otherwise one that a newer transformers reads (`is_causal`) could give
a model that runs and is wrong. Listed are the options that architecture.py reads or checks, those that do not affect
the logits, and some that do not affect them at certain values.

To add one, read the family's modeling file. An option that changes the logits needs code, not a line here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from megatron_gkd.errors import CheckpointError

# Read by architecture.py, or refused there at values that are not supported.
_JUDGED: Final = frozenset(
    {
        *("model_type", "architectures", "auto_map", "quantization_config", "compression_config", "per_layer_config"),
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "tie_word_embeddings"),
        *("max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
        *("attention_bias", "mlp_bias", "attention_dropout", "sliding_window", "layer_types"),
    }
)
_SIGMOID_ROUTERS: Final = (
    *("n_routed_experts", "num_local_experts", "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("norm_topk_prob", "routed_scaling_factor", "n_group", "topk_group", "first_k_dense_replace"),
    *("num_nextn_predict_layers", "num_mtp_layers"),
)
_JUDGED_OF: Final = {
    "qwen2": frozenset({"use_sliding_window", "max_window_layers"}),
    "qwen3": frozenset({"use_sliding_window", "max_window_layers"}),
    "qwen3_moe": frozenset(
        {
            *("use_sliding_window", "max_window_layers", "decoder_sparse_step", "moe_intermediate_size"),
            *("num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers"),
        }
    ),
    "mixtral": frozenset({"num_local_experts", "num_experts_per_tok", "router_jitter_noise"}),
    "qwen2_moe": frozenset(
        {
            *("use_sliding_window", "max_window_layers", "decoder_sparse_step", "moe_intermediate_size", "qkv_bias"),
            *("num_experts", "num_experts_per_tok", "norm_topk_prob", "mlp_only_layers"),
            "shared_expert_intermediate_size",
        }
    ),
    "olmoe": frozenset({"num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob", "clip_qkv"}),
    "glm4_moe": frozenset({*_SIGMOID_ROUTERS, "use_qk_norm"}),
    "deepseek_v3": frozenset(
        {
            *(*_SIGMOID_ROUTERS, "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
            *("qk_head_dim", "rope_interleave"),
        }
    ),
}

# No effect on the logits: initialisation, caching, stored dtype, labels, names, losses that are not used here, and
# generation settings, which older versions wrote into config.json.
_HARMLESS: Final = frozenset(
    {
        *("transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id"),
        *("output_hidden_states", "output_attentions", "return_dict", "return_dict_in_generate", "torchscript"),
        *("id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "task_specific_params"),
        *("tokenizer_class", "model_max_length", "prefix", "_name_or_path", "name_or_path", "chunk_size_feed_forward"),
        *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_flash_attn_2_enabled"),
        *("use_bfloat16", "use_flash_attn", "low_cpu_mem_usage", "tf_legacy_loss", "is_llama_config"),
        *("output_router_logits", "router_aux_loss_coef", "transformers.js_config", "unsloth_fixed", "unsloth_version"),
        # generation
        *("temperature", "top_k", "top_p", "typical_p", "do_sample", "num_beams", "num_beam_groups"),
        "num_return_sequences",
        *("max_length", "min_length", "length_penalty", "repetition_penalty", "diversity_penalty", "early_stopping"),
        *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "forced_bos_token_id"),
        *("forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens"),
        *("begin_suppress_tokens", "output_scores"),
    }
)

# Harmless with these values alone. None: written as null.
_ONLY: Final[Mapping[str, tuple[Any, ...]]] = {
    "is_causal": (True,),
    "is_decoder": (False, True),  # alike where no encoder is
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, None),
    "rope_interleaved": (False,),
    "use_mrope": (False, None),
    "use_qk_norm": (None,),
    "hidden_dropout": (0.0, 0, None),
    "resid_pdrop": (0.0, 0, None),
    "embd_pdrop": (0.0, 0, None),
    "rope_ratio": (1, 1.0, None),
    "logit_scale": (1, 1.0, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "shared_expert_intermediate_size": (0, None),
    "num_shared_experts": (0, None),
}

# The same, of one family: what its published checkpoints say, and transformers' class takes for granted.
_ONLY_OF: Final[Mapping[str, Mapping[str, tuple[Any, ...]]]] = {
    "deepseek_v3": {
        "scoring_func": ("sigmoid",),
        "topk_method": ("noaux_tc",),
        "moe_layer_freq": (1,),
        "ep_size": (1,),
    },
}
# Of training: losses that are not used here.
_HARMLESS_OF: Final = {"deepseek_v3": frozenset({"aux_loss_alpha", "seq_aux"})}

_ROPE: Final = frozenset(
    {
        *("rope_type", "type", "rope_theta", "factor", "partial_rotary_factor", "original_max_position_embeddings"),
        *("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate", "finetuned"),
        *("low_freq_factor", "high_freq_factor", "short_factor", "long_factor"),
    }
)


def refuse_unknown_options(path: Path, raw: Mapping[str, Any], model_type: str) -> None:
    """Raise CheckpointError for options of `path`/config.json that are not known to be understood or harmless."""
    judged = _JUDGED | _JUDGED_OF.get(model_type, frozenset())
    only, harmless = {**_ONLY, **_ONLY_OF.get(model_type, {})}, _HARMLESS | _HARMLESS_OF.get(model_type, frozenset())
    unknown = []
    for name, value in raw.items():
        if name in judged:
            continue
        if name in only:
            if not any(value == known and type(value) is type(known) for known in only[name]):
                raise CheckpointError(
                    f"{path}: config.json has {name} {str(value)[:80]!r}: not supported "
                    f"(only {' or '.join(map(repr, only[name]))}), it would compute something else"
                )
        elif name not in harmless:
            unknown.append(name)
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(part := raw.get(name), Mapping):
            unknown += [f"{name}.{key}" for key in part if key not in _ROPE]
    if unknown:
        shown = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if unknown[5:] else "")
        raise CheckpointError(
            f"{path}: config.json has {shown}, which is not known for model_type {model_type!r}: it may change what "
            "the model computes. If it does not, remove it from config.json"
        )


def without_harmless(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that may have a part in the logits."""
    return {name: value for name, value in options.items() if name not in _HARMLESS}
