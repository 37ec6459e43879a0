"""Megatron's options for speed and memory, under Megatron's names. They change what a run costs, not what it computes.

Sections of a run's configuration (run.py), read by model/levers.py and train/student.py. docs/levers.md says for each
option what it costs, what it saves and where it is tested. model/levers.py refuses what a model or a machine does not
support; contradictions with other flags are refused here and in validate.py.
"""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Literal

from megatron_gkd.config.json_object import json_object
from megatron_gkd.config.schema import Section, setting
from megatron_gkd.errors import ConfigError

# vLLM's arguments that the run sets itself or has flags for.
VLLM_OWN: Final = frozenset(
    {
        *("model", "dtype", "tensor_parallel_size", "max_model_len", "seed", "load_format", "skip_tokenizer_init"),
        *("distributed_executor_backend", "worker_extension_cls", "logprobs_mode", "enable_sleep_mode", "middleware"),
        *("gpu_memory_utilization", "enforce_eager", "max_num_seqs", "pipeline_parallel_size", "data_parallel_size"),
        *("host", "port", "uds", "api_key", "generation_config", "trust_remote_code", "quantization", "tokenizer"),
        *("hf_overrides", "runner", "served_model_name"),
    }
)


def vllm_options(enforce_eager: bool, max_num_seqs: int | None, engine_kwargs: str | None) -> dict[str, Any]:
    """Further arguments of vLLM's engines, by vLLM's names. Raises ConfigError."""
    example = '{"max_num_batched_tokens": 16384}'
    options = json_object("vllm_engine_kwargs", engine_kwargs, example=example, refused=VLLM_OWN)
    if enforce_eager:
        options["enforce_eager"] = True
    if max_num_seqs is not None:
        options["max_num_seqs"] = max_num_seqs
    return options


@dataclass(frozen=True)
class RecomputeConfig(Section):
    """Recomputation of the student's activations in the backward pass: less memory for more work, the same numbers."""

    recompute_granularity: Literal["none", "selective", "full"] = setting(
        "none",
        "none: keep all activations; selective: recompute --recompute_modules; full: keep only the inputs of whole "
        "layers.",
    )
    recompute_method: Literal["uniform", "block"] | None = setting(
        None,
        "With full. uniform: recompute all layers, in groups of --recompute_num_layers, keeping the first input of "
        "each; block: recompute the first --recompute_num_layers layers of each model chunk. null: uniform.",
    )
    recompute_num_layers: int | None = setting(None, "With full; see --recompute_method. null: 1.", ge=1)
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm", "moe", "moe_act"]] = setting(
        (), "With selective: the modules that are recomputed; empty: core_attn."
    )

    def problems(self) -> Iterator[str]:
        """Flags that the given granularity does not use."""
        given = f"the granularity is {self.recompute_granularity}"
        for flag in ("recompute_method", "recompute_num_layers"):
            if getattr(self, flag) is not None and self.recompute_granularity != "full":
                yield f"--{flag} is for --recompute_granularity full, and {given}; change one of them"
        if self.recompute_modules and self.recompute_granularity != "selective":
            yield f"--recompute_modules is for --recompute_granularity selective, and {given}; change one of them"


@dataclass(frozen=True)
class OverlapConfig(Section):
    """Overlap of the student's data parallel communication with its computation."""

    overlap_grad_reduce: bool = setting(False, "Reduce gradients, bucket by bucket, during the backward pass.")
    overlap_param_gather: bool = setting(
        False,
        "Gather updated weights during the next forward pass; needs --use_distributed_optimizer and "
        "--overlap_grad_reduce.",
    )
    align_param_gather: bool = setting(
        False, "All stages of an interleaved pipeline gather the weights of a model chunk at the same time."
    )
    ddp_bucket_size: int | None = setting(
        None, "Parameters in a bucket; null: 40 million, or one million times the data parallel ranks.", ge=1
    )

    def problems(self, *, sharded: bool) -> Iterator[str]:
        """What needs another flag. `sharded`: --use_distributed_optimizer."""
        if self.overlap_param_gather and not sharded:
            yield "--overlap_param_gather gathers what --use_distributed_optimizer has split; give both, or neither"
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            yield "--overlap_param_gather needs --overlap_grad_reduce, which makes the buckets; give both"
        if self.align_param_gather and not self.overlap_param_gather:
            yield "--align_param_gather needs --overlap_param_gather; give both, or neither"
        if self.ddp_bucket_size is not None and not self.overlap_grad_reduce:
            yield "--ddp_bucket_size needs --overlap_grad_reduce: without it all gradients are one bucket"


