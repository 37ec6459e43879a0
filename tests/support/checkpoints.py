"""Tiny random Hugging Face checkpoints for tests, written by transformers itself, with a tokenizer and a chat
template beside.

    path = write_tiny_checkpoint(tmp_path / "student", "qwen3", tied=True, seed=7)

Nothing in them is trivial: norm weights are not all ones, biases are not zero, head_dim differs from hidden / heads
for qwen3, there are fewer KV heads than heads, and the vocabulary is no multiple of any padding. So a map that drops
a bias, skips a norm or swaps two tensors changes the logits (which are of order 1).

The tokenizer is byte-level without merges (one token a byte, 256 + 3 special tokens: any text round-trips), its chat
template is
ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n`, and `<|im_end|>` is the end-of-sequence token. A vocabulary below
TOKENIZER_SIZE gets no tokenizer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import torch

Family = Literal["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"]
FAMILIES: tuple[Family, ...] = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral")
MOE_FAMILIES: tuple[Family, ...] = ("qwen3_moe", "mixtral")
# Further mixtures, which have tests of their own (tests/weights/test_mixtures.py) in place of the grids of FAMILIES.
MIXTURES = ("qwen2_moe", "olmoe", "glm4_moe", "deepseek_v3")

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
TOKENIZER_SIZE = 256 + 3

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

# Numbers that no library hard-codes, small enough that positions below 100 reach every branch.
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 6.0,
        "low_freq_factor": 1.5,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 48,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
}


_SIGMOID: dict[str, Any] = dict(n_routed_experts=8, num_experts_per_tok=4, moe_intermediate_size=24)
_SIGMOID |= dict(n_shared_experts=2, first_k_dense_replace=1, routed_scaling_factor=1.7, num_nextn_predict_layers=0)
OF_MIXTURES: dict[str, dict[str, Any]] = {
    "qwen2_moe": dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, norm_topk_prob=False)
    | dict(shared_expert_intermediate_size=56, mlp_only_layers=[0]),
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "glm4_moe": _SIGMOID | dict(use_qk_norm=True, attention_bias=True, n_group=1, topk_group=1),
    "deepseek_v3": _SIGMOID
    | dict(n_group=4, topk_group=2, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8)
    | dict(v_head_dim=12, num_key_value_heads=None, scoring_func="sigmoid", topk_method="noaux_tc"),
}


def write_tiny_checkpoint(
    path: str | Path,
    family: str = "llama",
    *,
    tied: bool = False,
    vocab_size: int = 300,
    layers: int = 4,
    rope: str | dict[str, Any] = "default",
    seed: int = 0,
    hidden_size: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    ffn_hidden_size: int = 96,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str | int = "5GB",
    **config_options: Any,
) -> Path:
    """Write config, safetensors, generation config and tokenizer to `path`; returns it.

    The same arguments give the same bytes: they are kept in memory for the next call.
    """
    options = dict(
        tied=tied,
        vocab_size=vocab_size,
        layers=layers,
        rope=rope,
        seed=seed,
        hidden_size=hidden_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=ffn_hidden_size,
        **config_options,
    )
    path, name = Path(path), repr((family, dtype, max_shard_size, options))
    if name not in _written:
        with tempfile.TemporaryDirectory() as directory:
            tiny_model(family, **options).to(dtype).save_pretrained(directory, max_shard_size=max_shard_size)
            if vocab_size >= TOKENIZER_SIZE:
                tiny_tokenizer().save_pretrained(directory)
            files = {file.name: file.read_bytes() for file in Path(directory).iterdir()}
        if sum(map(len, files.values())) > _LARGE:
            return _write(path, files)
        _written[name] = files
    return _write(path, _written[name])


_LARGE = 4_000_000  # bytes, above which a checkpoint is not kept
_written: dict[str, dict[str, bytes]] = {}


def _write(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def tiny_model(
    family: str,
    *,
    tied: bool,
    vocab_size: int,
    layers: int,
    rope: str | dict[str, Any],
    seed: int,
    hidden_size: int,
    heads: int,
    kv_heads: int,
    head_dim: int | None,
    ffn_hidden_size: int,
    **config_options: Any,
) -> Any:
    """The fp32 transformers model behind a tiny checkpoint."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if family in ("qwen3", "qwen3_moe", "glm4_moe") and head_dim is None:
        head_dim = hidden_size // heads + 8
    options: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": ffn_hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 256,
        "rms_norm_eps": 3e-6,
        "tie_word_embeddings": tied,
        "rope_parameters": dict(ROPES[rope] if isinstance(rope, str) else rope),
        "bos_token_id": None,
        "eos_token_id": 258,
        "pad_token_id": 256,
    }
    if head_dim is not None:
        options["head_dim"] = head_dim
    if family == "mistral":
        options["sliding_window"] = None
    if family == "qwen3_moe":
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
    if family == "mixtral":
        options |= {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
        options.setdefault("head_dim", hidden_size // heads)  # without it transformers fails on yarn
    options |= OF_MIXTURES.get(family, {})
    config = AutoConfig.for_model(family, **(options | config_options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        _randomise(model)
    return model


@torch.no_grad()
def _randomise(model: torch.nn.Module) -> None:
    """Every parameter from the seeded generator: matrices of unit gain, norms around one, biases around zero."""
    for name, parameter in sorted(model.named_parameters()):
        if parameter.ndim > 1:  # transformers holds the experts' matrices in one tensor of three dimensions
            parameter.normal_(0.0, parameter.shape[-1] ** -0.5)
        elif name.endswith("bias"):
            parameter.normal_(0.0, 0.5)
        else:
            parameter.normal_(1.0, 0.2)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # large enough that it decides, and not so that it does alone
            buffer.normal_(0.0, 0.1)


def tiny_tokenizer() -> Any:
    """Byte-level, no merges: ids 0-255 are bytes, then the three special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([END_OF_TEXT, TURN_START, TURN_END])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=END_OF_TEXT,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHATML,
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
