"""Flags that contradict each other; `RunConfig.validate()` refuses them first. Combinations without effect are not
refused, but listed at the start (no_effect.py).

Ranges of single flags are checked by their sections (schema.py), world size and model where they become known.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import TYPE_CHECKING

from megatron_gkd.config.not_built import Command
from megatron_gkd.config.schema import show
from megatron_gkd.config.secret import Secret
from megatron_gkd.config.servers import LocalTeacher, NoTeacher, SelfTeaching, ServerTeachers
from megatron_gkd.config.tuner import LORA_RANKS
from megatron_gkd.errors import ConfigError

if TYPE_CHECKING:
    from megatron_gkd.config.run import RunConfig

LOCAL_TEACHER = (
    "teacher_tensor_model_parallel_size",
    "teacher_pipeline_model_parallel_size",
    "teacher_decoder_first_pipeline_num_layers",
    "teacher_decoder_last_pipeline_num_layers",
    "teacher_account_for_embedding_in_pipeline_split",
    "teacher_account_for_loss_in_pipeline_split",
    "teacher_pipeline_model_parallel_layout",
    "teacher_context_parallel_size",
    "teacher_expert_model_parallel_size",
    "teacher_expert_tensor_parallel_size",
    "teacher_placement",
    "teacher_world_size",
    "teacher_nodes",
    "offload_teacher_model",
    "teacher_micro_batch_size",
    "teacher_micro_batch_tokens",
    "signal_memory_gb",
)
SERVER_TEACHER = ("teacher_tag_key", "teacher_timeout_s")
TEACHERS_ENGINE = (
    "teacher_sampling_steps",
    "teacher_vllm_tensor_parallel_size",
    "teacher_vllm_gpu_memory_utilization",
)


def refuse_contradictions(cfg: RunConfig, command: Command) -> None:
    """Raise a ConfigError with the first contradiction."""
    for problem in _problems(cfg, command):
        raise ConfigError(problem)
    if cfg.teacher.teacher_model_server is not None:  # a key that cannot be sent is found now
        Secret.from_environment("TEACHER_API_KEY")
    if command == "train" and cfg.sampling.vllm_server_host is not None:
        Secret.from_environment("VLLM_API_KEY")


def _problems(cfg: RunConfig, command: Command) -> Iterator[str]:
    yield from _distillation_problems(cfg)
    yield from _parallel_problems(cfg)
    yield from _tuner_problems(cfg)
    if cfg.training.max_tokens_per_gpu is not None and not cfg.is_default("micro_batch_size"):
        yield "--max_tokens_per_gpu and --micro_batch_size both size a micro-batch; give one of them"
    if command == "train":
        yield from _loss_temperature_problems(cfg)
        yield from _training_problems(cfg)
        yield from cfg.recompute.problems()
        yield from cfg.overlap.problems(sharded=cfg.parallel.use_distributed_optimizer)
        yield from cfg.kernels.problems(
            loss_is_fused=cfg.distillation.loss_path != "logits", sharded=cfg.parallel.use_distributed_optimizer
        )
        yield from cfg.optimizer.problems(sharded=cfg.parallel.use_distributed_optimizer)
        yield from _offload_problems(cfg)
        yield from _tp_comm_overlap_problems(cfg)
        yield from _lengths_problems(cfg)
        yield from _teacher_sampling_problems(cfg)
    elif cfg.checkpoint.load is not None:
        yield (
            "--load is for training, and eval uses the weights of --model: give the run's export as --model "
            "(RUN/hf), and leave --load out (--load null if a file sets it)"
        )
    if cfg.generates or (command == "train" and cfg.lmbda.most > 0):
        yield from _sampling_problems(cfg, command)
    needed = "dataset" if command == "train" else "eval_dataset"
    if not cfg.get(needed):
        yield f"--{needed} is missing; give one or more JSONL or Parquet files, or directories of saved data sets"
    if "wandb" in cfg.logging.report_to and find_spec("wandb") is None:
        yield "--report_to wandb needs the package wandb, which is not installed; install it, or leave wandb out"


def _distillation_problems(cfg: RunConfig) -> Iterator[str]:
    loss, topk = cfg.distillation, cfg.distillation.gkd_logits_topk
    if loss.use_liger_kernel and loss.loss_path == "logits":
        yield "--use_liger_kernel demands the fused loss and --loss_path logits the other one; leave out one of them"
    yield from _teacher_problems(cfg)
    if isinstance(cfg.teacher.kind, NoTeacher):
        return
    if loss.use_liger_kernel and topk is not None:
        yield (
            "--use_liger_kernel cannot be combined with --gkd_logits_topk: the fused linear loss takes the full "
            "vocabulary; leave out one of them"
        )
    if loss.topk_tail != "renormalize" and topk is None:
        yield f"--topk_tail {loss.topk_tail} needs --gkd_logits_topk: the full vocabulary has no tail"
    if topk == 1 and loss.topk_tail == "renormalize":
        yield (
            "--gkd_logits_topk 1 with --topk_tail renormalize compares one token of probability 1 with itself: the "
            "divergence is 0 whatever the student does, and nothing is learnt; give a larger K, or --topk_tail bucket"
        )


def _loss_temperature_problems(cfg: RunConfig) -> Iterator[str]:
    loss = cfg.distillation
    if isinstance(cfg.teacher.kind, NoTeacher):
        return
    if loss.topk_tail == "bucket" and loss.loss_temperature != 1:
        yield (
            f"--topk_tail bucket cannot be combined with --loss_temperature {loss.loss_temperature:g}: the teacher's "
            "probability outside its top K at another temperature cannot be known from K of them; leave out one of them"
        )


def _teacher_problems(cfg: RunConfig) -> Iterator[str]:
    teacher, kind = cfg.teacher, cfg.teacher.kind
    for flag in ("teacher_model", "teacher_model_server"):
        if isinstance(kind, NoTeacher) and not cfg.is_default(flag):
            yield (
                f"--objective sft learns from the completions alone, and --{flag} is given; leave it out, or give "
                "--objective gkd"
            )
    if not isinstance(kind, ServerTeachers):
        for flag in SERVER_TEACHER:
            if not cfg.is_default(flag):
                yield f"--{flag} is for teacher servers, and --teacher_model_server is not given; leave it out"
    elif cfg.distillation.gkd_logits_topk is None:
        yield "--teacher_model_server needs --gkd_logits_topk: a server returns only its most probable tokens"
    elif kind.tags and teacher.teacher_tag_key is None:
        yield (
            "--teacher_model_server has tags and --teacher_tag_key is missing: name the column of the data that holds "
            "each row's tag"
        )
    elif teacher.teacher_tag_key is not None and not kind.tags:
        yield "--teacher_tag_key chooses among servers by their tags, and none has any; leave it out, or give them tags"
    most_s = 60 * cfg.parallel.distributed_timeout_minutes
    if teacher.teacher_timeout_s is not None and teacher.teacher_timeout_s >= most_s:
        yield (
            f"--teacher_timeout_s {teacher.teacher_timeout_s:g} is not below --distributed_timeout_minutes "
            f"{cfg.parallel.distributed_timeout_minutes:g} ({most_s:g} s), after which the ranks that wait for the "
            "answers give up; change one of them"
        )
    match kind:
        case LocalTeacher() if cfg.base_teaches:
            other = "--teacher_model is --model, and under --tuner_type lora its frozen weights teach"
        case LocalTeacher():
            yield from _local_teacher_problems(cfg)
            return
        case ServerTeachers():
            other = "--teacher_model_server is given"
        case SelfTeaching():
            other = "without --teacher_model the student teaches itself"
        case NoTeacher():
            other = "--objective sft has no teacher"
    for flag in LOCAL_TEACHER:
        if not cfg.is_default(flag):
            yield f"--{flag} is for a local teacher, but {other}; leave it out"


def _local_teacher_problems(cfg: RunConfig) -> Iterator[str]:
    teacher = cfg.teacher
    if teacher.teacher_micro_batch_size is not None and teacher.teacher_micro_batch_tokens is not None:
        yield "--teacher_micro_batch_size and --teacher_micro_batch_tokens both size a micro-batch; give one of them"
    if teacher.teacher_world_size is not None and teacher.teacher_nodes is not None:
        yield "--teacher_world_size and --teacher_nodes both say how many ranks the teacher has; give one of them"
    sized = teacher.teacher_world_size is not None or teacher.teacher_nodes is not None
    if teacher.teacher_placement == "separate" and not sized:
        yield "--teacher_placement separate needs the number of the teacher's ranks: --teacher_world_size or _nodes"
    if teacher.teacher_placement == "colocate" and sized:
        yield "--teacher_world_size and --teacher_nodes need --teacher_placement separate; give it, or leave them out"
    if teacher.teacher_placement == "separate" and teacher.offload_teacher_model:
        yield "--offload_teacher_model frees memory for a student on the same ranks; with separate ones leave it out"


def _offload_problems(cfg: RunConfig) -> Iterator[str]:
    engines = cfg.sampling.vllm_mode == "colocate" and (cfg.lmbda.most > 0 or cfg.generates)
    kind = cfg.teacher.kind
    teacher = isinstance(kind, LocalTeacher) and not kind.separate and not cfg.base_teaches
    if cfg.offload.offload_model and not (engines or teacher):
        yield (
            "--offload_model frees memory for colocated engines (--vllm_mode colocate) or for a teacher's own weights, "
            "and there are none on the student's ranks; leave it out"
        )
    if cfg.offload.offload_optimizer and cfg.optimizer.optimizer_cpu_offload:
        yield "--optimizer_cpu_offload keeps the state in host memory anyway; leave --offload_optimizer out"


def _tp_comm_overlap_problems(cfg: RunConfig) -> Iterator[str]:
    """Combinations that its buffers do not support: they have one shape, and all ranks of the world make them."""
    if not cfg.kernels.tp_comm_overlap:
        return
    given = "--tp_comm_overlap true"
    if not cfg.parallel.sequence_parallel:
        yield f"{given} overlaps the collectives of --sequence_parallel; give both, or neither"
    if cfg.tuner.is_lora:
        yield f"{given}: a student with adapters has layers that are not Transformer Engine's; leave it out"
    if cfg.teacher.teacher_placement == "separate":
        yield f"{given}: ranks of the teacher's own make no buffers; leave it out, or give --teacher_placement colocate"
    if isinstance(cfg.teacher.kind, SelfTeaching):
        yield f"{given}: as its own teacher the student is fed rows of other lengths; leave it out"
    if cfg.training.max_tokens_per_gpu is not None and not cfg.data.packing:
        yield (
            f"{given} pads all micro-batches to one shape, and --max_tokens_per_gpu makes rows of all lengths; give "
            "--packing true beside it, or --micro_batch_size"
        )


def _parallel_problems(cfg: RunConfig) -> Iterator[str]:
    layout = cfg.parallel
    if layout.sequence_parallel and layout.tensor_model_parallel_size == 1:
        yield "--sequence_parallel splits over the tensor parallel ranks: it needs --tensor_model_parallel_size above 1"
    if (layout.virtual_pipeline_model_parallel_size or 1) > 1 and layout.pipeline_model_parallel_size == 1:
        yield "--virtual_pipeline_model_parallel_size needs --pipeline_model_parallel_size above 1"


def _tuner_problems(cfg: RunConfig) -> Iterator[str]:
    yield from cfg.tuner.problems()
    if cfg.sampling.vllm_enable_lora:
        yield from _problems_of_vllms_lora(cfg)
    if not cfg.tuner.is_lora:
        return
    for flag in ("freeze_embeddings", "freeze_router", "freeze_vision", "freeze_projector"):
        if not cfg.is_default(flag):
            yield f"--{flag} is for a student whose weights are trained, not for --tuner_type lora; leave it out"
    if cfg.training.moe_aux_loss_coeff:
        yield "--moe_aux_loss_coeff trains routers, and --tuner_type lora freezes them; leave it out"
    if cfg.kernels.attention_backend == "flash" and cfg.model.dtype == "fp32":
        yield "--attention_backend flash is torch's with adapters, and has no fp32; leave it out, or give --dtype"


def _problems_of_vllms_lora(cfg: RunConfig) -> Iterator[str]:
    """Combinations in which an adapter cannot be sent to vLLM by itself; merged weights can always be sent."""
    sampling, given = cfg.sampling, "--vllm_enable_lora true"
    if not cfg.tuner.is_lora:
        yield f"{given} sends an adapter, and --tuner_type is full: give --tuner_type lora, or leave it out"
    if sampling.vllm_mode != "colocate":
        yield f"{given} is for a colocated vLLM, and --vllm_mode is {sampling.vllm_mode}: leave one of them out"
    if sampling.sleep_level == 2:
        yield f"{given} needs the base weights to stay in vLLM, and --sleep_level 2 discards them: give 0 or 1"
    if cfg.tuner.modules_to_save:
        yield f"{given} with --modules_to_save: vLLM's LoRA has no such modules; leave one of them out"
    if cfg.tuner.lora_rank > LORA_RANKS[-1]:
        yield f"{given} takes adapters up to rank {LORA_RANKS[-1]}, and --lora_rank is {cfg.tuner.lora_rank}"


def _lengths_problems(cfg: RunConfig) -> Iterator[str]:
    """Sampled completions must leave room for a prompt. The message also says why any are sampled, since that may be by
    default."""
    most, longest = cfg.schedule("max_completion_length").most, cfg.data.max_length
    if most < longest or not (cfg.lmbda.most > 0 or cfg.distillation.samples_teacher):
        return

    def named(flag: str) -> str:
        return f"--{flag} {show(cfg.get(flag))}{' (its default)' if cfg.is_default(flag) else ''}"

    cause = f"{named('lmbda')} samples from the student" if cfg.lmbda.most > 0 else "--seq_kd true samples"
    instead = "--lmbda 0, which samples nothing" if not cfg.distillation.samples_teacher else "--seq_kd false"
    yield (
        f"{cause}, and {named('max_completion_length')} leaves no room for a prompt in {named('max_length')}, "
        f"which counts both: give a larger --max_length, a smaller --max_completion_length, or {instead}"
    )


def _sampling_problems(cfg: RunConfig, command: Command) -> Iterator[str]:
    """Flags of the engines that sample from the student: for training, for evaluations, or for both."""
    sampling, asked, instead = cfg.sampling, f"--eval_generate {cfg.logging.eval_generate} samples from the student", ""
    if command == "train" and cfg.lmbda.most > 0:
        asked, instead = f"--lmbda {_number(cfg.distillation.lmbda)} samples from the student", "--lmbda 0"
        if cfg.schedule("temperature").most > 2:
            yield f"--temperature {_number(sampling.temperature)} is above 2, the highest that vLLM samples at"
    instead = instead or "--eval_generate 0"
    if not sampling.use_vllm:
        yield f"{asked}, with vLLM alone, and --use_vllm is false: leave it out, or give {instead}"
    if find_spec("vllm") is None:
        yield f"{asked} with the package vllm (0.28 to 0.32), which is not installed: install it, or give {instead}"
    if sampling.rollout_lag and sampling.vllm_mode == "colocate":
        yield (
            "--rollout_lag 1 samples while the student trains, and a colocated engine shares its devices: use "
            "--vllm_mode server or subprocess, or leave --rollout_lag out"
        )
    if sampling.rollout_lag and sampling.steps_per_generation > 1:
        yield "--rollout_lag 1 and --steps_per_generation above 1 both make samples older; use one of them"
    if sampling.vllm_mode == "server" and sampling.vllm_server_host is None:
        yield "--vllm_mode server needs --vllm_server_host; launch/rollout_server.sh starts a server"
    if sampling.vllm_mode == "colocate" and cfg.teacher.teacher_placement == "separate":
        yield (
            "--vllm_mode colocate places its engines on all ranks, and --teacher_placement separate takes some of "
            "them: use --vllm_mode server or subprocess"
        )
    if sampling.vllm_mode != "server" and sampling.vllm_server_host is not None:
        yield f"--vllm_server_host is for --vllm_mode server, and the mode is {sampling.vllm_mode}; change one of them"
    if sampling.vllm_mode == "server" and sampling.vllm_tensor_parallel_size > 1:
        yield "--vllm_tensor_parallel_size is set on the server with --vllm_mode server: give it to the server"
    if sampling.vllm_mode != "colocate" and sampling.sleep_level > 0:
        yield f"--sleep_level is for colocated engines; give 0 with --vllm_mode {sampling.vllm_mode}"


def _teacher_sampling_problems(cfg: RunConfig) -> Iterator[str]:
    sampling, kind = cfg.sampling, cfg.teacher.kind
    server = isinstance(kind, ServerTeachers)
    if isinstance(kind, NoTeacher) and cfg.distillation.seq_kd:
        yield (
            "--seq_kd true lets a teacher sample the completions, and --objective sft has none: sample them beforehand "
            "(megatron-gkd sample), and give the file as --dataset"
        )
    for flag in ("teacher_samples_cache", *TEACHERS_ENGINE):
        if not cfg.distillation.seq_kd and not cfg.is_default(flag):
            yield f"--{flag} is for completions that the teacher samples: it needs --seq_kd true"
        if server and flag in TEACHERS_ENGINE and not cfg.is_default(flag):
            yield f"--{flag} is for a local teacher's engine, but --teacher_model_server is given; leave it out"
    if not cfg.distillation.samples_teacher:
        return
    asked, instead = "--seq_kd true samples from the teacher", "or give --seq_kd false"
    if isinstance(kind, ServerTeachers) and kind.tags:
        yield f"{asked}, and --teacher_model_server names several by tags: give the servers of one, {instead}"
    if isinstance(kind, SelfTeaching):
        yield f"{asked}, and there is none: give --teacher_model or --teacher_model_server, {instead}"
    if not sampling.use_vllm:
        yield f"{asked}, with vLLM alone, and --use_vllm is false: leave it out, {instead}"
    for flag in ("temperature", "max_completion_length"):
        if not cfg.schedule(flag).is_constant:
            yield (
                f"--{flag} {cfg.get(flag)} cannot be combined with --seq_kd true: the teacher's completions are "
                f"sampled ahead, and kept for one temperature and one length; give a number, {instead}"
            )
    if not server and find_spec("vllm") is None:
        yield f"{asked} with the package vllm (0.28 to 0.32), which is not installed: install it, {instead}"
    if cfg.schedule("temperature").most > 2:
        yield f"--temperature {_number(sampling.temperature)} is above 2, the highest that vLLM samples at"


def _number(value: float | str) -> str:
    """The value as written on the command line."""
    return value if isinstance(value, str) else f"{value:g}"


def _token_budget_problems(cfg: RunConfig) -> Iterator[str]:
    budget, longest = cfg.training.max_tokens_per_gpu, cfg.data.max_length
    if budget is None:
        return
    if budget * cfg.parallel.context_parallel_size < longest:
        yield (
            f"--max_tokens_per_gpu {budget} is below --max_length {longest}: a row of that length would fit into no "
            "micro-batch; give at least that many, or a smaller --max_length"
        )


def _training_problems(cfg: RunConfig) -> Iterator[str]:
    training = cfg.training
    if training.train_iters is not None and training.num_train_epochs is not None:
        yield "--train_iters and --num_train_epochs both say how long to train; give one of them"
    if training.moe_aux_loss_coeff > 0 and cfg.model.freeze_router:
        yield "--moe_aux_loss_coeff trains the routers and --freeze_router true keeps them; leave out one of them"
    yield from _token_budget_problems(cfg)
    if training.lr_warmup_iters is not None and not cfg.is_default("lr_warmup_fraction"):
        yield "--lr_warmup_iters and --lr_warmup_fraction both say how long the warm-up is; give one of them"
    if training.min_lr > training.lr:
        yield f"--min_lr {training.min_lr} is above --lr {training.lr}; it is where the decay ends"
    if training.lr_decay_style == "constant" and training.min_lr > 0:
        yield "--min_lr has no effect with --lr_decay_style constant; leave it out, or decay linear or cosine"
    weights, num_sets = cfg.data.dataset_weights, len(cfg.data.dataset)
    if weights and len(weights) != num_sets:
        yield f"--dataset_weights has {len(weights)} values and --dataset {num_sets}; give one weight per data set"
    if weights and min(weights) * 1000 < sum(weights):
        yield (
            f"--dataset_weights {min(weights)} is less than a thousandth of their sum, {sum(weights)}; leave that data "
            "set out, or give it more"
        )
    if cfg.data.streaming and cfg.data.loss_scale == "all":
        yield (
            "--loss_scale all makes a row of every turn of the assistant, and --streaming true reads one row a record; "
            "leave out one of them"
        )
    for flag in ("eval_steps", "eval_samples", "eval_generate"):
        if not cfg.is_default(flag) and not cfg.data.eval_dataset:
            yield f"--{flag} needs --eval_dataset"