@dataclass(frozen=True)
class KernelsConfig(Section):
    """Kernels and number formats of megatron-core; null: on if the device and the installed packages support it."""

    attention_backend: Literal["auto", "flash", "fused", "unfused"] = setting(
        "auto",
        "Attention of Transformer Engine, for both models (torch's for a student with adapters); auto: its choice; on "
        "a CPU torch's.",
    )
    cp_comm_type: list[Literal["p2p", "all_gather", "a2a", "a2a+p2p"]] = setting(
        ("p2p",),
        "How the ranks that share a sequence exchange keys and values in Transformer Engine's attention: one value for "
        "both models, or one for each layer of them.",
        repeats=True,
    )
    masked_softmax_fusion: bool = setting(False, "For an attention that is not used here; true is refused.")
    attention_softmax_in_fp32: bool = setting(True, "Softmax of attention in fp32, as in every attention here.")
    accumulate_allreduce_grads_in_fp32: bool = setting(
        True, "Add up and reduce the student's gradients in fp32; false: in --dtype."
    )
    apply_rope_fusion: bool | None = setting(None, "Rotary embedding of both models in a single kernel; CUDA.")
    gradient_accumulation_fusion: bool | None = setting(
        None, "Add weight gradients to their buffer inside the matrix product; CUDA, with apex."
    )
    bias_dropout_fusion: bool | None = setting(None, "Residual addition of both models in one kernel; CUDA.")
    bias_activation_fusion: bool | None = setting(
        None, "SwiGLU of both models in one kernel (Megatron-LM: bias_swiglu_fusion); CUDA."
    )
    moe_grouped_gemm: bool | None = setting(
        None, "The products of all experts of a layer in one kernel, in both models; CUDA, with Transformer Engine."
    )
    moe_permute_fusion: bool | None = setting(
        None, "Sort tokens by experts in one kernel, in both models; CUDA, with Transformer Engine 2.1."
    )
    cross_entropy_loss_fusion: bool | None = setting(
        None, "The loss is not megatron-core's: true requires --loss_path fused, the default, false --loss_path logits."
    )
    tp_comm_overlap: bool = setting(
        False,
        "Collectives of --sequence_parallel beside the student's matrix products; all its micro-batches are padded to "
        "one shape; CUDA, with Transformer Engine.",
    )
    fp8_format: Literal["e4m3", "hybrid"] | None = setting(
        None,
        "Matrix products of the student's layers in fp8, its weights in --dtype; hybrid: gradients in e5m2; CUDA, with "
        "Transformer Engine.",
    )
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] | None = setting(
        None, "Scaling of fp8; null: tensorwise (Megatron-LM: delayed). mxfp8 needs Blackwell."
    )
    fp8_margin: int = setting(0, "With delayed: scales are smaller by two to this power.", ge=0)
    fp8_amax_history_len: int = setting(1, "With delayed: passes whose maxima a scale may come from.", ge=1)
    fp8_amax_compute_algo: Literal["most_recent", "max"] = setting(
        "most_recent", "With delayed: which maximum of the history a scale comes from."
    )
    fp8_param_gather: bool = setting(
        False, "Keep and gather the weights of these layers in fp8; with tensorwise or blockwise."
    )
    deterministic_mode: bool = setting(
        False, "Use kernels that give the same bits in every run; operations without one are an error."
    )
    empty_unused_memory_level: Literal[0, 1, 2] = setting(
        0, "Return unused device memory. 1: before the optimizer's update; 2: also after it; CUDA."
    )
    manual_gc: bool = setting(False, "Collect Python's garbage only between steps, on all ranks after the same step.")
    manual_gc_interval: int = setting(100, "Steps between two collections with --manual_gc.", ge=1)
    megatron_extra_kwargs: str | None = setting(
        None,
        "Further fields of the student's TransformerConfig, under megatron-core's names, as a JSON object such as "
        '{"disable_bf16_reduced_precision_matmul": true}.',
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.extra, dict)
        if not self.cp_comm_type:
            raise ConfigError("--cp_comm_type is empty; give p2p, or leave it out")

    @property
    def fp8_tokens(self) -> int:
        """The number of tokens of a rank's part of a row is a multiple of this: a whole block of fp8; 1 without fp8."""
        if self.fp8_format is None:
            return 1
        return {"blockwise": 128, "mxfp8": 32}.get(self.fp8_recipe or "tensorwise", 16)

    @property
    def extra(self) -> dict[str, Any]:
        """--megatron_extra_kwargs. Raises ConfigError."""
        return json_object("megatron_extra_kwargs", self.megatron_extra_kwargs, example='{"qk_clip": false}')

    def problems(self, *, loss_is_fused: bool, sharded: bool) -> Iterator[str]:
        """Values that this package does not support, and flags that need others. `sharded`:
        --use_distributed_optimizer."""
        if not self.attention_softmax_in_fp32:
            yield "--attention_softmax_in_fp32 false: every attention here has its softmax in fp32; leave it out"
        if self.masked_softmax_fusion:
            yield "--masked_softmax_fusion true: no attention here has a separate masked softmax; leave it out"
        if self.cross_entropy_loss_fusion is not None and self.cross_entropy_loss_fusion != loss_is_fused:
            path = "fused" if self.cross_entropy_loss_fusion else "logits"
            yield (
                f"--cross_entropy_loss_fusion {str(self.cross_entropy_loss_fusion).lower()} means --loss_path {path} "
                "here; change one of them"
            )
        if self.fp8_recipe is not None and self.fp8_format is None:
            yield f"--fp8_recipe {self.fp8_recipe} needs --fp8_format; give both, or neither"
        if self.fp8_param_gather and self.fp8_format is None:
            yield "--fp8_param_gather needs --fp8_format; give both, or neither"
        if self.fp8_param_gather and not sharded:
            yield "--fp8_param_gather gathers what --use_distributed_optimizer has split; give both, or neither"
        for flag, default in (("margin", 0), ("amax_history_len", 1), ("amax_compute_algo", "most_recent")):
            if getattr(self, f"fp8_{flag}") != default and self.fp8_recipe != "delayed":
                yield f"--fp8_{flag} is for --fp8_recipe delayed; give both, or neither"
        if not self.manual_gc and self.manual_gc_interval != 100:
            yield "--manual_gc_interval needs --manual_gc; give both, or neither"


