"""Names: which Hugging Face tensors a megatron-core parameter is made of. Data and a parser, nothing else.

A ROLE is what a parameter is for ("qkv", "down", ...), independent of how a layer spec spells it. `ROLES` is the
whole table: the HF names, in the order in which the transform lays them out, the patterns over megatron-core's names,
and the TRANSFORM (see plan.py) that turns one into the other. megatron-core's local spec and its TransformerEngine
spec share all names but the two norms in front of the linear layers, which TransformerEngine fuses into the layer
that follows them.

A name without a rule is an error, never skipped: a parameter that is not understood would stay at its random initial
value. Not covered: experts, routers, multi-token prediction (refused by name).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import CheckpointError, NotBuiltError

Transform = Literal["replicated", "columns", "vocabulary", "qkv", "gated"]


@dataclass(frozen=True)
class Role:
    """One kind of parameter."""

    name: str
    transform: Transform
    hf_names: tuple[str, ...]  # "{layer}" is the global layer index
    core_names: tuple[
        str, ...
    ]  # local spec first, then the TransformerEngine spec where it differs; without the layer prefix
    per_layer: bool = True
    present: Callable[[Architecture], bool] = lambda arch: True


class ParsedName(NamedTuple):
    """What a megatron-core parameter name means."""

    role: str
    layer: int | None  # local to the model chunk: the global index is decoder.layers[layer].layer_number - 1
    expert: int | None  # always None until experts are built


_L = "model.layers.{layer}."
_ATTENTION = tuple(f"{_L}self_attn.{x}_proj" for x in "qkv")

ROLES: Final[dict[str, Role]] = {
    role.name: role
    for role in (
        Role(
            "embedding",
            "vocabulary",
            ("model.embed_tokens.weight",),
            ("embedding.word_embeddings.weight",),
            per_layer=False,
        ),
        Role(
            "attention_norm",
            "replicated",
            (_L + "input_layernorm.weight",),
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
        ),
        Role("qkv", "qkv", tuple(f"{x}.weight" for x in _ATTENTION), ("self_attention.linear_qkv.weight",)),
        Role(
            "qkv_bias",
            "qkv",
            tuple(f"{x}.bias" for x in _ATTENTION),
            ("self_attention.linear_qkv.bias",),
            present=lambda arch: arch.qkv_bias,
        ),
        Role(
            "query_norm",
            "replicated",
            (_L + "self_attn.q_norm.weight",),
            ("self_attention.q_layernorm.weight",),
            present=lambda arch: arch.qk_norm,
        ),
        Role(
            "key_norm",
            "replicated",
            (_L + "self_attn.k_norm.weight",),
            ("self_attention.k_layernorm.weight",),
            present=lambda arch: arch.qk_norm,
        ),
        Role("attention_output", "columns", (_L + "self_attn.o_proj.weight",), ("self_attention.linear_proj.weight",)),
        Role(
            "mlp_norm",
            "replicated",
            (_L + "post_attention_layernorm.weight",),
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        ),
        Role(
            "gate_up",
            "gated",
            (_L + "mlp.gate_proj.weight", _L + "mlp.up_proj.weight"),
            ("mlp.linear_fc1.weight",),
        ),
        Role("down", "columns", (_L + "mlp.down_proj.weight",), ("mlp.linear_fc2.weight",)),
        Role(
            "final_norm",
            "replicated",
            ("model.norm.weight",),
            ("decoder.final_layernorm.weight",),
            per_layer=False,
        ),
        Role("head", "vocabulary", ("lm_head.weight",), ("output_layer.weight",), per_layer=False),
    )
}

_LAYER: Final = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_BY_NAME: Final = {(role.per_layer, name): role.name for role in ROLES.values() for name in role.core_names}
_NOT_BUILT: Final = (
    (re.compile(r"\.mlp\.(router|experts|shared_experts)\."), "mixture-of-experts layers"),
    (re.compile(r"^mtp\."), "multi-token prediction"),
)

# Entries of HF checkpoints that hold no weight; any other tensor that no role needs is an error.
_IGNORED_HF: Final = (
    re.compile(
        r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
    ),  # recomputed from the config, by transformers too
)


def parse(name: str) -> ParsedName:
    """Meaning of a parameter name of an unwrapped megatron-core GPTModel, of either layer spec."""
    for pattern, what in _NOT_BUILT:
        if pattern.search(name):
            raise NotBuiltError(f"parameter {name!r} belongs to {what}, which are not built yet")
    match = _LAYER.fullmatch(name)
    role = _BY_NAME.get((True, match[2]) if match else (False, name))
    if role is None:
        raise CheckpointError(
            f"no rule for the megatron-core parameter {name!r}; known are "
            + ", ".join(sorted(("decoder.layers.N." if per_layer else "") + known for per_layer, known in _BY_NAME))
        )
    return ParsedName(role, int(match[1]) if match else None, None)


def is_extra_state(name: str) -> bool:
    """TransformerEngine's `_extra_state` entries (fp8 scales) are in a state dict but are no weights."""
    return name.rsplit(".", 1)[-1] == "_extra_state"


def hf_names(role: str, layer: int | None, arch: Architecture) -> tuple[str, ...]:
    """HF tensors of a role, in the transform's order. A tied head is the embedding."""
    entry = ROLES["embedding" if role == "head" and arch.tied_embeddings else role]
    assert entry.per_layer == (layer is not None), (role, layer)
    return tuple(name.format(layer=layer) for name in entry.hf_names)


def layer_roles(arch: Architecture) -> tuple[str, ...]:
    """The roles that every decoder layer of this architecture has, in the order of the HF checkpoint's layer."""
    return tuple(role.name for role in ROLES.values() if role.per_layer and role.present(arch))


def is_ignored_hf_name(name: str) -> bool:
    """A tensor of an HF checkpoint that is known to hold no weight."""
    return any(pattern.fullmatch(name) for pattern in _IGNORED_HF)
