"""The configuration of a run: one frozen dataclass per component, one flat flag per field.

`RunConfig` holds the sections; code reads `cfg.distillation.beta`, the command line says `--beta`, a YAML file `beta:`
(flags.py). A section checks the type and range of its own fields when it is made. `RunConfig.validate()`, called before
any work is done, checks what spans sections (validate.py) and then refuses, by name, what this version does not
have (not_built.py).

A flag that is set away from its default has an effect, or is refused, or is named at the start as without one
(no_effect.py): none is accepted and ignored.
"""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from typing import Any, Literal

from megatron_gkd.config.dtypes import Dtype, DtypeChoice
from megatron_gkd.config.levers import (
    KernelsConfig,
    OffloadConfig,
    OptimizerMemoryConfig,
    OverlapConfig,
    RecomputeConfig,
    vllm_options,
)
from megatron_gkd.config.not_built import NOT_BUILT, Command, refuse_not_built
from megatron_gkd.config.row_flags import plugins_setting, prompt_template_setting, teacher_prompt_template_setting
from megatron_gkd.config.schedules import Schedule, check_schedules, constant, read_schedule
from megatron_gkd.config.schema import Section, default_of, setting, show, type_hints, type_text
from megatron_gkd.config.servers import (
    LocalTeacher,
    NoTeacher,
    SelfTeaching,
    ServerTeachers,
    TeacherKind,
    parse_servers,
)
from megatron_gkd.config.template_flags import kwargs_setting, template_kwargs, thinking_setting
from megatron_gkd.config.tuner import TunerConfig
from megatron_gkd.config.validate import refuse_contradictions
from megatron_gkd.errors import ConfigError
from megatron_gkd.records import StepValues

BUILT_IN_VERIFIERS = ("last_number", "exact")

__all__ = ["NOT_BUILT", "RunConfig", "flags"]


@dataclass(frozen=True)
class ModelConfig(Section):
    """Student model."""

    model: str = setting(help="Student: a Hugging Face model directory, or a name on a hub.", path=True)
    dtype: DtypeChoice = setting(
        "auto",
        "Type of the weights and activations of both models; losses and reductions are fp32 in any case. auto: bf16 on "
        "CUDA, fp32 on a CPU.",
    )
    use_hf: bool = setting(
        True,
        "Names without HF:: or MS:: before them, of models and data sets, are of Hugging Face's hub; false: of "
        "ModelScope, which needs the package modelscope-hub.",
    )
    freeze_embeddings: bool = setting(
        False, "Keep the student's embedding as it is; with tied embeddings that is its head too."
    )
    freeze_router: bool = setting(False, "Keep the routers of a mixture-of-experts student as they are.")
    freeze_vision: bool = setting(
        True, "Keep the vision tower of a vision-language student as it is; false trains it with the rest."
    )
    freeze_projector: bool = setting(
        False, "The same of its projector, between the tower and the decoder, which is trained by default."
    )

    @property
    def precision(self) -> Dtype:
        """The dtype, once `auto` has been decided (train/setup.py, `with_dtype`)."""
        assert self.dtype != "auto", "the device is known, and decides"
        return self.dtype