@dataclass(frozen=True)
class OffloadConfig(Section):
    """Parts of the student that are in host memory while they are not used; results do not change."""

    offload_model: bool = setting(
        False,
        "Offload weights and gradients while colocated engines sample and while a teacher on the same ranks works.",
    )
    offload_optimizer: bool = setting(False, "Offload the optimizer's state except during the update itself.")


@dataclass(frozen=True)
class OptimizerMemoryConfig(Section):
    """Memory of the optimizer's state; CUDA with Transformer Engine."""

    use_precision_aware_optimizer: bool = setting(
        False, "Keep main weights, gradients and moments in the types below; needs --use_distributed_optimizer."
    )
    main_grads_dtype: Literal["fp32", "bf16"] = setting("fp32", "Type of the gradients that the update reads.")
    main_params_dtype: Literal["fp32", "fp16"] = setting("fp32", "Type of the main weights.")
    exp_avg_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = setting("fp32", "Type of Adam's first moment.")
    exp_avg_sq_dtype: Literal["fp32", "fp16", "bf16", "fp8"] = setting("fp32", "Type of Adam's second moment.")
    optimizer_cpu_offload: bool = setting(
        False, "Keep (part of) the optimizer's state in host memory and update it there; needs the flag above."
    )
    optimizer_offload_fraction: float = setting(1.0, "Share of the state that is kept there.", gt=0, le=1)
    overlap_cpu_optimizer_d2h_h2d: bool = setting(False, "Copy to and from host memory during the update there.")

    def problems(self, *, sharded: bool) -> Iterator[str]:
        """What needs another flag. `sharded`: --use_distributed_optimizer."""
        aware = self.use_precision_aware_optimizer
        for flag in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
            if getattr(self, flag) != "fp32" and not aware:
                yield f"--{flag} is for --use_precision_aware_optimizer; give both, or neither"
        if aware and not sharded:
            yield "--use_precision_aware_optimizer needs --use_distributed_optimizer; give both, or neither"
        if self.optimizer_cpu_offload and not aware:
            yield "--optimizer_cpu_offload needs --use_precision_aware_optimizer; give both"
        if self.overlap_cpu_optimizer_d2h_h2d and not self.optimizer_cpu_offload:
            yield "--overlap_cpu_optimizer_d2h_h2d needs --optimizer_cpu_offload; give both, or neither"
        if self.optimizer_offload_fraction != 1 and not self.optimizer_cpu_offload:
            yield "--optimizer_offload_fraction needs --optimizer_cpu_offload; give both, or neither"
