"""Reads a Hugging Face `config.json`: the numbers of the decoder that this project needs, or an error.

    arch = read_architecture("path/to/Qwen3-8B")        # needs config.json only; no weights, no network, no remote code

Supported: llama (2, 3, 3.1, 3.2, SmolLM2, ...), mistral without a sliding window, qwen2 (2, 2.5), qwen3, and the
mixtures of experts qwen3_moe, mixtral, qwen2_moe, olmoe, glm4_moe and deepseek_v3. All of them are one decoder
(pre-norm RMSNorm, grouped-query attention with rotate-half RoPE, SwiGLU without biases) and differ in the q/k/v bias,
the q/k norm, head_dim, the tied head, the RoPE frequencies, and in whether (some) layers have a mixture of experts in
place of the MLP; deepseek_v3 has latent attention (model/mixture_config.py).

A vision-language model (internvl, llava, smolvlm, qwen2_5_vl) is such a decoder with a tower and a projector before it
(model/vision_config.py): its `text_config` is read as a config.json of its own.

Everything else is refused here, by name, before a weight is read: with an option that is not understood the model would
run and be wrong. RoPE is taken from transformers' own functions as numbers (`inv_freq` per frequency pair, and the
factor on cos and sin), because two implementations of a formula drift apart: megatron-core hard-codes three of llama3's
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from megatron_gkd.config.json_file import read_json, shown, whole_number
from megatron_gkd.data.git_lfs import refuse_lfs_pointer
from megatron_gkd.errors import CheckpointError, NotBuiltError
from megatron_gkd.model.known_options import refuse_unknown_options
from megatron_gkd.model.mixture_config import LatentAttention, MixtureOfExperts, read_experts, read_latent
from megatron_gkd.model.vision_config import FAMILIES, REFUSED, VisionPart, read_vision
from megatron_gkd.records import LATER, StableText


@dataclass(frozen=True, repr=False)
class Rope(StableText):
    """Rotary embedding as numbers: position p turns pair i by p * inv_freq[i].

    Cos and sin are scaled by attention_factor. With `sections` a token has three positions, and each turns the pairs
    of its section, one section after the other (M-RoPE).
    """

    inv_freq: tuple[float, ...]  # [n / 2], exact float32 values, for the first n dimensions of a head
    attention_factor: float  # 1.0 except for yarn
    # Longer sequences would need other frequencies (dynamic) and are refused; None: no such limit.
    most_positions: int | None = field(default=None, repr=False)
    sections: tuple[int, ...] = field(default=(), metadata=LATER)  # number of pairs for time, height and width


@dataclass(frozen=True, repr=False)
class Architecture(StableText):
    """The decoder, independent of any parallel layout."""

    model_type: str
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_hidden_size: int
    vocab_size: int  # of the checkpoint, without padding
    tied_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    norm_eps: float
    max_position_embeddings: int
    rope: Rope
    moe: MixtureOfExperts | None = None
    # With qk_norm: one norm over all heads (olmoe) instead of one per head.
    qk_norm_over_heads: bool = field(default=False, metadata=LATER)
    # Latent attention, instead of separate queries, keys and values (qkv).
    latent: LatentAttention | None = field(default=None, metadata=LATER)
    # Multi-token prediction layers behind the decoder: stored in checkpoints, not used for the logits.
    num_predict_layers: int = field(default=0, metadata=LATER)
    # Vision tower and projector of a vision-language model.
    vision: VisionPart | None = field(default=None, metadata=LATER)

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, self
        assert self.head_dim % 2 == 0, self
        assert 0 < len(self.rope.inv_freq) <= self.head_dim // 2, self

    def padded_vocab_size(self, tp: int, multiple: int = 128) -> int:
        """Rows of the embedding with `tp` ranks: the vocabulary size, rounded up to a multiple of `multiple * tp`."""
        unit = multiple * tp
        return -(-self.vocab_size // unit) * unit

    def has_experts(self, layer: int) -> bool:
        """Whether the layer's MLP is a mixture of experts."""
        return self.moe is not None and layer in self.moe.layers

    @property
    def query_size(self) -> int:
        """Output size of all query heads; differs from hidden_size where head_dim is given (qwen3)."""
        return self.num_heads * self.head_dim

    @property
    def attention_size(self) -> int:
        """Input size of the attention's output projection: the values of all heads."""
        return self.query_size if self.latent is None else self.num_heads * self.latent.value_dim

    @property
    def kv_size(self) -> int:
        """Output size of all key heads, and also of all value heads."""
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True)
class _Family:
    hf_class: str
    qkv_bias: bool = False
    qk_norm: bool = False
    experts: bool = False
    partial_rope: bool = False  # only a part of each head is rotated (partial_rotary_factor)


