"""Translates a run's performance flags (config/levers.py) into options of megatron-core, and refuses those that do not
fit.

    student_options(config, kind)             ModelOptions of the student on this kind of device
    teacher_options(config, kind)             ModelOptions of a local teacher, which has no backward pass
    rehearsed_options(config)                 ModelOptions of the student in a rehearsed step
    optimizer_options(config)                 fields of megatron-core's OptimizerConfig
    check_student(config, arch, layout, kind) refuses what the student's layers do not support
    check_contexts(config, flag, arch, layout) refuses a --cp_comm_type that the model of a flag does not support

All results are the same on every rank, so an error is raised on all of them. A fusion that is not set is on where the
device and the installed packages support it, as in Megatron's own recipes. On a CPU fusions are off, and one that is
requested is refused.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from dataclasses import fields, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, Final, Literal

import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.levers import KernelsConfig, OptimizerMemoryConfig, OverlapConfig, RecomputeConfig
from megatron_gkd.config.run import RunConfig
from megatron_gkd.config.schema import show
from megatron_gkd.errors import ConfigError, LayoutError, NotBuiltError
from megatron_gkd.model.build import transformer_config
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.parallel.layout import Layout

Kind = Literal["cpu", "cuda"]

_TE: Final = "transformer_engine"
# What a value other than the default needs beside CUDA: a package, or none.
_ON_CUDA: Final[dict[str, str | None]] = {
    "attention_backend": _TE,
    "cp_comm_type": _TE,
    "apply_rope_fusion": _TE,
    "gradient_accumulation_fusion": "fused_weight_gradient_mlp_cuda",
    "bias_dropout_fusion": None,
    "bias_activation_fusion": None,
    "moe_grouped_gemm": _TE,
    "moe_permute_fusion": _TE,
    "tp_comm_overlap": _TE,
    "fp8_format": _TE,
    "fp8_param_gather": _TE,
    "empty_unused_memory_level": None,
    "use_precision_aware_optimizer": _TE,
    "optimizer_cpu_offload": _TE,
}
# The first Transformer Engine whose attention exchanges the keys and values of packs so; "p2p": every one.
_PACKS_SINCE: Final = {"a2a": (2, 10), "all_gather": (2, 18)}
_DTYPES: Final = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.uint8}
_FP8_CAPABILITY: Final = {"delayed": (8, 9), "tensorwise": (8, 9), "blockwise": (9, 0), "mxfp8": (10, 0)}
# Fields of TransformerConfig that are the project's own business, or another flag's.
_OWN: Final = frozenset(
    {
        *("context_parallel_size", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"),
        *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
        *("pipeline_model_parallel_layout", "fp8", "fp4", "fp8_recipe", "fp8_param", "tp_only_amax_red"),
        *("mtp_num_layers", "multi_latent_attention", "window_size", "cpu_offloading", "attention_softmax_in_fp32"),
        *("no_sync_func", "grad_sync_func", "param_sync_func", "finalize_model_grads_func", "grad_scale_func"),
        *("init_method", "output_layer_init_method", "embedding_init_method", "cuda_graph_impl", "enable_cuda_graph"),
    }
)


def student_options(config: RunConfig, kind: Kind) -> ModelOptions:
    """Raises ConfigError for what this device or megatron-core does not support."""
    _refuse_without(config, kind)
    recompute, overlap, kernels = config.recompute, config.overlap, config.kernels
    if kind == "cpu" and "moe_act" in recompute.recompute_modules:
        raise ConfigError(
            "--recompute_modules moe_act needs the grouped products of Transformer Engine, and this run is on a CPU: "
            "give moe, which recomputes all of the experts' layer"
        )
    options = replace(
        teacher_options(config, kind),
        gradient_accumulation_fusion=_fuses(config, "gradient_accumulation_fusion", kind),
        grad_reduce_in_fp32=kernels.accumulate_allreduce_grads_in_fp32,
        overlap_grad_reduce=overlap.overlap_grad_reduce,
        overlap_param_gather=overlap.overlap_param_gather,
        # Without an interleaved schedule nobody would start the gathers of all stages.
        align_param_gather=overlap.align_param_gather
        and (config.parallel.virtual_pipeline_model_parallel_size or 1) > 1,
        bucket_size=overlap.ddp_bucket_size,
        tp_comm_overlap=kernels.tp_comm_overlap,
        moe_aux_loss_coeff=config.training.moe_aux_loss_coeff,
        transformer_engine=not config.tuner.is_lora,
        moe_grouped_gemm=not config.tuner.is_lora and _fuses(config, "moe_grouped_gemm", kind),
        extra=tuple(sorted(kernels.extra.items())),
    )
    if kernels.fp8_format is not None:
        options = replace(
            options,
            fp8=kernels.fp8_format,
            fp8_recipe=kernels.fp8_recipe or "tensorwise",
            fp8_param=kernels.fp8_param_gather,
            fp8_param_gather=kernels.fp8_param_gather,
            fp8_margin=kernels.fp8_margin,
            fp8_amax_history_len=kernels.fp8_amax_history_len,
            fp8_amax_compute_algo=kernels.fp8_amax_compute_algo,
        )
    _check_extra(options.extra)
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


def rehearsed_options(config: RunConfig) -> ModelOptions:
    """What decides the bytes of a rehearsal on a CPU (train/rehearsal.py): recomputation and the gradients' type.
    Kernels and overlap are left out. Raises NotBuiltError for an optimizer whose state it would count wrongly."""
    if config.optimizer != OptimizerMemoryConfig():
        raise NotBuiltError(
            "--use_precision_aware_optimizer and --optimizer_cpu_offload are not rehearsed: leave them out, and take "
            "their share off the optimizer's bytes"
        )
    gradients = KernelsConfig(accumulate_allreduce_grads_in_fp32=config.kernels.accumulate_allreduce_grads_in_fp32)
    return student_options(replace(config, kernels=gradients, overlap=OverlapConfig()), "cpu")


def optimizer_options(config: RunConfig) -> dict[str, Any]:
    """Fields of megatron-core's OptimizerConfig beside the numbers of the training."""
    levers, found = config.optimizer, dict[str, Any]()
    if config.overlap.overlap_param_gather:
        found["overlap_param_gather"] = True
    if config.kernels.fp8_param_gather:
        found["fp8_recipe"] = config.kernels.fp8_recipe or "tensorwise"
    if levers.use_precision_aware_optimizer:
        names = ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype")
        found |= {"use_precision_aware_optimizer": True, **{name: _DTYPES[getattr(levers, name)] for name in names}}
    if levers.optimizer_cpu_offload:
        found |= {
            "optimizer_cpu_offload": True,
            "optimizer_offload_fraction": levers.optimizer_offload_fraction,
            "overlap_cpu_optimizer_d2h_h2d": levers.overlap_cpu_optimizer_d2h_h2d,
        }
    return found


