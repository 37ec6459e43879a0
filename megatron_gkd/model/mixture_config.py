"""Reads the numbers of mixtures of experts and of latent attention from a config.json, or refuses them.

    read_experts(path, config)      MixtureOfExperts, for every family with experts
    read_latent(path, config)       LatentAttention (deepseek_v3, Moonlight)

`config` is the file as transformers parses it. Routing, with s the scores of a token over E experts:

    softmax families   s = softmax(logits); the top k of s; weights s, or s over their sum (norm_topk_prob; mixtral)
    sigmoid families   s = sigmoid(logits); the top k of s + correction bias, within the best groups; weights
                       scaling * s over their sum. The bias only affects the choice and has no gradient.

Groups (deepseek_v3, glm4_moe): the experts lie in `groups` groups, and a token's experts come from the `top_groups`
groups with the largest sum of their two best scores. megatron-core (0.16 - 0.19) sums the best k / top_groups instead.
So only k / top_groups = 2 is supported, or no limit: one group, or all groups allowed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from megatron_gkd.config.json_file import shown, whole_number
from megatron_gkd.errors import CheckpointError
from megatron_gkd.records import LATER, StableText


@dataclass(frozen=True, repr=False)
class MixtureOfExperts(StableText):
    """Layers whose MLP is routed: each token goes to the `top_k` experts with the largest router scores."""

    num_experts: int
    top_k: int
    ffn_hidden_size: int  # of one expert
    normalise_top_k: bool  # weights are a softmax over the chosen experts; False: over all experts, not normalised
    layers: tuple[int, ...]  # that have experts; the others have an ordinary MLP
    score: Literal["softmax", "sigmoid"] = field(default="softmax", metadata=LATER)
    scaling: float = field(default=1.0, metadata=LATER)  # of the weights
    # A number for each expert that is added where experts are chosen.
    correction_bias: bool = field(default=False, metadata=LATER)
    # (groups of experts, groups that a token's experts may be of).
    groups: tuple[int, int] | None = field(default=None, metadata=LATER)
    # Of the MLP that sees every token beside the experts; 0: there is none.
    shared_ffn_hidden_size: int = field(default=0, metadata=LATER)
    shared_gate: bool = field(default=False, metadata=LATER)  # its output times a sigmoid of its own

    def __post_init__(self) -> None:
        assert 1 <= self.top_k <= self.num_experts, self
        assert self.layers, self


@dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention: keys and values of all heads from one latent vector of a token."""

    query_rank: int | None  # of the queries' latent vector; None: they are projected at once
    kv_rank: int
    plain_dim: int  # of a head's query and key, without a position
    rotary_dim: int  # of a head's query and of the key that all heads share, with the position
    value_dim: int
    softmax_scale: float


_SIGMOID: Final = ("glm4_moe", "deepseek_v3")
_NUMBER: Final = {"mixtral": "num_local_experts", "glm4_moe": "n_routed_experts", "deepseek_v3": "n_routed_experts"}
_EXPERT_SIZE: Final = {"mixtral": "intermediate_size", "olmoe": "intermediate_size"}
_MOST: Final = 2**22


def read_experts(path: Path, config: Any) -> MixtureOfExperts:
    """Raises CheckpointError for inconsistent numbers and for routing that megatron-core does not support."""
    family: str = config.model_type
    num_experts = _whole(path, config, _NUMBER.get(family, "num_experts"))
    top_k = _whole(path, config, "num_experts_per_tok")
    ffn_hidden_size = _whole(path, config, _EXPERT_SIZE.get(family, "moe_intermediate_size"))
    if not 1 <= top_k <= num_experts:
        raise CheckpointError(f"{path}: {top_k} experts per token, and the layer has {num_experts}")
    normalise = family == "mixtral" or bool(config.norm_topk_prob)
    if top_k == 1 and normalise:
        raise CheckpointError(f"{path}: one expert per token with a normalised weight (always 1) is not supported")
    sigmoid = family in _SIGMOID
    if sigmoid and not normalise and top_k > 1:
        raise CheckpointError(
            f"{path}: norm_topk_prob false with a router of sigmoids: not supported, megatron-core normalises there"
        )
    return MixtureOfExperts(
        num_experts,
        top_k,
        ffn_hidden_size,
        normalise,
        _routed_layers(path, config),
        score="sigmoid" if sigmoid else "softmax",
        scaling=float(config.routed_scaling_factor) if sigmoid else 1.0,
        correction_bias=sigmoid,
        groups=_read_groups(path, config, num_experts, top_k) if sigmoid else None,
        shared_ffn_hidden_size=_shared_size(path, config),
        shared_gate=family == "qwen2_moe",
    )


