"""Predicts the seconds of a training step from sizes and rates; no tensors.

Per stage and micro-batch

    student    3 x the matrix products of a forward pass (4 x with full recomputation), and 3 x its head's
    teacher    1 x its own, and with hidden-state signals its head's on the student's ranks
    groups     bytes passed to collectives of the student's TP, CP and EP groups, as rehearsed, over the link that the
               group spans; the teacher's all-reduces over its TP ranks

of the slowest stage, times (m + (p - 1) / v) for m micro-batches over p stages of v model chunks each; then the
gradients' reduction and the weights' gather over replicas. A vision tower (tower_flops.py) runs on the first stage, and
each of its tensor- and context-parallel ranks computes it in full: 3 x its products if it is trained, else 1 x; the
other stages wait. It assumes no overlap and one rate for all products. So it can rank layouts, but its seconds are not
accurate.

Ranks that share cores (`Rates.cores`; a test on a CPU) wait for each other: while one idles in the pipeline, others use
its core. A phase then takes as long as the work of all ranks on these cores or, if that is more, as its slowest stage
with a core of its own; rates are those of a core. There, what a GPU hides behind its products takes time as well
(`Work`), and layouts differ by it:

    operations     each operation costs the host a launch, whatever its size, and the bytes that it writes: norms, which
                   each tensor-parallel rank computes in full; zeroed gradients and the optimizer, which replicas repeat
    messages       between stages: each has a cost beside its bytes
    collectives    of n ranks: 2 (n - 1) messages each, as around a ring
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.run import RunConfig
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.parameters import BYTES, elements

_SIZE_OF: Final = {"tp": "tensor", "cp": "context", "ep": "expert"}


@dataclass(frozen=True)
class Rates:
    """Assumed rates of the hardware, which are printed."""

    flops: float  # of matrix products, a second and GPU
    node_bytes: float  # to the GPUs of the node, a second and GPU
    network_bytes: float  # to other nodes
    ranks_per_node: int
    latency_s: float = 0.0  # of a message of a collective, beside its bytes
    message_s: float = 0.0  # of sending or receiving a tensor between stages, beside its bytes
    operation_s: float = 0.0  # of an operation on the host, beside its arithmetic
    memory_bytes: float = math.inf  # written by operations, a second
    cores: int | None = None  # that all ranks share; None: each has a device of its own

    def shared(self, layout: Layout) -> float:
        """Ranks per core."""
        return 1.0 if self.cores is None else max(1.0, layout.world_size / self.cores)


@dataclass(frozen=True)
class Work:
    """What a rank does in a step, on average over the ranks, as rehearsed (train/rehearsal.py)."""

    operations: float = 0.0
    written: float = 0.0  # bytes, by all of them
    handed: Mapping[str, float] = field(default_factory=dict)  # bytes to a group, by its name
    calls: Mapping[str, float] = field(default_factory=dict)  # of these messages and collectives


_NO_WORK: Final = Work()


def layer_flops(arch: Architecture, length: int, *, dense: bool = False) -> float:
    """Of one layer's forward pass, per token of a sequence of `length`: linear layers, and causal attention. `dense`: a
    layer without experts in a model with experts."""
    if arch.latent is None:
        attention = arch.hidden_size * (arch.query_size + 2 * arch.kv_size)
    else:
        latent, rank = arch.latent, arch.latent.query_rank
        attention = arch.hidden_size * (latent.kv_rank + latent.rotary_dim)
        attention += latent.kv_rank * arch.num_heads * (latent.plain_dim + latent.value_dim)
        attention += arch.query_size * (arch.hidden_size if rank is None else rank) + arch.hidden_size * (rank or 0)
    attention += arch.attention_size * arch.hidden_size
    if arch.moe is None or dense:
        mlp = 3 * arch.hidden_size * arch.ffn_hidden_size
    else:
        mlp = arch.hidden_size * arch.moe.num_experts
        mlp += 3 * arch.hidden_size * (arch.moe.ffn_hidden_size * arch.moe.top_k + arch.moe.shared_ffn_hidden_size)
    return 2.0 * (attention + mlp) + length * (arch.query_size + arch.attention_size)


def step_seconds(
    config: RunConfig,
    arch: Architecture,
    of_teacher: Architecture | None,
    student: Layout,
    teacher: Layout,
    length: tuple[int, int],
    handed: Mapping[str, float],
    rates: Rates,
    towers: tuple[float, float] = (0.0, 0.0),
    work: Work = _NO_WORK,
) -> dict[str, float]:
    """Predicted seconds of a step, by phase. See the module docstring.

    Args:
        length: (prompt, completion) tokens of every sample.
        handed: bytes that a rank of the student passes to collectives in a step, by the group's name.
        towers: products of a forward pass for the images of a sample, in the student's vision tower and the teacher's.
        work: what ranks do besides, if `rates` has its costs.
    """
    total, completion = sum(length), length[1]
    samples = config.training.global_batch_size
    passes = 4 if config.recompute.recompute_granularity == "full" else 3
    phases = {}
    if of_teacher is not None:
        # Micro-batches of the teacher are of the student's size where nothing else is said.
        size = config.teacher.teacher_micro_batch_size or config.training.micro_batch_size
        phases["teacher"] = _passes_s(of_teacher, teacher, samples, size, total, 1, 0.0, rates)
        width = BYTES[config.model.precision]
        phases["groups: teacher's tp"] = _all_reduces_s(of_teacher, teacher, samples, total, width, rates)
    head = 2.0 * arch.hidden_size * arch.vocab_size * 3
    if of_teacher is not None and config.distillation.gkd_logits_topk is None:
        head += 2.0 * of_teacher.hidden_size * of_teacher.vocab_size
    phases["student"] = _passes_s(
        arch, student, samples, config.training.micro_batch_size, total, passes, head * completion, rates
    )
    if towers[0]:
        passes_of_tower = 1 if config.model.freeze_vision else 3
        phases["vision tower"] = passes_of_tower * towers[0] * samples / student.data / rates.flops
    if towers[1]:
        phases["teacher's vision tower"] = towers[1] * samples / teacher.data / rates.flops
    for name in ("tp", "cp", "ep"):
        if (num_bytes := handed.get(name, 0.0)) > 0 and getattr(student, _SIZE_OF[name]) > 1:
            inside = student.tensor * (student.context if name == "cp" else 1) <= rates.ranks_per_node
            of_rank = num_bytes / (rates.node_bytes if inside else rates.network_bytes)
            of_rank += work.calls.get(name, 0.0) * 2 * (getattr(student, _SIZE_OF[name]) - 1) * rates.latency_s
            phases[f"groups: {name}"] = of_rank * rates.shared(student)
    if student.data * student.context > 1:
        num_elements = max(elements(arch, student, stage) for stage in range(student.pipeline))
        share = (student.data * student.context - 1) / (student.data * student.context)
        inside = student.world_size <= rates.ranks_per_node
        rate = rates.node_bytes if inside else rates.network_bytes
        phases["gradients and weights over replicas"] = (
            num_elements * (4 + BYTES[config.model.precision]) * share / rate * rates.shared(student)
        )
    return phases | _beside(work, rates, student, teacher)


def _beside(work: Work, rates: Rates, student: Layout, teacher: Layout) -> dict[str, float]:
    """What is hidden on a GPU; of ranks of one node."""
    phases = {"operations": work.operations * rates.operation_s + work.written / rates.memory_bytes}
    for name, stages in (("pp", student.pipeline), ("teacher's pp", teacher.pipeline)):
        if stages > 1:  # what is received is handed over as well, and comes while others are sent
            seconds = work.handed.get(name, 0.0) / 2 / rates.node_bytes
            phases[f"groups: {name}"] = work.calls.get(name, 0.0) * rates.message_s + seconds
    return {name: seconds * rates.shared(student) for name, seconds in phases.items() if seconds}


def _stage_flops(arch: Architecture, layout: Layout, length: int) -> float:
    """Of a forward pass through the layers of the slowest stage, per token."""
    if arch.moe is None or len(arch.moe.layers) == arch.num_layers:
        return layer_flops(arch, length) * arch.num_layers / layout.pipeline
    size = math.ceil(arch.num_layers / layout.pipeline)
    stages = (range(first, min(first + size, arch.num_layers)) for first in range(0, arch.num_layers, size))
    return max(_layers_flops(arch, length, layers) for layers in stages)


def _layers_flops(arch: Architecture, length: int, layers: range) -> float:
    return sum(layer_flops(arch, length, dense=not arch.has_experts(layer)) for layer in layers)


def step_s(config: RunConfig, phases: Mapping[str, float]) -> float:
    """The seconds of a step with these phases. A teacher on its own ranks works beside the student."""
    of_teacher = sum(seconds for name, seconds in phases.items() if "teacher" in name)
    rest = sum(phases.values()) - of_teacher
    return max(of_teacher, rest) if config.teacher.teacher_placement == "separate" else of_teacher + rest


def _passes_s(
    arch: Architecture,
    layout: Layout,
    samples: int,
    micro_batch: int,
    length: int,
    passes: int,
    head_flops: float,
    rates: Rates,
) -> float:
    """`passes` times a forward pass of all samples, plus the last stage's extra work for each of them."""
    micro_batches = max(1, math.ceil(samples / layout.data / micro_batch))
    of_stage = passes * _stage_flops(arch, layout, length) * length
    slowest = (of_stage + head_flops) * micro_batch / (layout.tensor * layout.context)
    seconds = slowest * (micro_batches + (layout.pipeline - 1) / layout.num_chunks) / rates.flops
    if rates.cores is None:
        return seconds
    of_all = samples * (passes * _layers_flops(arch, length, range(arch.num_layers)) * length + head_flops)
    return max(seconds, of_all / rates.flops / rates.cores)


def _all_reduces_s(arch: Architecture, layout: Layout, samples: int, length: int, width: int, rates: Rates) -> float:
    """For a forward pass over tensor-parallel ranks without sequence parallelism: two per layer, of hidden states."""
    tokens = samples / layout.data * length / layout.context
    share = 2 * (layout.tensor - 1) / layout.tensor
    rate = rates.node_bytes if layout.tensor <= rates.ranks_per_node else rates.network_bytes
    num_bytes = 2 * arch.num_layers / layout.pipeline * tokens * arch.hidden_size * width * share
    return num_bytes / rate * rates.shared(layout)
