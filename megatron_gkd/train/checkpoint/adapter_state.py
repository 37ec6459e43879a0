"""Adapters (model/lora.py) as megatron-core's dist_checkpointing sees them: each matrix under a key of its own, by the
role and the global layer of its weight, cut as the weight is. So a checkpoint of adapters is loaded in any
layout, as one of whole models is, and holds nothing of the base.

    adapter.layers.3.qkv.B      [rows of q, k and v in megatron-core's order, r]: chunks of rows over TP
    adapter.layers.3.gate_up.B  [gate; up]: a rank has a chunk of each, as megatron-core's factory for the weight says
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from megatron_gkd.model.lora import Adapter
from megatron_gkd.weights.naming import ADAPTER_KEYS, ROLES, parse


def sharded_adapters(chunk: Any, groups: ProcessGroupCollection) -> dict[str, Any]:
    """Parameter name in the chunk -> its part of the whole tensor; empty for a chunk without adapters."""
    found: dict[str, Any] = {}
    for name, adapter in _adapters(chunk):
        role, layer, _, _ = parse(f"{name}.weight")
        assert layer is not None, name
        key = f"{ADAPTER_KEYS}{chunk.decoder.layers[layer].layer_number - 1}.{role}"
        for kind, parameter, axis in (("A", adapter.A, 1), ("B", adapter.B, 0)):
            is_cut = adapter.is_column == (kind == "B")
            sharded = _sharded(f"{key}.{kind}", parameter, axis if is_cut else None, adapter, groups)
            if kind == "B" and ROLES[role].transform == "gated":
                sharded = apply_swiglu_sharded_factory(sharded, ())
            found[f"{name}.adapter.{kind}"] = sharded
    return found


def _sharded(
    key: str, parameter: torch.nn.Parameter, axis: int | None, adapter: Adapter, groups: ProcessGroupCollection
) -> Any:
    """`axis`: along which the TP ranks have a part each; None: they have the same."""
    tp = adapter.tp_group
    copy = 0 if axis is not None else tp.rank()
    offsets = [] if axis is None else [(axis, tp.rank(), tp.size())]
    return ShardedTensor.from_rank_offsets(key, parameter, *offsets, replica_id=(0, copy, groups.dp_cp.rank()))


@torch.no_grad()
def load_adapters(chunk: Any, loaded: Mapping[str, torch.Tensor]) -> bool:
    """Copy what was read for `sharded_adapters`; False for a chunk without adapters."""
    own = {f"{name}.adapter.{kind}": getattr(a, kind) for name, a in _adapters(chunk) for kind in "AB"}
    if own:
        assert own.keys() == loaded.keys(), sorted(own.keys() ^ loaded.keys())
        for name, parameter in own.items():
            parameter.copy_(loaded[name])
    return bool(own)


def _adapters(chunk: torch.nn.Module) -> list[tuple[str, Adapter]]:
    """(name of the layer that has it, adapter)."""
    modules = chunk.named_modules()
    return [(name.removesuffix(".adapter"), module) for name, module in modules if isinstance(module, Adapter)]
