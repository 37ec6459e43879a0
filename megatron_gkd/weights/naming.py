"""Names: which Hugging Face tensors make up a megatron-core parameter. Data and a parser only.

A ROLE is the purpose of a parameter ("qkv", "down", ...), whatever a layer spec calls it. `ROLES` is the whole table:
the HF names in the order in which the transform lays them out, the megatron-core names, and the TRANSFORM (plan.py)
between the two. megatron-core's local spec and its TransformerEngine spec use the same names except for experts and the
two norms in front of the linear layers. TransformerEngine fuses these norms into the next layer (in a layer with
experts only the first, because the router reads the second one too).

A name without a rule is an error and is never skipped: an unknown parameter would keep its initial value.

The tensors of a vision tower and its projector (model/vision.py) are units of their own, replicated over TP, with
transformers' names. Names in files have the prefixes of the directory's spelling (model/vision_config.py).

Not supported: router biases that are added to logits, multi-token prediction (refused by name).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import CheckpointError, NotBuiltError

Transform = Literal["replicated", "columns", "rows", "vocabulary", "qkv", "gated"]


@dataclass(frozen=True)
class Role:
    """One kind of parameter."""

    name: str
    transform: Transform
    hf_names: tuple[str, ...]  # "{layer}" and "{expert}" are global indices
    core_names: tuple[str, ...]  # without the layer prefix: the local spec's, then TransformerEngine's if it differs
    per_layer: bool = True
    per_expert: bool = False
    present: Callable[[Architecture, int], bool] = lambda arch, layer: True
    hf_names_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # model_type -> other names


class Unit(NamedTuple):
    """One parameter of the whole model, the unit of loading plans and of the export. Indices are global."""

    role: str
    layer: int | None = None
    expert: int | None = None
    name: str | None = None  # of the role "vision": transformers' name of a tensor of tower or projector

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        where = "" if self.layer is None else f" in layer {self.layer}"
        return self.role + where + ("" if self.expert is None else f", expert {self.expert}")


class ParsedName(NamedTuple):
    """The meaning of a megatron-core parameter name."""

    role: str
    layer: int | None  # local to the model chunk: the global index is decoder.layers[layer].layer_number - 1
    expert: int | None  # local to the expert-parallel rank
    name: str | None = None  # see Unit


_L = "model.layers.{layer}."
_E = _L + "mlp.experts.{expert}."
_MIXTRAL = _L + "block_sparse_moe.experts.{expert}."
_S = _L + "mlp.shared_expert."
_ATTENTION = tuple(f"{_L}self_attn.{x}_proj" for x in "qkv")


def _has_experts(arch: Architecture, layer: int) -> bool:
    return arch.has_experts(layer)


def _is_dense(arch: Architecture, layer: int) -> bool:
    return not arch.has_experts(layer)


def _has_shared_experts(arch: Architecture, layer: int) -> bool:
    return arch.moe is not None and arch.moe.shared_ffn_hidden_size > 0 and arch.has_experts(layer)


def _query_rank(arch: Architecture) -> int | None:
    return None if arch.latent is None else arch.latent.query_rank


_LATENT = (
    Role(
        "query",
        "rows",
        (_L + "self_attn.q_proj.weight",),
        ("self_attention.linear_q_proj.weight",),
        present=lambda arch, layer: arch.latent is not None and arch.latent.query_rank is None,
    ),
    Role(
        "query_down",
        "replicated",
        (_L + "self_attn.q_a_proj.weight",),
        ("self_attention.linear_q_down_proj.weight",),
        present=lambda arch, layer: _query_rank(arch) is not None,
    ),
    Role(
        "query_up",
        "rows",
        (_L + "self_attn.q_b_proj.weight",),
        ("self_attention.linear_q_up_proj.weight",),
        present=lambda arch, layer: _query_rank(arch) is not None,
    ),
    Role(
        "latent_down",
        "replicated",
        (_L + "self_attn.kv_a_proj_with_mqa.weight",),
        ("self_attention.linear_kv_down_proj.weight",),
        present=lambda arch, layer: arch.latent is not None,
    ),
    Role(
        "latent_norm",
        "replicated",
        (_L + "self_attn.kv_a_layernorm.weight",),
        ("self_attention.kv_layernorm.weight",),
        present=lambda arch, layer: arch.latent is not None,
    ),
    Role(
        "latent_up",
        "rows",
        (_L + "self_attn.kv_b_proj.weight",),
        ("self_attention.linear_kv_up_proj.weight",),
        present=lambda arch, layer: arch.latent is not None,
    ),
)

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
        Role(
            "qkv",
            "qkv",
            tuple(f"{x}.weight" for x in _ATTENTION),
            ("self_attention.linear_qkv.weight",),
            present=lambda arch, layer: arch.latent is None,
        ),
        Role(
            "qkv_bias",
            "qkv",
            tuple(f"{x}.bias" for x in _ATTENTION),
            ("self_attention.linear_qkv.bias",),
            present=lambda arch, layer: arch.qkv_bias,
        ),
        Role(
            "query_norm",
            "replicated",
            (_L + "self_attn.q_norm.weight",),
            ("self_attention.q_layernorm.weight",),
            present=lambda arch, layer: (arch.qk_norm and not arch.qk_norm_over_heads) or _query_rank(arch) is not None,
            hf_names_of={"deepseek_v3": (_L + "self_attn.q_a_layernorm.weight",)},
        ),
        Role(
            "key_norm",
            "replicated",
            (_L + "self_attn.k_norm.weight",),
            ("self_attention.k_layernorm.weight",),
            present=lambda arch, layer: arch.qk_norm and not arch.qk_norm_over_heads,
        ),
        *(
            Role(
                f"{role}_norm_over_heads",
                "rows",
                (f"{_L}self_attn.{x}_norm.weight",),
                (f"self_attention.{x}_layernorm.weight_over_heads",),
                present=lambda arch, layer: arch.qk_norm_over_heads,
            )
            for role, x in (("query", "q"), ("key", "k"))
        ),
        *_LATENT,
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
            present=_is_dense,
        ),
        Role("down", "columns", (_L + "mlp.down_proj.weight",), ("mlp.linear_fc2.weight",), present=_is_dense),
        Role(
            "router",
            "replicated",
            (_L + "mlp.gate.weight",),
            ("mlp.router.weight",),
            present=_has_experts,
            hf_names_of={"mixtral": (_L + "block_sparse_moe.gate.weight",)},
        ),
        Role(
            "correction_bias",
            "replicated",
            (_L + "mlp.gate.e_score_correction_bias",),
            ("mlp.router.expert_bias",),
            present=lambda arch, layer: arch.has_experts(layer) and arch.moe is not None and arch.moe.correction_bias,
        ),
        Role(
            "shared_gate_up",
            "gated",
            (_L + "mlp.shared_experts.gate_proj.weight", _L + "mlp.shared_experts.up_proj.weight"),
            ("mlp.shared_experts.linear_fc1.weight",),
            present=_has_shared_experts,
            hf_names_of={"qwen2_moe": (_S + "gate_proj.weight", _S + "up_proj.weight")},
        ),
        Role(
            "shared_down",
            "columns",
            (_L + "mlp.shared_experts.down_proj.weight",),
            ("mlp.shared_experts.linear_fc2.weight",),
            present=_has_shared_experts,
            hf_names_of={"qwen2_moe": (_S + "down_proj.weight",)},
        ),
        Role(
            "shared_gate",
            "replicated",
            (_L + "mlp.shared_expert_gate.weight",),
            ("mlp.shared_experts.gate_weight",),
            present=lambda arch, layer: _has_shared_experts(arch, layer) and bool(arch.moe and arch.moe.shared_gate),
        ),
        Role(
            "expert_gate_up",
            "gated",
            (_E + "gate_proj.weight", _E + "up_proj.weight"),
            ("mlp.experts.local_experts.{expert}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{expert}"),
            per_expert=True,
            present=_has_experts,
            hf_names_of={"mixtral": (_MIXTRAL + "w1.weight", _MIXTRAL + "w3.weight")},
        ),
        Role(
            "expert_down",
            "columns",
            (_E + "down_proj.weight",),
            ("mlp.experts.local_experts.{expert}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{expert}"),
            per_expert=True,
            present=_has_experts,
            hf_names_of={"mixtral": (_MIXTRAL + "w2.weight",)},
        ),
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

VISION: Final = "vision"  # tensors of tower and projector: no row of the table, each of them is its own, replicated
_VISION_PREFIX: Final = "vision."  # of their names in the model
_LAYER: Final = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_BY_NAME: Final = {(role.per_layer, name): role.name for role in ROLES.values() for name in role.core_names}
_EXPERT: Final = re.compile(r"(?<=local_experts\.)\d+|(?<=\.weight)\d+$")
_NOT_BUILT: Final = (
    (re.compile(r"\.mlp\.router\.bias$"), "router biases"),
    (re.compile(r"\.mlp\.experts\.(linear_fc[12]\.weight|weight[12])$"), "experts in one tensor"),
    (re.compile(r"^mtp\."), "multi-token prediction"),
)

# Entries of HF checkpoints that hold no weight; any other tensor that no role needs is an error.
_IGNORED_HF: Final = (
    # Recomputed from the config, by transformers too.
    re.compile(r"(language_model\.)?model\.(language_model\.)?(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    re.compile(r"(model\.)?vision_(tower|model)\.([a-z_]+\.)*position_ids"),  # 0, 1, 2, ...
    re.compile(r"(model\.)?visual\.rotary_pos_emb\.inv_freq"),
)


def parse(name: str) -> ParsedName:
    """Parse a parameter name of an unwrapped megatron-core GPTModel, of either layer spec."""
    if name.startswith(_VISION_PREFIX):
        return ParsedName(VISION, None, None, name.removeprefix(_VISION_PREFIX))
    for pattern, what in _NOT_BUILT:
        if pattern.search(name):
            raise NotBuiltError(f"parameter {name!r} belongs to {what}, which are not built yet")
    match = _LAYER.fullmatch(name)
    expert = _EXPERT.search(match[2]) if match else None
    pattern_name = _EXPERT.sub("{expert}", match[2]) if match else name
    role = _BY_NAME.get((match is not None, pattern_name))
    if role is None:
        raise CheckpointError(
            f"no rule for the megatron-core parameter {name!r}; known are "
            + ", ".join(sorted(("decoder.layers.N." if per_layer else "") + known for per_layer, known in _BY_NAME))
        )
    return ParsedName(role, int(match[1]) if match else None, int(expert[0]) if expert else None)


def is_extra_state(name: str) -> bool:
    """Whether it is one of TransformerEngine's `_extra_state` entries (fp8 scales; of experts numbered): in a state
    dict, but not a weight."""
    return name.rsplit(".", 1)[-1].rstrip("0123456789") == "_extra_state"


ADAPTER_KEYS: Final = "adapter.layers."  # how keys of adapters begin in a distributed checkpoint


def is_adapter(name: str) -> bool:
    """Whether it is a matrix of an adapter (model/lora.py), which has no role (weights/adapters.py)."""
    return name.endswith((".adapter.A", ".adapter.B"))


def hf_names(unit: Unit, arch: Architecture) -> tuple[str, ...]:
    """HF tensors of a unit, in the transform's order. A tied head is the embedding."""
    if unit.name is not None:
        assert arch.vision is not None, unit
        return (arch.vision.stored_name(unit.name),)
    entry = ROLES["embedding" if unit.role == "head" and arch.tied_embeddings else unit.role]
    assert (entry.per_layer, entry.per_expert) == (unit.layer is not None, unit.expert is not None), unit
    names = entry.hf_names_of.get(arch.model_type, entry.hf_names)
    names = tuple(name.format(layer=unit.layer, expert=unit.expert) for name in names)
    return names if arch.vision is None else tuple(map(arch.vision.stored_name, names))