@dataclass(frozen=True)
class TeacherConfig(Section):
    """Teacher: a local model in its own parallel layout, servers, the student itself, or none."""

    objective: Literal["gkd", "sft"] = setting(
        "gkd",
        "gkd: the divergence from a teacher; sft: cross entropy on the data's completions alone, without a teacher.",
    )
    teacher_model: str | None = setting(
        None,
        "Teacher: a Hugging Face model directory, or a name on a hub; it may be left out with --teacher_model_server. "
        "Without both the student's current weights teach, given the column teacher_prompt of the data in place of the "
        "prompt. With --tuner_type lora, there and where it is --model, the student's frozen weights teach.",
        path=True,
    )
    teacher_model_server: str | None = setting(
        None,
        "URL of an external teacher (launch/teacher_server.sh, vllm serve, swift deploy); several with commas serve "
        "one teacher. "
        'Several teachers: a JSON list such as [{"url": "http://a:8000", "tags": ["math"]}, {"url": "http://b:8000"}]; '
        "one without tags takes the rest. Needs --gkd_logits_topk.",
    )
    teacher_tag_key: str | None = setting(
        None, "The column of the data that holds a row's tag, where the teacher servers have tags."
    )
    teacher_timeout_s: float | None = setting(
        None,
        "Time limit, in seconds, of a step's requests to the teacher servers; null: 0.8 of "
        "--distributed_timeout_minutes.",
        gt=0,
    )
    teacher_tensor_model_parallel_size: int | None = setting(
        None, "Tensor parallel size of the teacher; null: the student's.", ge=1
    )
    teacher_pipeline_model_parallel_size: int | None = setting(
        None, "Pipeline stages of the teacher; null: the student's.", ge=1
    )
    teacher_decoder_first_pipeline_num_layers: int | None = setting(
        None, "Layers of the teacher's first pipeline stage; null: as many as the others.", ge=1
    )
    teacher_decoder_last_pipeline_num_layers: int | None = setting(None, "The same of the last stage.", ge=1)
    teacher_account_for_embedding_in_pipeline_split: bool = setting(
        False, "Count the teacher's embedding as a layer of its first stage."
    )
    teacher_account_for_loss_in_pipeline_split: bool = setting(
        False, "Count the teacher's head as a layer of its last stage."
    )
    teacher_pipeline_model_parallel_layout: str | None = setting(
        None, "Layers of every stage of the teacher, as in --pipeline_model_parallel_layout."
    )
    teacher_context_parallel_size: int | None = setting(
        None, "Context parallel size of the teacher; null: the student's.", ge=1
    )
    teacher_expert_model_parallel_size: int | None = setting(
        None, "Expert parallel size of the teacher; null: the student's, and 1 for a dense teacher.", ge=1
    )
    teacher_expert_tensor_parallel_size: int | None = setting(
        None,
        "Ranks that share one expert of the teacher; null: --expert_tensor_parallel_size, and without it the teacher's "
        "tensor parallel size.",
        ge=1,
    )
    teacher_placement: Literal["colocate", "separate"] = setting(
        "colocate",
        "colocate: the teacher shares the student's ranks; separate: the last --teacher_world_size ranks hold the "
        "teacher alone, and work ahead of the student.",
    )
    teacher_world_size: int | None = setting(
        None, "Ranks of the teacher with --teacher_placement separate, the last of the world.", ge=1
    )
    teacher_nodes: int | None = setting(
        None, "The same in whole nodes, the last of the job, instead of --teacher_world_size.", ge=1
    )
    offload_teacher_model: bool = setting(False, "Keep the teacher in host memory while the student trains.")
    teacher_micro_batch_size: int | None = setting(
        None, "Samples in a micro-batch of the teacher; null: --micro_batch_size.", ge=1
    )
    teacher_micro_batch_tokens: int | None = setting(
        None,
        "Maximum number of tokens in a teacher's micro-batch, padding included; instead of a number of samples.",
        ge=1,
    )
    signal_memory_gb: float = setting(
        8.0,
        "Device memory for teacher signals, in 10^9 bytes a rank; the rest waits in host memory.",
        gt=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.teacher_model_server is not None:
            parse_servers(self.teacher_model_server)

    @property
    def kind(self) -> TeacherKind:
        """Who teaches."""
        if self.objective == "sft":
            return NoTeacher()
        if self.teacher_model_server is not None:
            return ServerTeachers(parse_servers(self.teacher_model_server))
        if self.teacher_model is not None:
            return LocalTeacher(self.teacher_model, self.teacher_placement == "separate")
        return SelfTeaching()


@dataclass(frozen=True)
class DistillationConfig(Section):
    """Distillation: divergence, sources of the completions, the teacher's signal."""

    beta: float | str = setting(
        0.5,
        "Divergence: 0 is forward KL(teacher||student), 1 is reverse KL(student||teacher), between them generalized "
        "JSD. The ends are definitions, not limits: the JSD tends to 0 there, so beta 0.01 trains about 100 times more "
        "weakly than beta 0.",
        ge=0,
        le=1,
        schedule=True,
    )
    lmbda: float | str = setting(
        0.5,
        "Probability, per sample, that the student samples the completion (on-policy).",
        ge=0,
        le=1,
        schedule=True,
    )
    seq_kd: bool = setting(
        False,
        "Samples that are not on-policy: the teacher samples the completion with vLLM (true), or the data set gives it "
        "(false).",
    )
    sft_alpha: float = setting(
        0.0, "Weight of the cross entropy added on samples whose completion is not the student's.", ge=0
    )
    gkd_logits_topk: int | None = setting(
        None, "K: use the teacher's K most probable tokens; null: the full vocabulary.", gt=0
    )
    topk_tail: Literal["renormalize", "bucket"] = setting(
        "renormalize",
        "With --gkd_logits_topk: renormalize both models on the K tokens, or keep the rest as one outcome (bucket).",
    )
    loss_temperature: float = setting(
        1.0, "Temperature of both distributions in the loss; --temperature is that of sampling.", gt=0
    )
    loss_path: Literal["auto", "fused", "logits"] = setting(
        "auto",
        "fused: the loss straight from hidden states, in token chunks; logits: through the logits of each "
        "micro-batch; auto: fused.",
    )
    use_liger_kernel: bool = setting(
        False, "Demand the fused linear loss (as --loss_path fused); not together with --gkd_logits_topk."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedules(self)

    @property
    def samples_teacher(self) -> bool:
        """Whether completions are sampled by the teacher."""
        return self.seq_kd and read_schedule("lmbda", self.lmbda).least < 1

    @property
    def fuse_loss(self) -> bool:
        """Whether the loss never holds logits of a micro-batch."""
        return self.use_liger_kernel or self.loss_path != "logits"


@dataclass(frozen=True)
class SamplingConfig(Section):
    """Sampling of completions from the student, for `--lmbda` above 0."""

    temperature: float | str = setting(0.9, "Sampling temperature.", gt=0, schedule=True)
    top_p: float = setting(
        1.0, "Sample from the smallest set of tokens with this probability; 1: from all.", gt=0, le=1
    )
    top_k: int = setting(0, "Sample from this many most probable tokens; 0: from all.", ge=0)
    max_completion_length: int | str = setting(
        512, "Maximum number of tokens sampled per completion.", gt=0, schedule=True
    )
    use_vllm: bool = setting(True, "Sample with vLLM, the only engine; false refuses to sample.")
    vllm_mode: Literal["colocate", "server", "subprocess"] = setting(
        "colocate",
        "colocate: vLLM in the training processes; server: servers that launch/rollout_server.sh started; subprocess: "
        "a server that the first rank starts on its own machine and ends.",
    )
    vllm_gpu_memory_utilization: float = setting(0.9, "Share of each GPU's memory for a colocated vLLM.", gt=0, le=1)
    vllm_tensor_parallel_size: int = setting(1, "Tensor parallel size of a colocated vLLM.", ge=1)
    vllm_enforce_eager: bool = setting(False, "Sample without CUDA graphs and compilation, as on a CPU in any case.")
    vllm_enable_lora: bool = setting(
        False,
        "With --tuner_type lora: send the adapter alone, into the LoRA of a colocated vLLM that holds the weights of "
        "--model; false: merged weights.",
    )
    vllm_max_num_seqs: int | None = setting(None, "Maximum number of sequences that an engine samples at once.", ge=1)
    vllm_engine_kwargs: str | None = setting(
        None,
        "Further arguments of vLLM's engines, by vLLM's names, as a JSON object such as "
        '{"max_num_batched_tokens": 16384}.',
    )
    vllm_max_model_len: int | None = setting(None, "Longest sequence of vLLM; null: --max_length.", gt=1)
    sleep_level: Literal[0, 1, 2] = setting(
        0, "What a colocated vLLM frees while the student trains: 0 nothing, 1 and 2 as in vLLM."
    )
    vllm_server_host: str | None = setting(
        None, "Host of the rollout server; several with commas, each with its own port as HOST:PORT if need be."
    )
    vllm_server_port: int = setting(8000, "Port of the rollout servers that are named without one.", ge=1, le=65535)
    vllm_server_timeout: float = setting(
        20.0,
        "Seconds for which a rollout server that cannot be reached yet is tried at the start, at most 0.9 of "
        "--distributed_timeout_minutes.",
        gt=0,
    )
    steps_per_generation: int = setting(
        1, "Steps whose completions are sampled at once, with the weights of the first; 1 is strictly on-policy.", ge=1
    )
    rollout_lag: Literal[0, 1] = setting(
        0, "1: sample a step's completions while the step before it trains (engines with devices of their own)."
    )
    weight_bucket_mb: int = setting(512, "Maximum size, in megabytes, of a bucket of weights for the engines.", ge=1)
    verify_sync_every: int = setting(
        0,
        "Compare the engines' log-probabilities with the student's after the first push of weights and after every so "
        "many; 0: after the first only.",
        ge=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedules(self)
        assert isinstance(self.engine_options, dict)

    @property
    def engine_options(self) -> dict[str, Any]:
        """What vLLM is given beside what the run decides, by its names. Raises ConfigError."""
        return vllm_options(self.vllm_enforce_eager, self.vllm_max_num_seqs, self.vllm_engine_kwargs)


@dataclass(frozen=True)
class TeacherSamplingConfig(Section):
    """Sampling of completions from the teacher, for `--seq_kd true`; how tokens are drawn and the lengths: as above."""

    teacher_samples_cache: str | None = setting(
        None,
        "Directory that keeps the completions, by teacher, prompt and sampling settings; several runs may share one. "
        "null: teacher_samples in the run directory.",
        path=True,
    )
    teacher_sampling_steps: int | None = setting(
        None,
        "Steps whose completions a local teacher samples at once. null: the whole run, before the models are loaded, "
        "so that its engine has the devices to itself; else the engine is started again every so many steps, and "
        "shares the devices with both models.",
        ge=1,
    )
    teacher_vllm_tensor_parallel_size: int = setting(
        1, "Tensor parallel size of a local teacher's engine, on the first rank's machine.", ge=1
    )
    teacher_vllm_gpu_memory_utilization: float = setting(
        0.9, "Share of each GPU's memory for a local teacher's engine.", gt=0, le=1
    )


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Parallel layout of the student, and the machine."""

    tensor_model_parallel_size: int = setting(1, "Ranks that share each layer.", ge=1)
    pipeline_model_parallel_size: int = setting(1, "Pipeline stages.", ge=1)
    context_parallel_size: int = setting(1, "Ranks that share each sequence.", ge=1)
    expert_model_parallel_size: int = setting(1, "Ranks that share the experts of a mixture-of-experts model.", ge=1)
    expert_tensor_parallel_size: int | None = setting(
        None, "Ranks that share one expert; null: --tensor_model_parallel_size.", ge=1
    )
    virtual_pipeline_model_parallel_size: int | None = setting(
        None, "Model chunks per pipeline stage (interleaved schedule); null: 1.", ge=1
    )
    sequence_parallel: bool = setting(False, "Split the activations between layers over the tensor parallel ranks.")
    decoder_first_pipeline_num_layers: int | None = setting(
        None, "Layers of the first pipeline stage; the other stages share the rest evenly. null: as many as they.", ge=1
    )
    decoder_last_pipeline_num_layers: int | None = setting(None, "The same of the last stage.", ge=1)
    account_for_embedding_in_pipeline_split: bool = setting(
        False, "Count the embedding as a layer of the first stage where layers are shared evenly."
    )
    account_for_loss_in_pipeline_split: bool = setting(
        False, "Count the head and the loss as a layer of the last stage where layers are shared evenly."
    )
    pipeline_model_parallel_layout: str | None = setting(
        None,
        "Layers of every stage, as Megatron writes it: E the embedding, t a layer, L the loss, | between stages, *n "
        "repeats what stands before it, such as Et*3|t*5|t*4L. With a virtual pipeline, of every chunk.",
    )
    use_distributed_optimizer: bool = setting(True, "Split the optimizer's state over the data parallel ranks.")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where there is a GPU, else CPU with gloo.")
    distributed_timeout_minutes: float = setting(
        10.0, "Minutes after which a collective that does not finish is an error.", gt=0
    )
    check_replicas_steps: int = setting(
        100,
        "Compare the weights of the data parallel replicas before the first step and every this many steps; 0: never.",
        ge=0,
    )


@dataclass(frozen=True)
class DataConfig(Section):
    """Data."""

    dataset: list[str] = setting(
        (),
        "Training data: JSONL or Parquet files, directories of Hugging Face data sets saved on disk, or names on a "
        "hub: OWNER/NAME[@REVISION][:SUBSET][#ROWS].",
        path=True,
    )
    dataset_weights: list[float] = setting(
        (), "How often rows of each --dataset are drawn, in their order; empty: in proportion to their rows.", gt=0
    )
    eval_dataset: list[str] = setting((), "Held-out data, in the same form.", path=True)
    eval_samples: int | None = setting(None, "Rows of the held-out data that are used; null: all.", gt=0)
    max_length: int = setting(1024, "Maximum number of tokens of prompt and completion together.", ge=2)
    packing: bool = setting(False, "Pack several samples into one sequence of at most --max_length tokens.")
    on_bad_row: Literal["stop", "skip"] = setting("stop", "At a malformed row: stop, or skip and count it.")
    overlong: Literal["drop", "truncate_left", "stop"] = setting(
        "drop", "A row over --max_length: drop and count it, cut its prompt from the left, or stop."
    )
    loss_scale: Literal["last_round", "all"] = setting(
        "last_round",
        "Which turns of the assistant carry the loss: the last one of a row, or all, each as a row of its own with the "
        "turns before it as its prompt. Marks in the data win.",
    )
    chat_template_kwargs: str | None = kwargs_setting()
    enable_thinking: bool | None = thinking_setting()
    external_plugins: list[str] = plugins_setting()
    prompt_template: str | None = prompt_template_setting()
    teacher_prompt_template: str | None = teacher_prompt_template_setting()
    max_image_tiles: int | None = setting(
        None,
        "Most tiles that an image is cut into, for the student and its teacher (a whole view comes on top where there "
        "are several); null: as the model's processor says.",
        ge=1,
    )
    prompt_only: Literal["stop", "drop"] = setting(
        "stop",
        "A row without a completion where a completion of the data is needed (held-out rows; --lmbda below 1 with "
        "--seq_kd false): stop, or drop and count it.",
    )
    shuffle: bool = setting(
        True, "Draw the rows in a new random order in every epoch; false: in the order of the files."
    )
    streaming: bool = setting(
        False, "Read and tokenise training rows when they are used, instead of all before the first step."
    )
    data_cache_dir: str | None = setting(
        None,
        "Directory in which tokenised data sets are kept, for the other ranks of a node and for later starts; null: "
        "$GKD_DATA_CACHE_DIR, or megatron_gkd in $HF_HOME (~/.cache/huggingface); none: every rank tokenises.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.template_kwargs, "an object in JSON"

    @property
    def template_kwargs(self) -> str:
        """--chat_template_kwargs and --enable_thinking, as JSON. Raises ConfigError."""
        return template_kwargs(self.chat_template_kwargs, self.enable_thinking)


@dataclass(frozen=True)
class TrainingConfig(Section):
    """Training: batch, length, optimizer."""

    micro_batch_size: int = setting(1, "Samples in a micro-batch of a data parallel rank.", ge=1)
    max_tokens_per_gpu: int | None = setting(
        None,
        "Maximum number of tokens, padding included, of a rank's part of a micro-batch of the student (and of the "
        "teacher, where nothing sizes its own); instead of --micro_batch_size, with --packing or without.",
        ge=1,
    )
    global_batch_size: int = setting(16, "Samples per step, over all ranks.", ge=1)
    train_iters: int | None = setting(None, "Steps to train; null: as many as --num_train_epochs says.", ge=1)
    num_train_epochs: float | None = setting(None, "Passes over the data; null, and no --train_iters: 1.", gt=0)
    lr: float = setting(1e-5, "Peak learning rate (AdamW).", gt=0)
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.", ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = setting(
        "cosine", "Schedule of the learning rate after the warm-up."
    )
    lr_warmup_fraction: float = setting(
        0.05, "Share of the steps in which the learning rate rises linearly from 0.", ge=0, le=1
    )
    lr_warmup_iters: int | None = setting(None, "The same as a number of steps, instead of a share.", ge=0)
    weight_decay: float = setting(0.1, "AdamW weight decay.", ge=0)
    moe_aux_loss_coeff: float = setting(
        0.0, "Coefficient of the load-balancing loss of a mixture-of-experts student's routers; 0: none.", ge=0
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss"] = setting(
        "aux_loss", "What loads are balanced over: the tokens of a micro-batch (aux_loss)."
    )
    moe_z_loss_coeff: float = setting(0.0, "Coefficient of the routers' z-loss; 0: none.", ge=0)
    clip_grad: float = setting(1.0, "Largest gradient norm; 0: no clipping.", ge=0)
    adam_beta1: float = setting(0.9, "AdamW beta 1.", ge=0, lt=1)
    adam_beta2: float = setting(0.95, "AdamW beta 2.", ge=0, lt=1)
    adam_eps: float = setting(1e-8, "AdamW epsilon.", gt=0)
    max_bad_steps: int = setting(
        3,
        "Stop after this many steps in a row whose loss or gradient norm is not finite; none of them changes a weight.",
        ge=1,
    )
    seed: int = setting(42, "Seed of the order of the rows and the source of each sample.", ge=0, lt=2**32)

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of the warm-up, of this many."""
        share = int(self.lr_warmup_fraction * num_steps)
        return share if self.lr_warmup_iters is None else self.lr_warmup_iters

    def num_steps(self, num_rows: int) -> int:
        """Steps on a data set of this many rows: --train_iters, else the steps that cover --num_train_epochs (or 1)."""
        return self.train_iters or math.ceil((self.num_train_epochs or 1) * num_rows / self.global_batch_size)


@dataclass(frozen=True)
class CheckpointConfig(Section):
    """Run directory and checkpoints."""

    save: str = setting("runs/gkd", "Run directory: configuration, metrics, checkpoints, exported student.", path=True)
    load: str | None = setting(
        None,
        "Run directory (its newest undamaged checkpoint) or checkpoint to resume from; or a Hugging Face model "
        "directory with the weights to start from.",
        path=True,
    )
    auto_resume: bool = setting(
        False,
        "Go on from the newest checkpoint in --save where there is one; else begin, from --load if that is given, and "
        "replace what a start without a checkpoint recorded. For runs that are restarted with the same command line.",
    )
    verify_checkpoint: Literal["full", "sizes"] = setting(
        "full",
        "Before loading: read every file of the checkpoint and compare it with its checksum, or compare sizes alone.",
    )
    allow_changed_config: bool = setting(
        False, "Resume although flags that change the numbers differ from those of the run that saved."
    )
    save_steps: int = setting(500, "Save a checkpoint every this many steps, and at the end.", ge=1)
    async_save: bool = setting(
        False, "Write checkpoints while training goes on; it stops only for a copy in host memory."
    )
    save_total_limit: int | None = setting(None, "Keep this many newest checkpoints; null: all.", ge=1)
    no_save_optim: bool = setting(
        False, "Save checkpoints without the optimizer's state; one can be gone on from with --no_load_optim alone."
    )
    no_save_rng: bool = setting(
        False, "Save checkpoints without random states; one can be gone on from with --no_load_rng alone."
    )
    no_load_optim: bool = setting(
        False, "Go on from a checkpoint with the optimizer's moments at zero, whether it has them or not."
    )
    no_load_rng: bool = setting(False, "Go on from a checkpoint with new random states, of --seed and the step.")
    finetune: bool = setting(
        False,
        "Begin at step 0 from weights alone, as every run does that is given no --load, or a Hugging Face directory; "
        "refused with the checkpoint of a run.",
    )
    save_hf: bool = setting(True, "Export the student as a Hugging Face model directory at the end.")
    save_hf_dtype: Literal["fp32", "bf16", "fp16", "source"] | None = setting(
        None,
        "Type of the exported weights; null: --dtype, which holds what was trained. A narrower one, or that of the "
        "files of --model (source), may round small updates away; the difference is measured and logged.",
    )


@dataclass(frozen=True)
class LoggingConfig(Section):
    """Logging and evaluation during training."""

    logging_steps: int = setting(1, "Write metrics every this many steps.", ge=1)
    eval_steps: int | None = setting(
        None,
        "Evaluate on --eval_dataset every this many steps; null: before the first and after the last only.",
        ge=1,
    )
    eval_generate: int = setting(
        0,
        "At every evaluation, greedy completions of this many held-out prompts, the first ones, by vLLM; 0: none.",
        ge=0,
    )
    eval_verifier: str = setting(
        "last_number",
        "What makes such a completion right: last_number or exact, against the column answer of the data (or the row's "
        "completion), or a Python function module:function(text, row).",
    )
    loss_spike_factor: float | None = setting(
        None, "Warn of a loss above this many times the median of the last 32 steps; null: never.", gt=1
    )
    health_steps: int = setting(
        100,
        "Check teacher and sampler (docs/health.md) in the first step of a start and every this many steps; 0: never.",
        ge=0,
    )
    on_teacher_fault: Literal["stop", "warn"] = setting(
        "stop", "A teacher that is uniform, frozen or the student itself: stop before the update, or warn."
    )
    report_to: list[Literal["tensorboard", "wandb", "none"]] = setting(
        ("tensorboard",), "Where metrics go beside metrics.jsonl in the run directory."
    )
    log_completions: bool = setting(
        False,
        "Write what was sampled for each logged step into completions.jsonl, and as a table to --report_to.",
    )
    num_completions_to_log: int = setting(16, "The first so many of a step, with --log_completions.", ge=1)
    log_level: Literal["debug", "info", "warning", "error"] = setting(
        "info", "Least severe messages shown; debug adds tracebacks."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_verifier not in BUILT_IN_VERIFIERS and not all(self.eval_verifier.partition(":")):
            raise ConfigError(
                f"--eval_verifier is {self.eval_verifier or 'empty'}; give {' or '.join(BUILT_IN_VERIFIERS)}, or "
                "module:function"
            )
        if "none" in self.report_to and len(self.report_to) > 1:
            raise ConfigError(
                f"--report_to is {show(self.report_to)}; none stands alone: leave it out, or leave out the others"
            )


@dataclass(frozen=True)
class RunConfig:
    """The configuration of a run. Change one with dataclasses.replace."""

    model: ModelConfig
    tuner: TunerConfig = field(default_factory=TunerConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    teacher_sampling: TeacherSamplingConfig = field(default_factory=TeacherSamplingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    recompute: RecomputeConfig = field(default_factory=RecomputeConfig)
    overlap: OverlapConfig = field(default_factory=OverlapConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    optimizer: OptimizerMemoryConfig = field(default_factory=OptimizerMemoryConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @classmethod
    def from_flat(cls, values: Mapping[str, Any]) -> RunConfig:
        """From flag name -> value; flags left out have their defaults."""
        sections: dict[str, dict[str, Any]] = {name: {} for name in type_hints(cls)}
        for flag, value in values.items():
            sections[flags()[flag].section][flag] = value
        if "model" not in sections["model"]:
            raise ConfigError("--model is missing; give the student's model directory")
        return cls(**{name: type_hints(cls)[name](**part) for name, part in sections.items()})

    def to_flat(self) -> dict[str, Any]:
        """Flag name -> value, for every flag, in the order of the sections."""
        return {name: self.get(name) for name in flags()}

    def get(self, flag: str) -> Any:
        """The value of a flag by its flat name."""
        return getattr(getattr(self, flags()[flag].section), flag)

    def is_default(self, flag: str) -> bool:
        """Whether a flag has its default value."""
        return bool(self.get(flag) == flags()[flag].default)

    @property
    def generates(self) -> bool:
        """Whether completions are sampled in evaluations."""
        return self.logging.eval_generate > 0 and bool(self.data.eval_dataset)

    @property
    def base_teaches(self) -> bool:
        """Whether the teacher is the student's own frozen weights, its adapter switched off: under --tuner_type lora
        where --teacher_model is --model, or nothing."""
        kind = self.teacher.kind
        if not self.tuner.is_lora or isinstance(kind, SelfTeaching):
            return self.tuner.is_lora
        same = isinstance(kind, LocalTeacher) and os.path.realpath(kind.path) == os.path.realpath(self.model.model)
        return same and self.teacher.teacher_placement == "colocate"

    @property
    def exports(self) -> tuple[str, ...]:
        """The directories of the run directory that an export writes; the first one is read back and measured."""
        if not self.tuner.is_lora:
            return ("hf",)
        return ("adapter", "hf") if self.tuner.merge_lora else ("adapter",)

    def schedule(self, flag: str) -> Schedule:
        """What a flag says for every step."""
        return read_schedule(flag, self.get(flag), whole=isinstance(flags()[flag].default, int))

    @property
    def lmbda(self) -> Schedule:
        """--lmbda; 0 without a teacher, where the student learns from the completions of the data alone."""
        return constant(0.0) if isinstance(self.teacher.kind, NoTeacher) else self.schedule("lmbda")

    def values_at(self, step: int) -> StepValues:
        """What changes with the step, for one of them, counted from 1."""
        return StepValues(
            lmbda=self.lmbda.at(step),
            beta=self.schedule("beta").at(step),
            temperature=self.schedule("temperature").at(step),
            max_completion_length=round(self.schedule("max_completion_length").at(step)),
        )

    def validate(self, command: Command = "train") -> None:
        """Raise ConfigError for flags that contradict each other, then NotBuiltError for what this version lacks."""
        refuse_contradictions(self, command)
        refuse_not_built(self, command)


@dataclass(frozen=True)
class Flag:
    """Where a flag lives and what it is."""

    name: str
    section: str
    hint: Any
    item: Field[Any]

    @property
    def default(self) -> Any:
        """MISSING where the flag is required."""
        return default_of(self.item)

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def type_text(self) -> str:
        """As a user reads it."""
        if self.item.metadata["schedule"]:
            return f"{type_text(type(self.default))} or step:value,..."
        return type_text(self.hint)


@cache
def flags() -> dict[str, Flag]:
    """Every flag of a run by name, in the order of the sections."""
    return {
        name: flag for section, cls in type_hints(RunConfig).items() for name, flag in flags_of(cls, section).items()
    }


def flags_of(cls: type, section: str) -> dict[str, Flag]:
    """The flags of one section class."""
    return {item.name: Flag(item.name, section, type_hints(cls)[item.name], item) for item in fields(cls)}