_FAMILIES: Final = {
    "llama": _Family("LlamaForCausalLM"),
    "mistral": _Family("MistralForCausalLM"),
    "qwen2": _Family("Qwen2ForCausalLM", qkv_bias=True),
    "qwen3": _Family("Qwen3ForCausalLM", qk_norm=True),
    "qwen3_moe": _Family("Qwen3MoeForCausalLM", qk_norm=True, experts=True),
    "mixtral": _Family("MixtralForCausalLM", experts=True),
    "qwen2_moe": _Family("Qwen2MoeForCausalLM", qkv_bias=True, experts=True),
    "olmoe": _Family("OlmoeForCausalLM", qk_norm=True, experts=True),
    "glm4_moe": _Family("Glm4MoeForCausalLM", experts=True, partial_rope=True),
    "deepseek_v3": _Family("DeepseekV3ForCausalLM", experts=True),
}
SUPPORTED_MODEL_TYPES: Final = tuple(_FAMILIES)
# Known mixtures of experts that are not supported, with the reason.
_OTHER_MOE_MODEL_TYPES: Final = {
    "gpt_oss": "its attention has sinks and windows, which megatron-core (0.16 to 0.19) without Transformer Engine "
    "computes neither packed nor under context parallelism, and its experts have biases",
    "deepseek_v2": "it chooses groups of experts by their best one, and megatron-core by the sum of several; V2-Lite, "
    "which has no groups, is not built either",
}
# Upper limits of the integers in config.json (the lower limit is 1), far above any real model. They are checked before
# transformers reads the file, because it allocates lists of as many layers as the file says.
_WHOLE: Final = {
    "num_hidden_layers": 10_000,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "vocab_size": 2**24,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
    "num_experts": 2**14,
    "num_local_experts": 2**14,
    "num_experts_per_tok": 2**14,
    "moe_intermediate_size": 2**22,
    "decoder_sparse_step": 10_000,
    "n_routed_experts": 2**14,
    "n_shared_experts": 2**10,
    "kv_lora_rank": 2**20,
    "q_lora_rank": 2**20,
    "qk_nope_head_dim": 2**14,
    "qk_rope_head_dim": 2**14,
    "v_head_dim": 2**14,
    "n_group": 2**14,
    "topk_group": 2**14,
    "max_position_embeddings": 2**31,
}
_REAL: Final = {  # finite, above the first number and up to the second
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (0.0, 1e12),
    "attention_dropout": (-1e-9, 1.0),
    "router_jitter_noise": (-1e-9, 1.0),
    "routed_scaling_factor": (0.0, 1e4),
}
_TRUTH: Final = ("tie_word_embeddings", "attention_bias", "mlp_bias", "norm_topk_prob", "use_sliding_window")
_TRUTH_OF_MIXTURES: Final = ("qkv_bias", "use_qk_norm", "rope_interleave")
_MOST_CONFIG_BYTES: Final = 10**7
_MOST_EXPERTS: Final = 2**20  # of all layers
SUPPORTED_ROPE_TYPES: Final = ("default", "linear", "llama3", "yarn")