def transform(unit: Unit) -> Transform:
    """How the unit's parameter is made from its HF tensors."""
    return "replicated" if unit.role == VISION else ROLES[unit.role].transform


def vision_units(arch: Architecture) -> Iterator[Unit]:
    """The tensors of tower and projector, each a unit."""
    if arch.vision is not None:
        yield from (Unit(VISION, name=name) for name in arch.vision.shapes)


def layer_roles(arch: Architecture, layer: int) -> tuple[str, ...]:
    """The roles that a decoder layer of this architecture has, in the order of the HF checkpoint's layer."""
    return tuple(role.name for role in ROLES.values() if role.per_layer and role.present(arch, layer))


def layer_units(arch: Architecture, layer: int, experts: range | None = None) -> Iterator[Unit]:
    """The units of a decoder layer, expert by expert; only those of `experts`, if given."""
    roles = layer_roles(arch, layer)
    yield from (Unit(role, layer) for role in roles if not ROLES[role].per_expert)
    if arch.moe is not None:
        for expert in range(arch.moe.num_experts) if experts is None else experts:
            yield from (Unit(role, layer, expert) for role in roles if ROLES[role].per_expert)


def is_ignored_hf_name(name: str) -> bool:
    """Whether a tensor of an HF checkpoint is known to hold no weight."""
    return any(pattern.fullmatch(name) for pattern in _IGNORED_HF)


def predicts_ahead(name: str, arch: Architecture) -> bool:
    """Whether the tensor belongs to a multi-token prediction layer behind the decoder's layers. transformers ignores
    those too."""
    first = arch.num_layers
    return name.startswith(tuple(f"model.layers.{n}." for n in range(first, first + arch.num_predict_layers)))
