"""What `plan` says of a rank: bytes by phase and category, and what it hands to whom; as a record, and as text.

Of a phase are the tensors of the rehearsal (train/rehearsal.py), and what no rehearsal has, by arithmetic:

    load               the models and the optimizer while they are built; files are read in place
    sampling           what lies between steps, the engine, and the buckets of a push
    teacher            its pass
    forward, backward  the student's
    step 1, step 2     the update; Adam's moments are there from the start
    save               what lies between steps, and the buckets of an export (a checkpoint is copied to host memory)

Beside a rehearsal stands the closed formula (train/formula.py); where its peak of a step is more than TOLERANCE off, a
warning says so.

A colocated engine has its share of the GPU: weights, and the rest for its KV cache and workspace. With --sleep_level 0
it has it in every phase, else while it samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.plan import PlanConfig
from megatron_gkd.config.run import RunConfig
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.phases import PHASES, away
from megatron_gkd.weights.plan import hf_tensor_shapes

if TYPE_CHECKING:
    from megatron_gkd.train.formula import Phases
    from megatron_gkd.train.rehearsal import Rehearsed

logger = get_logger(__name__)

GB = 1e9
TOLERANCE: Final = 0.05  # of the formula's peak
ENGINE_WEIGHTS, ENGINE_CACHE = "vLLM: weights", "vLLM: KV cache, workspace"
PUSH, EXPORT = "buckets of a push", "buckets of an export"
_EXPORT_BUCKET: Final = 512 * 2**20  # weights/export.py
_BYTES: Final = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Engine:
    """A colocated vLLM on a GPU. Bytes; all 0 where there is none."""

    share: int = 0
    weights: int = 0
    cache_token: int = 0  # of the KV cache
    bucket: int = 0  # of a push
    pushed: int = 0  # of weights, each time

    @property
    def cache_tokens(self) -> int:
        """That its KV cache holds, at most."""
        return max(0, self.share - self.weights) // self.cache_token if self.cache_token else 0


def engine_of(asked: PlanConfig, config: RunConfig, arch: Architecture) -> Engine:
    """Of the run's student, in its --dtype."""
    sampling, samples = config.sampling, config.lmbda.most > 0 or config.generates
    if not samples:
        return Engine()
    width, ranks = _BYTES[config.model.precision], sampling.vllm_tensor_parallel_size
    whole, largest = _model_bytes(arch, width)
    bucket = max(largest, min(whole, sampling.weight_bucket_mb * 2**20))
    if sampling.vllm_mode != "colocate":
        return Engine(bucket=bucket, pushed=whole)
    per_layer = 2 * max(arch.kv_size // ranks, arch.head_dim)
    if arch.latent is not None:  # one latent vector for all heads, on every rank
        per_layer = arch.latent.kv_rank + arch.latent.rotary_dim
    share = round(asked.gpu_memory_gb * GB * sampling.vllm_gpu_memory_utilization)
    return Engine(share, whole // ranks, arch.num_layers * per_layer * width, bucket, whole)


def _model_bytes(arch: Architecture, width: int) -> tuple[int, int]:
    """(the model, its largest tensor)."""
    sizes = [math.prod(shape) * width for shape in hf_tensor_shapes(arch).values()]
    return sum(sizes), max(sizes)


def phases_of(config: RunConfig, arch: Architecture, one: Rehearsed, engine: Engine) -> dict[str, dict[str, int]]:
    """Bytes by phase and category, in the order of a run."""
    found = {name: dict(alive.by_category) for name, alive in one.phases.items()}
    if one.num_parameters:  # the student's ranks sample, and save
        whole, largest = _model_bytes(arch, _BYTES[config.model.precision])
        buckets = {"save": {EXPORT: 2 * max(largest, min(whole, _EXPORT_BUCKET))}}
        if engine.bucket:
            buckets["sampling"] = {PUSH: 2 * engine.bucket}
        for name, extra in buckets.items():
            found[name] = dict(one.built.without(away(config, name)).by_category) | extra
    for name, categories in found.items():
        if engine.share and (name == "sampling" or config.sampling.sleep_level == 0):
            categories[ENGINE_WEIGHTS] = min(engine.weights, engine.share)
            categories[ENGINE_CACHE] = engine.share - categories[ENGINE_WEIGHTS]
    return {name: found[name] for name in PHASES if name in found}


def record(
    asked: PlanConfig,
    config: RunConfig,
    arch: Architecture,
    one: Rehearsed,
    layouts: tuple[Layout, Layout],
    engine: Engine,
    said: Phases | None = None,
) -> dict[str, Any]:
    """For programs, and for SAVE/plan.json (train/planned_memory.py). `arch`, `layouts`: the student's first. `said`:
    by the formula; None: there is none."""
    reserved, phases = round(asked.reserved_gb * GB), phases_of(config, arch, one, engine)
    fullest = max(phases, key=lambda name: sum(phases[name].values()))
    engines = [phase.get(ENGINE_WEIGHTS, 0) + phase.get(ENGINE_CACHE, 0) for phase in phases.values()]
    totals = [sum(phase.values()) for phase in phases.values()]
    needed = max(totals) + reserved
    alive = one.phases.get(fullest, one.built)
    places = [layout.coordinate(one.rank) if layout.holds(one.rank) else None for layout in layouts]
    stages = [None if place is None else place.pp for place in places]
    return {
        "rank": one.rank,
        "student_stage": stages[0],
        "teacher_stage": stages[1],
        "context_rank": None if places[0] is None or layouts[0].context == 1 else places[0].cp,
        "student_parameters": one.num_parameters,
        "between_steps_bytes": one.built.by_category,
        "peak_bytes": [step.by_category for step in one.peaks],
        "phases_bytes": phases,
        "fullest_phase": fullest,
        "lines": {name: alive.lines(name)[: asked.lines] for name in alive.by_category} if asked.lines else {},
        "sampler_bytes": engines[list(phases).index(fullest)],
        "cache_tokens": engine.cache_tokens,
        "reserved_bytes": reserved,
        "needed_bytes": needed,
        "own_bytes": max(total - of_engine for total, of_engine in zip(totals, engines, strict=True)) + reserved,
        "fits": needed <= asked.gpu_memory_gb * GB,
        "sent_bytes_a_step": one.traffic,
        "groups": {name: _span(ranks, asked.ranks_per_node or 8) for name, ranks in one.ranks.items()},
        "pushed_bytes": engine.pushed,
        **(_by_formula(one, said) if said is not None else {}),
    }


def _by_formula(one: Rehearsed, said: Phases) -> dict[str, Any]:
    """What the formula says by phase and category, and how far its peak of a step is from the rehearsed one."""
    foreseen = max(sum(parts.values()) for name, parts in said.items() if name != "load")
    found = max(alive.total for name, alive in one.phases.items() if name != "load")
    off = foreseen / found - 1
    if abs(off) > TOLERANCE:
        logger.warning(
            "rank %d: at the peak of a step the formula foresees %.3f GB, and the rehearsal finds %.3f (%+.1f %%): "
            "believe the rehearsal",
            *(one.rank, foreseen / GB, found / GB, 100 * off),
        )
    rounded = {name: {category: round(number) for category, number in parts.items()} for name, parts in said.items()}
    return {"formula_bytes": rounded, "formula_difference": off}


def _span(ranks: tuple[int, ...], per_node: int) -> dict[str, int]:
    return {"ranks": len(ranks), "nodes": len({rank // per_node for rank in ranks})}


def lines(asked: PlanConfig, of_rank: dict[str, Any]) -> Iterator[str]:
    """Of a record."""
    fullest, stages = of_rank["fullest_phase"], []
    if of_rank["student_stage"] is not None:
        of = f"stage {of_rank['student_stage']} of the student ({of_rank['student_parameters'] / 1e9:.3f} G parameters)"
        if of_rank["context_rank"] is not None:
            of += f", context-parallel rank {of_rank['context_rank']}"
        stages.append(of)
    if of_rank["teacher_stage"] is not None:
        stages.append(f"stage {of_rank['teacher_stage']} of the teacher")
    yield f"rank {of_rank['rank']}: {', '.join(stages)}"
    rows = of_rank["phases_bytes"][fullest] | {"reserved (--reserved_gb)": of_rank["reserved_bytes"]}
    said = of_rank.get("formula_bytes", {})
    for name, num_bytes in rows.items():
        beside = f"{said[fullest][name] / GB:>13.3f} by the formula" if name in said.get(fullest, {}) else ""
        yield f"  {name:<40}{num_bytes / GB:>10.3f} GB{beside}"
        for line, of_line in of_rank["lines"].get(name, []):
            yield f"    {line:<58}{of_line / GB:>10.3f}"
    verdict = f"GB of {asked.gpu_memory_gb:g}: {'fits' if of_rank['fits'] else 'does NOT fit'}"
    yield f"  {'at the peak, in ' + fullest:<40}{of_rank['needed_bytes'] / GB:>10.3f} {verdict}"
    totals = {name: sum(parts.values()) + of_rank["reserved_bytes"] for name, parts in of_rank["phases_bytes"].items()}
    yield "  GB by phase: " + ", ".join(f"{name} {total / GB:.3f}" for name, total in totals.items())
    if said:
        parts = (f"{name} {(sum(one.values()) + of_rank['reserved_bytes']) / GB:.3f}" for name, one in said.items())
        yield f"  by the formula: {', '.join(parts)}; the peak of a step {100 * of_rank['formula_difference']:+.1f} %"
    if of_rank["cache_tokens"]:
        yield f"  the engine's KV cache holds {of_rank['cache_tokens']:,} tokens at most"
    if sent := list(_sent(of_rank)):
        yield f"  GB handed to collectives in a step, by group: {', '.join(sent)}"


def _sent(of_rank: dict[str, Any]) -> Iterator[str]:
    for name, num_bytes in sorted(of_rank["sent_bytes_a_step"].items()):
        group = of_rank["groups"].get(name, {"ranks": 0, "nodes": 0})
        if group["ranks"] != 1 and num_bytes:
            over = {0: "", 1: f" ({group['ranks']} ranks of a node)"}
            span = over.get(group["nodes"], f" ({group['ranks']} ranks of {group['nodes']} nodes)")
            yield f"{name} {num_bytes / GB:.3f}{span}"
    if of_rank["pushed_bytes"]:
        yield f"weights to the engine {of_rank['pushed_bytes'] / GB:.3f} a push"
