"""What the weight tests share: dimensions of real models, and chunks with the parameter names of either layer spec.

Dimensions are those of the models' published config.json files, typed in. RoPE plays no part in weight maps.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch

from megatron_gkd.architecture import Architecture, Rope
from megatron_gkd.weights.naming import ROLES, layer_roles
from megatron_gkd.weights.plan import plan, shard_shape

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
    "SmolLM2-135M": ("llama", True, (30, 576, 9, 3, 64, 1536, 49152)),
}


def architecture(model_type: str, tied: bool, numbers: Iterable[int]) -> Architecture:
    sizes = dict(zip(_FIELDS, numbers, strict=True))
    return Architecture(
        model_type=model_type,
        tied_embeddings=tied,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type == "qwen3",
        norm_eps=1e-6,
        max_position_embeddings=4096,
        rope=Rope((1.0,) * (sizes["head_dim"] // 2), 1.0),
        **sizes,
    )


REAL_MODELS = {name: architecture(*fields) for name, fields in _REAL.items()}


def small(model_type: str = "qwen3", *, tied: bool = False, kv_heads: int = 2, vocab_size: int = 50) -> Architecture:
    """layers 4, hidden 12, heads 4 of 6, ffn 20: every size is another, so that a mix-up changes a shape."""
    return architecture(model_type, tied, (4, 12, 4, kv_heads, 6, 20, vocab_size))


Spec = Literal["local", "te"]


def core_name(role: str, layer: int | None, spec: Spec) -> str:
    """megatron-core's name of a role's parameter."""
    names = ROLES[role].core_names
    name = names[-1] if spec == "te" else names[0]
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
) -> Any:
    """A module with the names and shapes of a megatron-core chunk, all parameters NaN; it needs no megatron-core."""
    chunk = torch.nn.Module()
    chunk.pre_process, chunk.post_process = first, last

    def add(role: str, layer: int | None, local: int | None) -> None:
        if role not in without:
            shape = shard_shape(role, layer, arch, plan(role, layer, arch, 0, tp, padded_vocab))
            value = torch.full(shape, torch.nan, dtype=dtype)
            put(chunk, core_name(role, local, spec), torch.nn.Parameter(value))

    if first:
        add("embedding", None, None)
    for local, layer in enumerate(range(arch.num_layers) if layers is None else layers):
        for role in layer_roles(arch):
            add(role, layer, local)
        chunk.get_submodule(f"decoder.layers.{local}").layer_number = layer + 1
    chunk.decoder.layers = torch.nn.ModuleList(chunk.decoder.layers.children())
    if last:
        add("final_norm", None, None)
        if not (first and arch.tied_embeddings):
            add("head", None, None)
    return chunk


def put(module: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> None:
    """Register a parameter under a dotted name, making the modules on the way."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in dict(module.named_children()):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(leaf, parameter)