def read_latent(path: Path, config: Any) -> LatentAttention:
    """Raises CheckpointError for inconsistent numbers and for options that megatron-core does not support."""
    plain, rotary = _whole(path, config, "qk_nope_head_dim"), _whole(path, config, "qk_rope_head_dim")
    if rotary % 2:
        raise CheckpointError(f"{path}: qk_rope_head_dim {rotary} is odd; rotary embeddings need an even one")
    if config.num_key_value_heads != config.num_attention_heads:
        raise CheckpointError(
            f"{path}: {config.num_key_value_heads} key/value heads of {config.num_attention_heads}: latent attention "
            "needs one for each head"
        )
    for name, wanted in (("head_dim", rotary), ("qk_head_dim", plain + rotary)):
        if getattr(config, name, wanted) != wanted:
            raise CheckpointError(f"{path}: {name} is {shown(getattr(config, name))}; the other sizes give {wanted}")
    if not config.rope_interleave:
        raise CheckpointError(
            f"{path}: rope_interleave false is not supported: megatron-core rotates interleaved pairs"
        )
    query_rank = None if config.q_lora_rank is None else _whole(path, config, "q_lora_rank")
    scale = (plain + rotary) ** -0.5 * _yarn_scale(getattr(config, "rope_parameters", None)) ** 2
    kv_rank, value = _whole(path, config, "kv_lora_rank"), _whole(path, config, "v_head_dim")
    return LatentAttention(query_rank, kv_rank, plain, rotary, value, scale)


def _yarn_scale(parameters: Any) -> float:
    """The factor that deepseek_v3 applies to queries and keys under RoPE scaling (yarn_apply_mscale)."""
    if not isinstance(parameters, dict) or parameters.get("rope_type", "default") == "default":
        return 1.0
    strength, factor = parameters.get("mscale_all_dim") or 0, parameters.get("factor") or 1.0
    return 0.1 * float(strength) * math.log(factor) + 1.0 if strength and factor > 1 else 1.0


def _routed_layers(path: Path, config: Any) -> tuple[int, ...]:
    layers = range(config.num_hidden_layers)
    routed = tuple(layers)
    if config.model_type in ("qwen2_moe", "qwen3_moe"):
        step, dense = config.decoder_sparse_step, tuple(config.mlp_only_layers or ())
        if not isinstance(step, int) or step < 1 or not set(dense) <= set(layers):
            raise CheckpointError(f"{path}: decoder_sparse_step {step!r} or mlp_only_layers {dense!r} is out of range")
        routed = tuple(layer for layer in layers if layer not in dense and (layer + 1) % step == 0)
    elif config.model_type in _SIGMOID:
        routed = tuple(layers[_whole(path, config, "first_k_dense_replace", least=0) :])
    if not routed:
        raise CheckpointError(f"{path}: no layer has experts; such a {config.model_type} is not supported")
    return routed


def _shared_size(path: Path, config: Any) -> int:
    if config.model_type == "qwen2_moe":
        return _whole(path, config, "shared_expert_intermediate_size")
    if config.model_type in _SIGMOID:
        return _whole(path, config, "n_shared_experts") * _whole(path, config, "moe_intermediate_size")
    return 0


def _read_groups(path: Path, config: Any, num_experts: int, top_k: int) -> tuple[int, int] | None:
    groups, top_groups = _whole(path, config, "n_group"), _whole(path, config, "topk_group")
    if num_experts % groups or top_groups > groups or num_experts // groups * top_groups < top_k:
        raise CheckpointError(
            f"{path}: {top_k} experts a token, of {top_groups} of the {groups} groups (n_group, topk_group) of "
            f"{num_experts} experts: the numbers do not fit together"
        )
    if num_experts // groups < 2:
        raise CheckpointError(f"{path}: {groups} groups of one expert: transformers sums the best two of a group")
    if groups == top_groups:
        return None
    if top_k // top_groups != 2:
        raise CheckpointError(
            f"{path}: {top_k} experts a token of {top_groups} groups are not supported: transformers chooses groups by "
            f"their best 2 experts, megatron-core by their best {top_k // top_groups} "
            "(num_experts_per_tok over topk_group)"
        )
    return groups, top_groups


def _whole(path: Path, config: Any, name: str, *, least: int = 1) -> int:
    try:
        return whole_number(getattr(config, name), _MOST, least)
    except ValueError as error:
        kind = "a positive integer" if least else "an integer, 0 or more"
        raise CheckpointError(f"{path}: {name} must be {kind}: {error}") from None
