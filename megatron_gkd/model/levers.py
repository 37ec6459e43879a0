"""From a run's levers (config/levers.py) to what megatron-core is told of each model, or a refusal by name.

    student_options(config, kind)             ModelOptions of the student on this kind of device
    teacher_options(config, kind)             of a local teacher: it has no backward pass
    check_student(config, arch, layout)       what the student's layers do not allow

All three are the same on every rank, so what they raise is raised on all.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.levers import RecomputeConfig
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError, LayoutError
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout

Kind = Literal["cpu", "cuda"]


def student_options(config: RunConfig, kind: Kind) -> ModelOptions:
    """Raises ConfigError for what this device does not do."""
    recompute = config.recompute
    if kind == "cpu" and "moe_act" in recompute.recompute_modules:
        raise ConfigError(
            "--recompute_modules moe_act needs the grouped products of Transformer Engine, and this run is on a CPU: "
            "give moe, which recomputes all of the experts' layer"
        )
    overlap = config.overlap
    options = replace(
        ModelOptions.on(kind),
        overlap_grad_reduce=overlap.overlap_grad_reduce,
        overlap_param_gather=overlap.overlap_param_gather,
        # Without an interleaved schedule nobody would start the gathers of all stages.
        align_param_gather=overlap.align_param_gather
        and (config.parallel.virtual_pipeline_model_parallel_size or 1) > 1,
        bucket_size=overlap.ddp_bucket_size,
    )
    if recompute.recompute_granularity == "full":
        return replace(
            options,
            recompute_granularity="full",
            recompute_method=recompute.recompute_method or "uniform",
            recompute_num_layers=recompute.recompute_num_layers or 1,
        )
    if recompute.recompute_granularity == "selective":
        modules = tuple(recompute.recompute_modules) or ("core_attn",)
        return replace(options, recompute_granularity="selective", recompute_modules=modules)
    return options


def teacher_options(config: RunConfig, kind: Kind) -> ModelOptions:
    """What holds for both models, and nothing of the backward pass."""
    return ModelOptions.on(kind)


def check_student(config: RunConfig, arch: Architecture, layout: Layout) -> None:
    """Raise LayoutError or ConfigError where the levers do not fit the student's layers."""
    _check_recompute(config.recompute, arch, layout)
    if config.model.freeze_embeddings and layout.chunk_layers(arch.num_layers)[0] == 0:
        raise LayoutError(
            f"--freeze_embeddings leaves the first stage, which has no layer, nothing to train ({layout.describe()}): "
            "give it a layer, or train the embedding"
        )


def _check_recompute(recompute: RecomputeConfig, arch: Architecture, layout: Layout) -> None:
    if arch.moe is None and (of_experts := {"moe", "moe_act"} & set(recompute.recompute_modules)):
        raise ConfigError(
            f"--recompute_modules {' '.join(sorted(of_experts))}: a {arch.model_type} model has no experts; "
            "give mlp, core_attn or layernorm"
        )
    if recompute.recompute_granularity != "full":
        return
    size, method = recompute.recompute_num_layers or 1, recompute.recompute_method or "uniform"
    counts = set(layout.chunk_layers(arch.num_layers))
    if method == "block" and size > max(counts):
        raise LayoutError(
            f"--recompute_num_layers {size}: the largest model chunk has {max(counts)} layers ({layout.describe()}); "
            "give at most that many, or --recompute_method uniform, which recomputes all"
        )
    if method == "uniform" and (odd := sorted(count for count in counts if count % size)):
        raise LayoutError(
            f"--recompute_num_layers {size} does not divide the {odd[0]} layers of a model chunk "
            f"({layout.describe()}): give 1, a divisor of {odd[0]}, or --recompute_method block"
        )