def read_architecture(path: str | Path) -> Architecture:
    """Read and check `path`/config.json.

    Raises CheckpointError (or NotBuiltError) naming the option and what is supported.
    """
    path = Path(path)
    raw = read_config_json(path)
    model_type, whole = raw.get("model_type"), None
    if isinstance(model_type, str) and model_type in (*FAMILIES, *REFUSED):
        whole, text = _vision_language(path, raw)
        vision, raw, model_type = read_vision(path, raw, whole), text, text.get("model_type")
    if not isinstance(model_type, str | None):
        raise CheckpointError(f"{path}: model_type is {shown(model_type)}; {_supported()}")
    if model_type in _OTHER_MOE_MODEL_TYPES:
        raise NotBuiltError(
            f"{path}: model_type {model_type!r} is a mixture of experts that is not built: "
            f"{_OTHER_MOE_MODEL_TYPES[model_type]}; {_supported()}"
        )
    if model_type not in _FAMILIES:
        raise CheckpointError(f"{path}: model_type {model_type!r} is not supported; {_supported()}")
    family = _FAMILIES[model_type]
    _check_raw(path, raw, family)
    _check_numbers(path, raw)
    refuse_unknown_options(path, raw, str(model_type))
    config = _load_config(path) if whole is None else whole.text_config
    _check_options(path, config)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    latent = read_latent(path, config) if model_type == "deepseek_v3" else None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if latent is not None:
        head_dim = latent.plain_dim + latent.rotary_dim
    for name in (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ):
        _check_whole(path, name, getattr(config, name))
    if heads % kv_heads != 0:
        raise CheckpointError(f"{path}: {heads} attention heads are not a multiple of {kv_heads} key/value heads")
    if head_dim % 2 != 0 or head_dim < 2:
        raise CheckpointError(f"{path}: head_dim {head_dim} is odd or 0; rotary embeddings need an even one")
    _check_real(path, "rms_norm_eps", config.rms_norm_eps)
    if type(config.tie_word_embeddings) is not bool:
        raise CheckpointError(f"{path}: tie_word_embeddings is {shown(config.tie_word_embeddings)}; give true or false")
    return Architecture(
        model_type=model_type,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied_embeddings=bool(config.tie_word_embeddings),
        qkv_bias=bool(getattr(config, _SWITCHES.get((config.model_type, "bias"), ""), family.qkv_bias)),
        qk_norm=bool(getattr(config, _SWITCHES.get((config.model_type, "norm"), ""), family.qk_norm)),
        norm_eps=float(config.rms_norm_eps),
        max_position_embeddings=config.max_position_embeddings,
        rope=replace(
            _read_rope(
                path,
                config,
                latent.rotary_dim if latent else head_dim,
                partial=family.partial_rope,
                may_be_dynamic=whole is not None,
            ),
            sections=() if whole is None else _sections(path, whole, head_dim),
        ),
        moe=read_experts(path, config) if family.experts else None,
        qk_norm_over_heads=model_type == "olmoe",
        latent=latent,
        num_predict_layers=_predict_layers(path, config),
        vision=None if whole is None else vision,
    )


def _vision_language(path: Path, raw: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """transformers' configuration of a vision-language model, and the decoder's part of config.json."""
    model_type = raw["model_type"]
    if model_type in REFUSED:
        raise NotBuiltError(f"{path}: model_type {model_type!r} is not built: {REFUSED[model_type]}; {_supported()}")
    family = FAMILIES[model_type]
    text = family.decoder_options(raw)
    if not isinstance(text, dict) or not isinstance(raw.get("vision_config"), dict):
        raise CheckpointError(f"{path}: a {model_type} config.json needs the objects text_config and vision_config")
    text = {name: value for name, value in text.items() if name not in family.unread}
    _check_raw(path, raw, _Family(family.hf_class))
    _check_numbers(path, text)
    _check_numbers(path, {name: value for name, value in raw.items() if name in _TRUTH})
    whole = _load_config(path)
    if family.decoders:
        whole.text_config.tie_word_embeddings = bool(whole.tie_word_embeddings)
        kind = str(text.get("model_type", whole.text_config.model_type))
        return whole, {
            **{name: _without_sections(value) for name, value in text.items()},
            "model_type": family.decoders.get(kind, kind),
            "tie_word_embeddings": whole.text_config.tie_word_embeddings,
        }
    # The top level decides, as in transformers. Where it has no entry, transformers' default is true, but a stored head
    # is loaded nevertheless; so the decoder's own entry is what is meant.
    tied = raw.get("tie_word_embeddings", whole.text_config.tie_word_embeddings)
    whole.text_config.tie_word_embeddings = tied
    return whole, {**text, "tie_word_embeddings": tied}


def _without_sections(option: Any) -> Any:
    """RoPE's options without the M-RoPE sections, which `_sections` reads."""
    if not isinstance(option, dict):
        return option
    return {name: value for name, value in option.items() if name != "mrope_section"}


def _sections(path: Path, whole: Any, head_dim: int) -> tuple[int, ...]:
    """Number of pairs of a head that each of a token's three positions turns; () without M-RoPE."""
    if not FAMILIES[whole.model_type].decoders:
        return ()
    sections = whole.text_config.rope_parameters.get("mrope_section", [16, 24, 24])  # as transformers has it
    usable = isinstance(sections, list) and len(sections) == 3 and all(type(n) is int and n > 0 for n in sections)
    if not usable or sum(sections) != head_dim // 2:
        raise CheckpointError(
            f"{path}: mrope_section is {str(sections)[:80]}; it must be three positive integers whose sum is "
            f"{head_dim // 2}"
        )
    return tuple(sections)


# Options that switch the bias of q, k and v, and the norm of q and k, where the family does not determine them.
_SWITCHES: Final = {
    ("qwen2_moe", "bias"): "qkv_bias",
    ("glm4_moe", "bias"): "attention_bias",
    ("glm4_moe", "norm"): "use_qk_norm",
}


def _predict_layers(path: Path, config: Any) -> int:
    number = getattr(config, "num_nextn_predict_layers", 0) or 0
    try:
        return whole_number(number, 100)
    except ValueError as error:
        raise CheckpointError(f"{path}: num_nextn_predict_layers must be an integer, 0 or more: {error}") from None


def read_config_json(path: str | Path) -> dict[str, Any]:
    """The content of the directory's config.json. Raises CheckpointError if it cannot be read."""
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(
            f"{path} is not a directory; give a local Hugging Face model directory (download it first)"
        )
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path} has no config.json; it is not a Hugging Face model directory")
    refuse_lfs_pointer(file)
    try:
        raw = read_json(file, most_bytes=_MOST_CONFIG_BYTES)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{file} is damaged: it holds {type(raw).__name__}, not an object")
    return raw


