"""How many parameters a rank holds, by arithmetic on the map of weights (weights/plan.py), and what the student's cost
between steps. No tensors.

    weights w N    gradients 4 N    optimizer (8 + 4 where w < 4) (dense / (dp cp) + experts' / their copies)

N = dense + experts' parameters of a rank, w bytes of a number; the optimizer's shares are those of
--use_distributed_optimizer, without it there is one copy a rank. Layers are alike, but for experts.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import Final

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.phases import GRADIENTS, OPTIMIZER, STUDENT_WEIGHTS
from megatron_gkd.weights.naming import ROLES, Unit, layer_units
from megatron_gkd.weights.plan import plan, shard_shape, units

BYTES: Final = {"fp32": 4, "bf16": 2, "fp16": 2}


def parameters(arch: Architecture, layout: Layout, stage: int, *, head: bool = True) -> tuple[int, int]:
    """(of dense layers, of experts) that a tensor-parallel rank of a stage holds, vocabulary padding included. `head`:
    with the output layer."""
    first, last = stage == 0, stage == layout.pipeline - 1
    own = {"embedding": first or (head and last and arch.tied_embeddings), "final_norm": last, "head": last and head}
    dense, experts = sum(_elements(unit, arch, layout) for unit in units(_no_layers(arch)) if own.get(unit.role)), 0
    for layers in stage_layers(arch, layout, stage):
        for layer in layers:
            of_dense, of_experts = _layer_parameters(arch, layout, arch.has_experts(layer))
            dense, experts = dense + of_dense, experts + of_experts
    return dense, experts


def elements(arch: Architecture, layout: Layout, stage: int) -> int:
    """The sum of both."""
    return sum(parameters(arch, layout, stage))


@cache  # hundreds of layouts ask for the same layers
def _layer_parameters(arch: Architecture, layout: Layout, routed: bool) -> tuple[int, int]:
    """Of a layer with experts, or without."""
    layer = next(layer for layer in range(arch.num_layers) if arch.has_experts(layer) == routed)
    total = [0, 0]
    for unit in layer_units(arch, layer):
        total[ROLES[unit.role].per_expert] += _elements(unit, arch, layout)
    return total[0], total[1] // layout.expert


def _no_layers(arch: Architecture) -> Architecture:
    return replace(arch, num_layers=0)


def _elements(unit: Unit, arch: Architecture, layout: Layout) -> int:
    """Of a unit on a rank that has a part of it."""
    size = layout.expert_tensor_size if ROLES[unit.role].per_expert else layout.tensor
    return math.prod(shard_shape(unit, arch, plan(unit, arch, 0, size, arch.padded_vocab_size(layout.tensor))))


def stage_layers(arch: Architecture, layout: Layout, stage: int) -> list[range]:
    """Layers of each model chunk of a stage."""
    counts = layout.chunk_layers(arch.num_layers)
    starts = [sum(counts[:index]) for index in range(len(counts))]
    own = range(stage, len(counts), layout.pipeline)
    return [range(starts[index], starts[index] + counts[index]) for index in own]


def state_bytes(config: RunConfig, arch: Architecture, layout: Layout, stage: int) -> dict[str, float]:
    """Weights, gradients and optimizer of the student between steps."""
    width, (dense, experts) = BYTES[config.model.precision], parameters(arch, layout, stage)
    frozen = 0
    if config.model.freeze_embeddings and stage == 0:
        frozen = _elements(Unit("embedding"), arch, layout)
    trained, of_state = dense - frozen, 8 + (4 if width < 4 else 0)
    gradient = 4 if config.kernels.accumulate_allreduce_grads_in_fp32 else width
    sharded = config.parallel.use_distributed_optimizer
    copies, of_experts = (layout.data * layout.context, layout.expert_data) if sharded else (1, 1)
    return {
        STUDENT_WEIGHTS: width * (dense + experts),
        GRADIENTS: gradient * (trained + experts),
        OPTIMIZER: of_state * (trained / copies + experts / of_experts),
    }


def update_bytes(config: RunConfig, arch: Architecture, layout: Layout, stage: int, replica: int) -> float:
    """Two fp32 temporaries of the largest tensor, or of as much of it as is this rank's to update: the distributed
    optimizer cuts the parameters of each model chunk, the last ones first, into equal parts; where the first and the
    last stage share the embedding, it cuts that by itself. Args: replica: of the dp x cp ones."""
    first, last = stage == 0, stage == layout.pipeline - 1
    outer = {unit.role: unit for unit in units(_no_layers(arch))}
    begin = [outer["embedding"]] if first and not config.model.freeze_embeddings else []
    head = ([outer["head"]] if "head" in outer else [] if first else [outer["embedding"]]) if last else []
    # Of a layer with experts their tensors are small.
    chunks = stage_layers(arch, layout, stage)
    cut = [[unit for layer in chunk for unit in layer_units(arch, layer, range(0))] for chunk in chunks]
    cut[-1] += [outer["final_norm"]] * last
    if arch.tied_embeddings and layout.pipeline > 1:
        cut += [begin, head]
    else:
        cut[0] = begin + cut[0]
        cut[-1] += head
    shares = layout.data * layout.context if config.parallel.use_distributed_optimizer else 1
    return 8 * max(_largest_part([_elements(unit, arch, layout) for unit in each], shares, replica) for each in cut)


def _largest_part(sizes: list[int], shares: int, replica: int) -> float:
    """Elements of the largest tensor, as far as they are in a replica's share of all of these."""
    part = sum(sizes) / shares
    begin, end = part * (replica % shares), part * (replica % shares + 1)
    largest, offset = 0.0, 0
    for size in reversed(sizes):
        largest, offset = max(largest, min(end, offset + size) - max(begin, offset)), offset + size
    return largest
