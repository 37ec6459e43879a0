"""The parameters of megatron-core model chunks, by role and global layer, and a check that a chunk has exactly those it
should.

A chunk is a megatron-core GPTModel, possibly inside wrappers (DDP, Float16Module). Global layer indices are read from
`layer.layer_number`. They are not recomputed from pipeline ranks, because offsets of virtual and uneven stages are easy
to get wrong.

`check_chunks` refuses a parameter without a rule, a persistent buffer, a role that the architecture has and the model
lacks (a model built without the q/k/v bias would drop the checkpoint's), and a layer that is there twice or out of
range.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.naming import Unit, is_adapter, is_extra_state, layer_units, parse, vision_units


class Parameter(NamedTuple):
    """One parameter of one chunk."""

    unit: Unit
    name: str  # megatron-core's, in its chunk; for messages
    tensor: torch.nn.Parameter


class ExpertRank(NamedTuple):
    """A rank's place among the ranks that share the experts."""

    ep_rank: int = 0  # expert parallel: which experts
    ep_size: int = 1
    tp_rank: int = 0  # expert tensor parallel: which part of each
    tp_size: int = 1

    @classmethod
    def of(cls, groups: Any) -> ExpertRank:
        """From a ProcessGroupCollection."""
        return cls(groups.ep.rank(), groups.ep.size(), groups.expt_tp.rank(), groups.expt_tp.size())

    def experts(self, arch: Architecture) -> range:
        """Global indices of this rank's experts."""
        num_local = 0 if arch.moe is None else arch.moe.num_experts // self.ep_size
        return range(self.ep_rank * num_local, (self.ep_rank + 1) * num_local)


def unwrap(chunk: Any) -> Any:
    """The GPTModel inside DDP, Float16Module and the like."""
    while not hasattr(chunk, "decoder") and hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def settle(chunks: Sequence[Any]) -> None:
    """Complete the weights before they are read between two steps: wait for the gathers of `overlap_param_gather`
    (train/overlap.py), and make those that no forward pass has started. Does nothing for other chunks.

    Communication: all-gathers over the data-parallel group, of the buckets that are incomplete; collective over it.
    """
    for chunk in chunks:
        if getattr(chunk, "use_forward_hook", False):
            for buckets in (*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups):
                if buckets.param_gather_handle is not None or not buckets.param_gather_dispatched:
                    buckets.start_param_sync(force_sync=True)


def model_parameters(
    chunks: Sequence[torch.nn.Module], arch: Architecture, expert_rank: ExpertRank
) -> Iterator[Parameter]:
    """Every parameter of this rank's chunks except adapters, in a fixed order. Raises CheckpointError for a name
    without a rule."""
    for chunk in map(unwrap, chunks):
        for name, tensor in chunk.named_parameters():
            if is_adapter(name):
                continue
            role, layer, expert, of_vision = parse(name)
            if layer is not None:
                layer = chunk.decoder.layers[layer].layer_number - 1
            if expert is not None:
                expert += expert_rank.experts(arch).start
            yield Parameter(Unit(role, layer, expert, of_vision), name, tensor)


def check_chunks(chunks: Sequence[torch.nn.Module], arch: Architecture, expert_rank: ExpertRank) -> list[Parameter]:
    """The parameters, checked as in the module docstring."""
    parameters = list(model_parameters(chunks, arch, expert_rank))
    found: set[Unit] = set()
    for parameter in parameters:
        if parameter.unit in found:
            raise CheckpointError(f"{parameter.name}: this rank has {parameter.unit} twice")
        found.add(parameter.unit)
    expected: set[Unit] = set()
    for chunk in map(unwrap, chunks):
        expected |= _expected_units(chunk, arch, expert_rank)
        _check_buffers(chunk)
    if unknown := found - expected:
        raise CheckpointError(
            f"the model has {_describe(unknown)}, which a {arch.model_type} checkpoint like this does not fill"
        )
    if missing := expected - found:
        raise CheckpointError(f"the model has no {_describe(missing)}, but the {arch.model_type} checkpoint does")
    return parameters


def _expected_units(chunk: Any, arch: Architecture, expert_rank: ExpertRank) -> set[Unit]:
    layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
    if any(not 0 <= layer < arch.num_layers for layer in layers):
        raise CheckpointError(f"the model has layers {layers} (from 0), the checkpoint has {arch.num_layers}")
    experts = expert_rank.experts(arch)
    units = {unit for layer in layers for unit in layer_units(arch, layer, experts)}
    if chunk.pre_process:
        units.add(Unit("embedding"))
        units.update(vision_units(arch))
    if chunk.post_process:
        units.add(Unit("final_norm"))
        if not (arch.tied_embeddings and chunk.pre_process):  # one chunk with both ends has one tensor for both
            units.add(Unit("head"))
    return units


def _check_buffers(chunk: torch.nn.Module) -> None:
    """Refuse persistent buffers: one in the state dict is a weight (a router's bias, say), and none is mapped."""
    for prefix, module in chunk.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set and not is_extra_state(name):
                raise CheckpointError(f"no rule for the persistent buffer {prefix + '.' + name!r} of the model")


def _describe(units: set[Unit]) -> str:
    first = min(units, key=lambda unit: (unit.role, unit.layer or 0, unit.expert or 0))
    return str(first) + (f" (and {len(units) - 1} more)" if len(units) > 1 else "")
