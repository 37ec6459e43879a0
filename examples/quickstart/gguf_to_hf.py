"""One GGUF file of a Llama model -> an ordinary Hugging Face directory (config, tokenizer, chat template, safetensors).

What happens to the numbers: every tensor is dequantised to float32 by the `gguf` package (the format's own reference)
and rounded once to `dtype`. Nothing else changes, with one exception. llama.cpp keeps the rows of the q and k
projections in the order of its INTERLEAVED rotary embedding (pairs (0, 1), (2, 3), ...); Hugging Face rotates HALVES
(pairs (0, d/2), (1, d/2 + 1), ...). With d = head_dim and p < d/2:

    GGUF row  h * d + 2p + s   <->   HF row  h * d + s * (d/2) + p        head h, s in {0, 1}

The tokenizer is rebuilt from the file's vocabulary, merges and token types, with the pre-tokenizer that the file names.

Fails closed: an architecture, tokenizer, rope setting or tensor that this file does not know is an error, never a
guess. Not covered: other architectures than `llama`, rope scaling, mixtures of experts, sentencepiece vocabularies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from megatron_gkd.errors import CheckpointError

_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_PER_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


def convert(source: Path, out: Path, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write the model in `source` to the directory `out` (made if missing); return the number of parameters."""
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    config = read_config(fields, tied="output.weight" not in {tensor.name for tensor in reader.tensors})
    num_kv_heads = config.num_key_value_heads or config.num_attention_heads
    state = {}
    for tensor in reader.tensors:
        array = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        name, array = to_hf(tensor.name, array, config.num_attention_heads, num_kv_heads)
        state[name] = torch.from_numpy(np.ascontiguousarray(array)).to(dtype)
    _check_complete(state, config)
    out.mkdir(parents=True, exist_ok=True)
    config.dtype = dtype
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(out)
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    GenerationConfig(**ids).save_pretrained(out)
    build_tokenizer(fields).save_pretrained(out)
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() for tensor in state.values())


def to_hf(name: str, array: np.ndarray, num_heads: int, num_kv_heads: int) -> tuple[str, np.ndarray]:
    """One tensor's GGUF name and rows -> its Hugging Face name and rows."""
    if name in _TOP_LEVEL:
        return _TOP_LEVEL[name], array
    parts = name.split(".")
    if len(parts) != 4 or parts[0] != "blk" or parts[2] not in _PER_LAYER or parts[3] != "weight":
        raise CheckpointError(
            f"the GGUF file has a tensor named {name!r}, which a plain Llama model does not have: not converted"
        )
    _, layer, kind, _ = parts
    if kind == "attn_q":
        array = unpermute(array, num_heads)
    elif kind == "attn_k":
        array = unpermute(array, num_kv_heads)
    return f"model.layers.{layer}.{_PER_LAYER[kind]}.weight", array


def unpermute(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of a q or k projection [heads * d, H]: interleaved rotary order -> halves (see the module docstring)."""
    rows, hidden = weight.shape
    return weight.reshape(num_heads, rows // num_heads // 2, 2, hidden).swapaxes(1, 2).reshape(rows, hidden)


def read_config(fields: Mapping[str, Any], *, tied: bool) -> LlamaConfig:
    """The GGUF header -> LlamaConfig; refuses what a plain Llama cannot express."""
    if fields.get("general.architecture") != "llama":
        raise CheckpointError(f"GGUF architecture {fields.get('general.architecture')!r}: only 'llama' is converted")
    refused = [name for name in fields if name.startswith(("llama.rope.scaling", "llama.expert"))]
    if refused:
        raise CheckpointError(f"the GGUF header has {', '.join(refused)}: rope scaling and experts are not converted")
    hidden, heads = fields["llama.embedding_length"], fields["llama.attention.head_count"]
    head_dim = fields.get("llama.attention.key_length", hidden // heads)
    if fields.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise CheckpointError(
            "the GGUF header rotates a part of each head only (llama.rope.dimension_count): not converted"
        )
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=fields.get("llama.attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=fields["llama.context_length"],
        # GGUF keeps float32: 1e-5 comes back as 9.99999974e-06, so the digits that float32 has are kept and no more
        rms_norm_eps=float(f"{fields['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(f"{fields.get('llama.rope.freq_base', 10000.0):.6g}"),
        },
        tie_word_embeddings=tied,
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id", fields["tokenizer.ggml.eos_token_id"]),
    )


def build_tokenizer(fields: Mapping[str, Any]) -> PreTrainedTokenizerFast:
    """The GGUF vocabulary -> a fast tokenizer with the chat template. Byte-level BPE of the SmolLM family only."""
    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(
            f"GGUF tokenizer {kind}: only ('gpt2', 'smollm') is rebuilt, another would split text differently"
        )
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(  # SmolLM: each digit alone, then GPT-2's words
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types: list[int] = fields["tokenizer.ggml.token_type"]
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    if tokenizer.get_vocab_size() != len(tokens):
        raise CheckpointError("the GGUF vocabulary has duplicate tokens: token ids would shift")
    special = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in special.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{name: tokens[i] for name, i in ids.items() if i is not None},
        model_max_length=fields["llama.context_length"],
        clean_up_tokenization_spaces=False,
        chat_template=fields.get("tokenizer.chat_template"),
    )


def _check_complete(state: Mapping[str, torch.Tensor], config: LlamaConfig) -> None:
    """Every tensor of the model once: 9 per layer, the embedding, the final norm and, if not tied, the head."""
    wanted = {"model.embed_tokens.weight", "model.norm.weight"} | (
        set() if config.tie_word_embeddings else {"lm_head.weight"}
    )
    wanted |= {f"model.layers.{i}.{hf}.weight" for i in range(config.num_hidden_layers) for hf in _PER_LAYER.values()}
    if wanted != set(state):
        missing, extra = sorted(wanted - set(state)), sorted(set(state) - wanted)
        raise CheckpointError(
            f"the GGUF file is not one whole Llama model: missing {missing[:5]}, unexpected {extra[:5]}"
        )