def teacher_options(config: RunConfig, kind: Kind) -> ModelOptions:
    """The options that student and teacher share; none of them concerns the backward pass."""
    kernels = config.kernels
    return replace(
        ModelOptions.on(kind),
        bias_dropout_fusion=_fuses(config, "bias_dropout_fusion", kind),
        bias_activation_fusion=_fuses(config, "bias_activation_fusion", kind),
        apply_rope_fusion=_fuses(config, "apply_rope_fusion", kind),
        moe_grouped_gemm=_fuses(config, "moe_grouped_gemm", kind),
        moe_permute_fusion=_fuses(config, "moe_permute_fusion", kind),
        attention_backend=AttnBackend[kernels.attention_backend],
        cp_comm_type=tuple(kernels.cp_comm_type),
        deterministic_mode=kernels.deterministic_mode,
    )


def _fuses(config: RunConfig, flag: str, kind: Kind) -> bool:
    """Whether a fusion is on: as set, else wherever it is available."""
    package, asked = _ON_CUDA[flag], config.get(flag)
    can_be = kind == "cuda" and (package is None or find_spec(package) is not None)
    return can_be if asked is None else bool(asked)


def _refuse_without(config: RunConfig, kind: Kind) -> None:
    """Raise ConfigError for a flag that needs another device or a package that is missing."""
    for flag, package in _ON_CUDA.items():
        value = config.get(flag)
        if config.is_default(flag) or value is False:
            continue
        given = f"--{flag} {show(value)}"
        if kind == "cpu":
            raise ConfigError(f"{given} needs CUDA, and this run is on a CPU: leave it out, or give --device cuda")
        if flag == "attention_backend" and config.tuner.is_lora:
            continue  # torch's kernels, of layers without Transformer Engine
        if package is not None and find_spec(package) is None:
            raise ConfigError(
                f"{given} needs the package {package}, which is not installed: install it, or leave it out"
            )
    if kind == "cuda" and config.kernels.fp8_format is not None and torch.cuda.is_available():
        recipe, found = config.kernels.fp8_recipe or "tensorwise", torch.cuda.get_device_capability()
        if found < (needed := _FP8_CAPABILITY[recipe]):
            raise ConfigError(
                f"--fp8_recipe {recipe} needs a GPU of compute capability {needed[0]}.{needed[1]}, and this one has "
                f"{found[0]}.{found[1]}: train in bf16"
            )
    wanted = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    lacking = [f"{name}={value}" for name, value in wanted.items() if os.environ.get(name) != value]
    if kind == "cuda" and config.kernels.deterministic_mode and lacking:
        raise ConfigError(f"--deterministic_mode needs {' and '.join(lacking)} in the environment of every rank")


