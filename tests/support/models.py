"""What the weight tests share: dimensions of real models, and chunks with the parameter names of either layer spec.

Dimensions are those of the models' published config.json files, typed in. RoPE plays no part in weight maps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Literal

import torch

from megatron_gkd.architecture import Architecture, LatentAttention, MixtureOfExperts, Rope
from megatron_gkd.weights.naming import ROLES, Unit, layer_units
from megatron_gkd.weights.plan import plan, shard_shape
from tests.support.checkpoints import MIXTURES

_FIELDS = ("num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size", "vocab_size")
_REAL: dict[str, tuple[str, bool, tuple[int, ...]]] = {
    "Qwen3-0.6B": ("qwen3", True, (28, 1024, 16, 8, 128, 3072, 151936)),
    "Qwen3-8B": ("qwen3", False, (36, 4096, 32, 8, 128, 12288, 151936)),
    "Qwen3-32B": ("qwen3", False, (64, 5120, 64, 8, 128, 25600, 151936)),
    "Llama-3.2-1B": ("llama", True, (16, 2048, 32, 8, 64, 8192, 128256)),
    "Llama-3.1-8B": ("llama", False, (32, 4096, 32, 8, 128, 14336, 128256)),
    "Llama-3.1-70B": ("llama", False, (80, 8192, 64, 8, 128, 28672, 128256)),
    "Qwen2.5-0.5B": ("qwen2", True, (24, 896, 14, 2, 64, 4864, 151936)),
    "Qwen2.5-7B": ("qwen2", False, (28, 3584, 28, 4, 128, 18944, 152064)),
    "Qwen2.5-72B": ("qwen2", False, (80, 8192, 64, 8, 128, 29568, 152064)),
    "Qwen3-30B-A3B": ("qwen3_moe", False, (48, 2048, 32, 4, 128, 6144, 151936)),
    "Qwen3-235B-A22B": ("qwen3_moe", False, (94, 4096, 64, 4, 128, 12288, 151936)),
    "Mixtral-8x7B": ("mixtral", False, (32, 4096, 32, 8, 128, 14336, 32000)),
    "SmolLM2-135M": ("llama", True, (30, 576, 9, 3, 64, 1536, 49152)),
}
_EXPERTS: dict[str, tuple[int, int, int]] = {  # number, chosen per token, intermediate size
    "Qwen3-30B-A3B": (128, 8, 768),
    "Qwen3-235B-A22B": (128, 8, 1536),
    "Mixtral-8x7B": (8, 2, 14336),
}


def architecture(
    model_type: str, tied: bool, numbers: Iterable[int], experts: tuple[int, int, int] | None = None
) -> Architecture:
    sizes = dict(zip(_FIELDS, numbers, strict=True))
    return Architecture(
        model_type=model_type,
        tied_embeddings=tied,
        qkv_bias=model_type in ("qwen2", "qwen2_moe"),
        qk_norm=model_type in ("qwen3", "qwen3_moe", "olmoe"),
        norm_eps=1e-6,
        max_position_embeddings=4096,
        rope=Rope((1.0,) * (sizes["head_dim"] // 2), 1.0),
        moe=MixtureOfExperts(*experts, True, tuple(range(sizes["num_layers"]))) if experts else None,
        **sizes,
    )


REAL_MODELS = {name: architecture(*fields, _EXPERTS.get(name)) for name, fields in _REAL.items()}


def small(model_type: str = "qwen3", *, tied: bool = False, kv_heads: int = 2, vocab_size: int = 50) -> Architecture:
    """layers 4, hidden 12, heads 4 of 6, ffn 20: every size is another, so that a mix-up changes a shape."""
    experts = (4, 2, 28) if model_type in ("qwen3_moe", "mixtral", *MIXTURES) else None
    latent = LatentAttention(8, 10, 4, 2, 5, 0.4) if model_type == "deepseek_v3" else None
    heads = 4 if latent else kv_heads
    arch = architecture(model_type, tied, (4, 12, 4, heads, 6, 20, vocab_size), experts)
    if arch.moe is not None and model_type in ("qwen2_moe", "glm4_moe", "deepseek_v3"):
        more: dict[str, Any] = dict(shared_ffn_hidden_size=36, shared_gate=model_type == "qwen2_moe")
        if model_type != "qwen2_moe":
            more |= dict(score="sigmoid", correction_bias=True)
        arch = replace(arch, moe=replace(arch.moe, **more))
    return replace(arch, latent=latent, qk_norm_over_heads=model_type == "olmoe")


Spec = Literal["local", "te"]


def core_name(unit: Unit, arch: Architecture, spec: Spec, layer: int | None, expert: int | None = None) -> str:
    """megatron-core's name of a unit's parameter, which is in a local layer and a local expert."""
    names = ROLES[unit.role].core_names
    unfused = unit.role == "mlp_norm" and unit.layer is not None and arch.has_experts(unit.layer)
    unfused = unfused or (unit.role == "attention_norm" and arch.latent is not None)
    name = (names[-1] if spec == "te" and not unfused else names[0]).format(expert=expert)
    return name if layer is None else f"decoder.layers.{layer}.{name}"


def fake_chunk(
    arch: Architecture,
    *,
    layers: Iterable[int] | None = None,
    tp: int = 1,
    padded_vocab: int = 64,
    spec: Spec = "local",
    first: bool = True,
    last: bool = True,
    dtype: torch.dtype = torch.float32,
    without: tuple[str, ...] = (),
    experts: range | None = None,
) -> Any:
    """A module with the names and shapes of a megatron-core chunk, all parameters NaN; it needs no megatron-core."""
    chunk = torch.nn.Module()
    chunk.pre_process, chunk.post_process = first, last

    def add(unit: Unit, local: int | None = None) -> None:
        if unit.role not in without:
            shape = shard_shape(unit, arch, plan(unit, arch, 0, tp, padded_vocab))
            value = torch.full(shape, torch.nan, dtype=dtype)
            expert = None if unit.expert is None or experts is None else unit.expert - experts.start
            name = core_name(unit, arch, spec, local, unit.expert if experts is None else expert)
            put(chunk, name, torch.nn.Parameter(value))

    if first:
        add(Unit("embedding"))
    for local, layer in enumerate(range(arch.num_layers) if layers is None else layers):
        for unit in layer_units(arch, layer, experts):
            add(unit, local)
        chunk.get_submodule(f"decoder.layers.{local}").layer_number = layer + 1
    chunk.decoder.layers = torch.nn.ModuleList(chunk.decoder.layers.children())
    if last:
        add(Unit("final_norm"))
        if not (first and arch.tied_embeddings):
            add(Unit("head"))
    return chunk


def put(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Register a parameter under a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(module.named_children()):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, parameter)