def _supported() -> str:
    return f"supported are {', '.join(SUPPORTED_MODEL_TYPES)}, and with images {', '.join(FAMILIES)}"


def _load_config(path: Path) -> Any:
    """transformers' configuration object: defaults filled in, old and new spellings of RoPE unified."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(str(path), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # transformers raises KeyError, TypeError and its own validation errors for a bad field
        raise CheckpointError(f"{path}/config.json is refused by transformers: {error}") from error


def _check_raw(path: Path, raw: dict[str, Any], family: _Family) -> None:
    """Refuse options that transformers' configuration class would hide or act on."""
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            raise CheckpointError(
                f"{path}: {key} is set; quantised checkpoints are not supported, give the full-precision model"
            )
    if raw.get("auto_map"):
        raise CheckpointError(
            f"{path}: config.json asks for remote code (auto_map), which is never run; {_supported()}"
        )
    classes = raw.get("architectures") or [family.hf_class]
    if classes != [family.hf_class]:
        raise CheckpointError(
            f"{path}: architectures is {classes}; for this model_type only {family.hf_class} is supported"
        )


def _check_numbers(path: Path, raw: dict[str, Any]) -> None:
    """Check types and ranges of the given values; null means transformers' default."""
    for name, value in raw.items():
        if value is None:
            continue
        if name in _WHOLE:
            _check_whole(path, name, value)
        elif name in _REAL:
            _check_real(path, name, value)
        elif name in _TRUTH + _TRUTH_OF_MIXTURES and type(value) is not bool:
            raise CheckpointError(f"{path}: {name} is {shown(value)}; give true or false")
        elif name in ("layer_types", "mlp_only_layers"):
            kind = str if name == "layer_types" else int
            if not isinstance(value, list) or not all(type(item) is kind for item in value):
                raise CheckpointError(f"{path}: {name} is {shown(value)}; it must be a list of {kind.__name__}")
        elif name in ("rope_scaling", "rope_parameters"):
            _check_rope_numbers(path, name, value)
    experts = raw.get("num_experts") or raw.get("num_local_experts") or raw.get("n_routed_experts") or 1
    if (raw.get("num_hidden_layers") or 1) * experts > _MOST_EXPERTS:
        raise CheckpointError(
            f"{path}: {raw['num_hidden_layers']} layers of {experts} experts are more than the {_MOST_EXPERTS} experts "
            "that are read; correct num_hidden_layers or the number of experts"
        )