def _check_extra(extra: Iterable[tuple[str, Any]]) -> None:
    """Raise ConfigError for a field that megatron-core does not have, and suggest the closest one."""
    known = {item.name for item in fields(TransformerConfig)}
    for name, _ in extra:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"--megatron_extra_kwargs: megatron-core's TransformerConfig has no field {name}{meant}")
        if name in _OWN or name in {item.name for item in fields(ModelOptions)}:
            raise ConfigError(f"--megatron_extra_kwargs: {name} is set by the run; use its own flag, or leave it out")


def check_student(config: RunConfig, arch: Architecture, layout: Layout, kind: Kind) -> None:
    """Raise LayoutError or ConfigError where the flags do not fit the student's layers."""
    _check_recompute(config.recompute, arch, layout)
    if arch.latent is not None and config.kernels.apply_rope_fusion:
        raise ConfigError(
            f"--apply_rope_fusion true: latent attention ({arch.model_type}) has a rotary embedding that no fusion "
            "knows; leave it out"
        )
    if config.kernels.fp8_format is not None:
        _check_fp8(config, arch, layout)
    if config.kernels.tp_comm_overlap and (arch.latent is not None or config.model.precision != "bf16"):
        what = f"--dtype {config.model.precision}" if arch.latent is None else f"latent attention ({arch.model_type})"
        raise ConfigError(
            f"--tp_comm_overlap true beside {what}: its buffers are of linear layers in bf16; leave it out"
        )
    if config.kernels.moe_grouped_gemm and config.tuner.is_lora:
        raise ConfigError(
            "--moe_grouped_gemm true: a student with adapters has megatron-core's own layers, each expert a product of "
            "its own; leave it out"
        )
    if config.model.freeze_embeddings and layout.chunk_layers(arch.num_layers)[0] == 0:
        raise LayoutError(
            f"--freeze_embeddings leaves the first stage, which has no layer, nothing to train ({layout.describe()}): "
            "give it a layer, or train the embedding"
        )
    if extra := config.kernels.extra:
        try:
            transformer_config(arch, layout, student_options(config, kind), dtype=config.model.precision)
        except (AssertionError, TypeError, ValueError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(
                f"--megatron_extra_kwargs {', '.join(extra)}: megatron-core refuses them: {text}"
            ) from error


def check_contexts(config: RunConfig, flag: str, arch: Architecture, layout: Layout) -> None:
    """Raise ConfigError or LayoutError where the model of `--flag` does not support --cp_comm_type."""
    kinds, size = config.kernels.cp_comm_type, layout.context
    if size == 1 or config.is_default("cp_comm_type"):
        return
    given = f"--cp_comm_type {show(kinds)}"
    adapted = flag == "model" and config.tuner.is_lora
    if adapted or arch.latent is not None:
        what = "a student with adapters" if adapted else f"latent attention ({arch.model_type})"
        raise ConfigError(
            f"{given}: {what} has the project's own attention, which gathers keys and values; leave it out, or give "
            f"--{flag.removesuffix('model')}context_parallel_size 1"
        )
    if len(kinds) not in (1, arch.num_layers):
        raise ConfigError(
            f"{given}: these are {len(kinds)} values, and --{flag} has {arch.num_layers} layers; give one value, or "
            "one for each layer"
        )
    for kind, needed in _PACKS_SINCE.items():
        if config.data.packing and kind in kinds and (found := _version(_TE)) is not None and found < needed:
            raise ConfigError(
                f"{given} beside --packing needs Transformer Engine {needed[0]}.{needed[1]}, and {found[0]}.{found[1]} "
                "is installed: give p2p, or a newer one"
            )
    heads, groups = arch.num_heads // layout.tensor, max(1, arch.num_kv_heads // layout.tensor)
    if "a2a" in kinds and (heads % size or groups % size):
        raise LayoutError(
            f"{given}: --{flag} has {heads} heads and {groups} of keys and values on a rank ({layout.describe()}), and "
            f"a2a shares them over {size} ranks; give p2p or all_gather, or sizes that divide them"
        )


def _version(package: str) -> tuple[int, ...] | None:
    """Its first two numbers; None if it is not installed."""
    try:
        return tuple(int(number) for number in version(package).split(".")[:2])
    except PackageNotFoundError:
        return None


def _check_fp8(config: RunConfig, arch: Architecture, layout: Layout) -> None:
    """Raise ConfigError where the student's products are not those that fp8 has."""
    given = f"--fp8_format {config.kernels.fp8_format}"
    if config.model.precision != "bf16":
        raise ConfigError(f"{given} beside --dtype {config.model.precision}: what is not in fp8 is in bf16; give it")
    if config.tuner.is_lora or arch.latent is not None:
        what = "a student with adapters" if config.tuner.is_lora else f"latent attention ({arch.model_type})"
        raise ConfigError(f"{given}: {what} has layers that are not Transformer Engine's; leave it out")
    if config.kernels.fp8_recipe == "delayed":
        _check_delayed(config)
    if config.kernels.fp8_param_gather:
        _check_weights_in_fp8(config)
    tp, multiple = layout.tensor, config.kernels.fp8_tokens
    widths = {
        "hidden size": arch.hidden_size,
        "queries, keys and values of a rank": (arch.num_heads + 2 * arch.num_kv_heads) * arch.head_dim // tp,
        "attention output of a rank": arch.num_heads * arch.head_dim // tp,
        "MLP width of a rank": arch.ffn_hidden_size // tp,
    }
    if arch.moe is not None:
        widths["expert's width of a rank"] = arch.moe.ffn_hidden_size // layout.expert_tensor_size
    for name, width in widths.items():
        if width % multiple:
            raise ConfigError(
                f"{given}: the {name} is {width}, and products of this recipe need a multiple of {multiple}: train in "
                "bf16, or give another tensor parallel size"
            )


def _check_delayed(config: RunConfig) -> None:
    """Raise ConfigError for what would put other passes, or other layers, between those that the scales count."""
    given = "--fp8_recipe delayed"
    if (found := _version(_TE)) is not None and found < (2, 0):
        raise ConfigError(f"{given} needs Transformer Engine 2.0, and {found[0]}.{found[1]} is installed: give a newer")
    if parts := sorted({"layernorm", "moe_act"} & set(config.recompute.recompute_modules)):
        raise ConfigError(
            f"{given} beside --recompute_modules {' '.join(parts)}: megatron-core does not recompute these with "
            "delayed scales; give core_attn, mlp or moe, or --fp8_recipe tensorwise"
        )
    refused = ("fp8_dot_product_attention", "fp8_multi_head_attention", "first_last_layers_bf16")
    if names := [name for name in refused if config.kernels.extra.get(name)]:
        raise ConfigError(
            f"{given} beside --megatron_extra_kwargs {', '.join(names)}: its scales are those of linear layers, all in "
            "one pass; leave that out, or give --fp8_recipe tensorwise"
        )


def _check_weights_in_fp8(config: RunConfig) -> None:
    """Raise ConfigError for what would read, or begin with, something else than the student's weights."""
    given, optimizer = "--fp8_param_gather true", config.optimizer
    if (recipe := config.kernels.fp8_recipe) in ("delayed", "mxfp8"):
        why = {
            "delayed": "the weights that are read would be rounded with a scale of 1, before there is a history",
            "mxfp8": "its weights are gathered in the gradients' memory, which is zeroed before the forward pass here",
        }
        raise ConfigError(f"{given} beside --fp8_recipe {recipe}: {why[recipe]}; give tensorwise or blockwise")
    if optimizer.optimizer_cpu_offload or optimizer.main_params_dtype != "fp32":
        flag = "optimizer_cpu_offload" if optimizer.optimizer_cpu_offload else "main_params_dtype"
        raise ConfigError(
            f"{given} beside --{flag} {show(config.get(flag))}: that optimizer makes its main weights of the "
            "parameters, which are rounded to fp8; leave one out"
        )
    if config.overlap.overlap_param_gather:
        raise ConfigError(
            f"{given} beside --overlap_param_gather true: what reads weights between two steps ends the gathers, and "
            "the transposed copies of weights in fp8 would stay as they were; leave one out"
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
