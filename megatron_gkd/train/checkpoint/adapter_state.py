"""Adapters (model/lora.py) in megatron-core's dist_checkpointing: each matrix has its own key, by the role and the
global layer of its weight, and is sharded as the weight is. So a checkpoint of adapters can be loaded in any layout,
like one of whole models, and contains nothing of the base. Modules that are trained whole have megatron-core's own
keys.

    adapter.layers.3.qkv.B      [rows of q, k and v in megatron-core's order, r]: chunks of rows over TP
    adapter.layers.3.gate_up.B  [gate; up]: a rank has a chunk of each, by megatron-core's factory for the weight
    adapter.layers.3.expert_down.5.A    of global expert 5, sharded over the expert-tensor ranks
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_gkd.model.lora import Adapter
from megatron_gkd.weights.naming import ADAPTER_KEYS, ROLES, is_adapter, parse


def sharded_adapters(chunk: Any, groups: ProcessGroupCollection, metadata: dict[str, Any]) -> dict[str, Any]:
    """Parameter name in the chunk -> its part of the whole tensor; empty for a chunk without adapters.

    Args:
        metadata: for megatron-core's `sharded_state_dict`.
    """
    found: dict[str, Any] = {}
    for name, adapter in _adapters(chunk):
        role, layer, expert, _ = parse(f"{name}.weight")
        assert layer is not None, name
        block = chunk.decoder.layers[layer]
        key = f"{ADAPTER_KEYS}{block.layer_number - 1}.{role}"
        if expert is not None:
            key += f".{groups.ep.rank() * block.mlp.num_local_experts + expert}"
        for kind, parameter, axis in (("A", adapter.A, 1), ("B", adapter.B, 0)):
            sharded = _sharded(f"{key}.{kind}", parameter, axis if kind == adapter.cut else None, adapter, groups)
            if kind == "B" and ROLES[role].transform == "gated":
                sharded = apply_swiglu_sharded_factory(sharded, ())
            found[f"{name}.adapter.{kind}"] = sharded
    if found and (whole := _whole(chunk)):
        own = chunk.sharded_state_dict(metadata=metadata)
        found |= {name: own[name] for name in whole}
    return found


def _whole(chunk: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters that are trained and do not belong to an adapter."""
    return {name: p for name, p in chunk.named_parameters() if p.requires_grad and not is_adapter(name)}


def _sharded(
    key: str, parameter: torch.nn.Parameter, axis: int | None, adapter: Adapter, groups: ProcessGroupCollection
) -> Any:
    """`axis`: the dimension that is sharded over the TP ranks; None: replicated."""
    tp, replicas = adapter.tp_group, groups.expt_dp if adapter.is_expert else groups.dp_cp
    copy = 0 if axis is not None else tp.rank()
    offsets = [] if axis is None else [(axis, tp.rank(), tp.size())]
    return ShardedTensor.from_rank_offsets(key, parameter, *offsets, replica_id=(0, copy, replicas.rank()))


@torch.no_grad()
def load_adapters(chunk: Any, loaded: Mapping[str, torch.Tensor]) -> bool:
    """Copy the loaded values of `sharded_adapters`; False for a chunk without adapters."""
    own = {f"{name}.adapter.{kind}": getattr(a, kind) for name, a in _adapters(chunk) for kind in "AB"}
    if own:
        own |= _whole(chunk)
        assert own.keys() == loaded.keys(), sorted(own.keys() ^ loaded.keys())
        for name, parameter in own.items():
            parameter.copy_(loaded[name])
    return bool(own)


def _adapters(chunk: torch.nn.Module) -> list[tuple[str, Adapter]]:
    """(name of the adapted layer, adapter)."""
    modules = chunk.named_modules()
    return [(name.removesuffix(".adapter"), module) for name, module in modules if isinstance(module, Adapter)]
