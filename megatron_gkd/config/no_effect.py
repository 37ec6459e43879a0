"""Flags that are given but have no effect in combination with the others: listed at the start by name, in one line.

    without_effect(cfg, "train") -> {"nothing is sampled: --lmbda 0 without --seq_kd true": ["temperature", "top_p"]}

No flag is silently ignored: one that differs from its default has an effect, or is refused (validate.py), or is listed
here. Refused are flags that can only be a mistake. Listed are flags that a shared file, or a command line that is also
used with another --lmbda, may well contain. A value that means the default (`--loss_path fused`) is neither.

`eval` reads the flags of `EVALUATION`; all others belong to training.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from megatron_gkd.config.hub_names import names_in
from megatron_gkd.config.not_built import Command
from megatron_gkd.config.servers import NoTeacher

if TYPE_CHECKING:
    from megatron_gkd.config.run import RunConfig

HOW_DRAWN: Final = ("temperature", "top_p", "top_k", "max_completion_length", "vllm_max_model_len", "use_vllm")
OF_ENGINES: Final = ("vllm_enforce_eager", "vllm_max_num_seqs", "vllm_engine_kwargs")
STUDENTS_ENGINES: Final = (
    *OF_ENGINES,
    *("vllm_mode", "vllm_gpu_memory_utilization", "vllm_tensor_parallel_size", "sleep_level", "vllm_server_host"),
    *("vllm_server_port", "steps_per_generation", "rollout_lag", "weight_bucket_mb", "verify_sync_every"),
    *("vllm_enable_lora", "vllm_server_timeout"),
)
TEACHERS_COMPLETIONS: Final = (
    *("seq_kd", "teacher_samples_cache", "teacher_sampling_steps"),
    *("teacher_vllm_tensor_parallel_size", "teacher_vllm_gpu_memory_utilization"),
)
# Flags of the divergence from a teacher.
_LEARNT_FROM_A_TEACHER: Final = ("beta", "lmbda", "sft_alpha", "gkd_logits_topk", "topk_tail", "loss_temperature")
# Flags that `eval` reads, beside the sections of the teacher and of the layout.
EVALUATION: Final = frozenset(
    {
        *("model", "dtype", "gkd_logits_topk", "topk_tail", "micro_batch_size", "global_batch_size", "log_level"),
        *("max_tokens_per_gpu", "use_hf"),
        *("deterministic_mode", "attention_backend", "apply_rope_fusion", "cp_comm_type"),
        *("bias_dropout_fusion", "bias_activation_fusion", "moe_grouped_gemm", "moe_permute_fusion"),
        *("tuner_type", "lora_rank", "lora_alpha", "use_rslora", "lora_dropout", "target_modules", "adapters"),
        "modules_to_save",
        *("eval_dataset", "eval_samples", "max_length", "packing", "on_bad_row", "overlong", "data_cache_dir"),
        *("loss_scale", "chat_template_kwargs", "enable_thinking", "max_image_tiles", "prompt_only"),
        "image_url_dir",
        *("external_plugins", "prompt_template", "teacher_prompt_template"),
    }
)
# Flags of the engines that concern training steps alone, and flags of sampling that greedy completions depend on.
_OF_STEPS: Final = ("steps_per_generation", "rollout_lag")
_GREEDY: Final = ("max_completion_length", "vllm_max_model_len", "use_vllm")
_GENERATION: Final = frozenset({"eval_generate", "eval_verifier", *_GREEDY, *STUDENTS_ENGINES}) - {*_OF_STEPS}
_OF_TRAINING_ALONE: Final = frozenset({"check_replicas_steps", "use_distributed_optimizer"})  # of the layout's section


def without_effect(cfg: RunConfig, command: Command = "train") -> dict[str, list[str]]:
    """Reason -> flags that differ from their defaults and have no effect; each flag once."""
    found: dict[str, list[str]] = {}
    named: set[str] = set()
    for why, names in _unused_in_training(cfg) if command == "train" else _unused_in_evaluation(cfg):
        given = [name for name in names if not cfg.is_default(name) and name not in named]
        if given:
            found[why] = given
            named |= set(given)
    return found


def describe(found: dict[str, list[str]]) -> str:
    """`--temperature, --top_p (why); --seed (why)`."""
    return "; ".join(f"{', '.join(f'--{name}' for name in names)} ({why})" for why, names in found.items())


def _unused_in_training(cfg: RunConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    distillation, data = cfg.distillation, cfg.data
    most, least = cfg.lmbda.most, cfg.lmbda.least
    yield from _unused_without_names(cfg)
    yield from _unused_without_contexts(cfg)
    yield from _unused_without_teacher(cfg)
    supervised = isinstance(cfg.teacher.kind, NoTeacher)
    greedy = ", but for greedy completions in evaluations" if cfg.generates else ""
    if not (most > 0 or distillation.samples_teacher):
        none = "--objective sft" if supervised else "--lmbda 0, but for --seq_kd true"
        names = _without(HOW_DRAWN, _GREEDY if cfg.generates else ())
        yield f"nothing is sampled with {none}{greedy}", (*names, "log_completions", "num_completions_to_log")
    if not cfg.logging.log_completions:
        yield "no completion is logged without --log_completions", ("num_completions_to_log",)
    if most == 0:
        none = "--objective sft" if supervised else "--lmbda 0"
        names = _OF_STEPS if cfg.generates else STUDENTS_ENGINES
        yield f"the student samples nothing with {none}{greedy}", names
    if not cfg.generates:
        yield "nothing is verified without --eval_generate", ("eval_verifier",)
    yield from _unused_by_servers(cfg)
    if least == 1:
        why = "every completion is the student's own with --lmbda 1"
        yield why, ("sft_alpha", *TEACHERS_COMPLETIONS)
    if not (data.shuffle or data.dataset_weights or most > 0 or distillation.samples_teacher):
        yield "nothing is drawn with --shuffle false and without sampling", ("seed",)
    if data.streaming and not data.eval_dataset:
        yield "nothing is kept with --streaming true and without --eval_dataset", ("data_cache_dir",)
    if data.packing and not data.eval_dataset:
        yield "--packing sizes the teacher's micro-batches too", ("teacher_micro_batch_size",)
    if (least == 1 or distillation.seq_kd) and not data.eval_dataset:
        yield "no completion of the data is needed", ("prompt_only",)
    if (cfg.parallel.virtual_pipeline_model_parallel_size or 1) == 1:
        yield "there is nothing to align without --virtual_pipeline_model_parallel_size", ("align_param_gather",)
    if cfg.model.dtype == "fp32":
        yield "gradients of fp32 weights are fp32", ("accumulate_allreduce_grads_in_fp32",)
    if not cfg.logging.health_steps:
        yield "nothing is checked with --health_steps 0", ("on_teacher_fault",)
    if not cfg.checkpoint.save_hf:
        yield "nothing is exported with --save_hf false", ("save_hf_dtype", "merge_lora")
    if cfg.checkpoint.load is None and not cfg.checkpoint.auto_resume:
        of_loading = ("verify_checkpoint", "allow_changed_config", "no_load_optim", "no_load_rng")
        yield "no checkpoint is loaded without --load or --auto_resume", of_loading


def _without(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name not in others)


def _unused_by_servers(cfg: RunConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    sampling = cfg.sampling
    if sampling.vllm_mode != "server":
        of_servers = ("vllm_server_port", "vllm_server_timeout")
        yield f"only used with --vllm_mode server, and the mode is {sampling.vllm_mode}", of_servers
        return
    yield "set on the servers with --vllm_mode server", ("vllm_gpu_memory_utilization", *OF_ENGINES)
    if _every_host_has_a_port(sampling.vllm_server_host or ""):
        yield "every --vllm_server_host has a port", ("vllm_server_port",)


def _unused_without_teacher(cfg: RunConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    if isinstance(cfg.teacher.kind, NoTeacher):
        said = cfg.distillation.lmbda == 0  # as it is without a teacher
        names = tuple(name for name in _LEARNT_FROM_A_TEACHER if not (said and name == "lmbda"))
        yield "nothing is learnt from a teacher with --objective sft", (*names, "health_steps", "on_teacher_fault")


def _unused_without_names(cfg: RunConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    values = {flag: cfg.get(flag) for flag in ("model", "teacher_model", "dataset", "eval_dataset")}
    if list(names_in(values, use_hf=True)) == list(names_in(values, use_hf=False)):
        yield "no name on a hub is given without HF:: or MS::", ("use_hf",)


def _unused_without_contexts(cfg: RunConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    if cfg.parallel.context_parallel_size == (cfg.teacher.teacher_context_parallel_size or 1) == 1:
        yield "no ranks share a sequence with --context_parallel_size 1", ("cp_comm_type",)


def _unused_in_evaluation(cfg: RunConfig) -> Iterator[tuple[str, tuple[str, ...]]]:
    from megatron_gkd.config.run import flags

    read = EVALUATION | (_GENERATION if cfg.generates else frozenset())
    others = tuple(
        name
        for name, flag in flags().items()
        if name in _OF_TRAINING_ALONE or (flag.section not in ("teacher", "parallel") and name not in read)
    )
    yield "used in training, not in eval", others
    yield from _unused_without_names(cfg)
    yield from _unused_without_contexts(cfg)
    yield from _unused_without_teacher(cfg)
    if cfg.generates:
        yield from _unused_by_servers(cfg)


def _every_host_has_a_port(hosts: str) -> bool:
    """As `rollout.engines.server_urls` reads them."""
    from urllib.parse import urlsplit

    try:
        return all(urlsplit(name if "//" in name else f"//{name.strip()}").port for name in hosts.split(","))
    except ValueError:  # refused there
        return False