def _check_rope_numbers(path: Path, name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {name} is {shown(value)}; it must be an object")
    for key, item in value.items():
        if key in ("rope_type", "type"):
            if not isinstance(item, str):
                raise CheckpointError(f"{path}: {name}.{key} is {shown(item)}; it must be a string")
        elif item is not None and type(item) not in (bool, list):
            _check_real(path, f"{name}.{key}", item, _REAL.get(key, (-1e-9, 1e12)))


def _check_whole(path: Path, name: str, value: Any) -> None:
    try:
        whole_number(value, _WHOLE[name], 1)
    except ValueError as error:
        raise CheckpointError(f"{path}: {name} must be a positive integer: {error}") from None


def _check_real(path: Path, name: str, value: Any, limits: tuple[float, float] | None = None) -> None:
    above, most = limits or _REAL[name]
    if type(value) not in (int, float) or not above < value <= most:  # NaN is refused too
        least = "0 or more" if above < 0 else f"above {above:g}"
        raise CheckpointError(f"{path}: {name} is {shown(value)}; it must be a number {least}, at most {most:g}")


def _check_options(path: Path, config: Any) -> None:
    """Refuse every option that changes what the model computes and is not supported."""
    refusals: list[tuple[bool, str]] = [
        (getattr(config, "is_heterogeneous", False), "layers with configurations of their own (per_layer_config)"),
        (config.hidden_act != "silu", f"hidden_act {config.hidden_act!r} (supported: silu)"),
        (bool(getattr(config, "mlp_bias", False)), "mlp_bias true (biases on gate, up and down projections)"),
        # In llama and qwen3 it also adds o_proj.bias; qwen2 always has its q/k/v bias, as in transformers.
        (
            config.model_type not in ("qwen2", "glm4_moe") and bool(getattr(config, "attention_bias", False)),
            "attention_bias true (it adds a bias to o_proj)",
        ),
        (bool(getattr(config, "attention_dropout", 0.0)), "attention_dropout above 0 (set it to 0 in config.json)"),
        (bool(getattr(config, "router_jitter_noise", 0.0)), "router_jitter_noise above 0 (set it to 0 in config.json)"),
        (getattr(config, "clip_qkv", None) is not None, "clip_qkv (queries, keys and values clipped to a range)"),
        (_uses_sliding_window(config), "a sliding window (sliding_window / layer_types; supported: full attention)"),
    ]
    for refused, what in refusals:
        if refused:
            raise CheckpointError(f"{path}: config.json asks for {what}: not supported")


def _uses_sliding_window(config: Any) -> bool:
    # These models read layer_types (modeling_qwen2.py, modeling_qwen3.py, ...), the others only sliding_window.
    if config.model_type in ("qwen2", "qwen3", "qwen2_moe") and getattr(config, "layer_types", None):
        return any(kind != "full_attention" for kind in config.layer_types)
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return True
    return any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ())


def _read_rope(path: Path, config: Any, head_dim: int, *, partial: bool, may_be_dynamic: bool) -> Rope:
    """RoPE numbers from transformers' own functions; the default type, which has no function there, is one line.

    Type `dynamic` equals the default up to max_position_embeddings. It is accepted in vision-language models
    (InternVL 3 has it) and refused in text models.

    Args:
        head_dim: dimensions of a head that can be rotated.
        partial: whether the family supports a partial_rotary_factor.
    """
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict) or "rope_theta" not in parameters:
        raise CheckpointError(f"{path}: no RoPE parameters found (rope_theta, or rope_parameters.rope_theta)")
    kind = parameters.get("rope_type", "default")
    most = config.max_position_embeddings if kind == "dynamic" and may_be_dynamic else None
    if most is not None:
        kind = "default"
    if kind not in SUPPORTED_ROPE_TYPES:
        raise CheckpointError(
            f"{path}: rope_type {kind!r} is not supported; supported are {', '.join(SUPPORTED_ROPE_TYPES)}"
        )
    factor = parameters.get("partial_rotary_factor")
    if factor not in (None, 1.0) and not partial:
        raise CheckpointError(f"{path}: partial_rotary_factor {factor} is not supported (only 1)")
    if factor is not None and partial:
        _check_real(path, "partial_rotary_factor", factor, (0.0, 1.0))
        head_dim = int(head_dim * factor)
        if head_dim % 2 or not head_dim:
            raise CheckpointError(
                f"{path}: partial_rotary_factor {factor} rotates {head_dim} dimensions; an even number is needed"
            )
    _check_real(path, "rope_theta", parameters["rope_theta"])
    if kind == "default":
        inv_freq = 1.0 / parameters["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        _check_frequencies(path, kind, inv_freq, 1.0, head_dim)
        return Rope(tuple(inv_freq.tolist()), 1.0, most)
    compute: Callable[[Any], tuple[torch.Tensor, float]] = ROPE_INIT_FUNCTIONS[kind]
    try:
        inv_freq, attention_factor = compute(config)
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{path}: the parameters of rope_type {kind!r} are incomplete or wrong: {error!r}"
        ) from error
    _check_frequencies(path, kind, inv_freq, attention_factor, head_dim)
    return Rope(tuple(inv_freq.float().tolist()), float(attention_factor))


def _check_frequencies(path: Path, kind: str, inv_freq: Any, attention_factor: float, head_dim: int) -> None:
    """Raise CheckpointError unless the frequencies are finite and of the right number."""
    usable = len(inv_freq) == head_dim // 2 and bool((inv_freq.isfinite() & (inv_freq >= 0)).all())
    if not usable or not math.isfinite(attention_factor) or attention_factor <= 0:
        raise CheckpointError(f"{path}: the parameters of rope_type {kind!r} give no usable frequencies")
