"""Sections of a run's configuration (run.py): the divergence, and the sources of completions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from megatron_gkd.config.levers import vllm_options
from megatron_gkd.config.schedules import check_schedules, read_schedule
from megatron_gkd.config.schema import Section, setting


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
        "Completions of samples that are not on-policy: sampled from the teacher with vLLM (true), or taken from the "
        "data set (false).",
    )
    sft_alpha: float = setting(
        0.0, "Weight of the cross entropy that is added for samples whose completion is not the student's.", ge=0
    )
    gkd_logits_topk: int | None = setting(
        None, "K: use the teacher's K most probable tokens; null: the full vocabulary.", gt=0
    )
    topk_tail: Literal["renormalize", "bucket"] = setting(
        "renormalize",
        "With --gkd_logits_topk: renormalize both models on the K tokens, or count all other tokens as one outcome "
        "(bucket).",
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
        False, "Require the fused linear loss (as --loss_path fused); cannot be combined with --gkd_logits_topk."
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
        """Whether the loss is computed in chunks, without the logits of a whole micro-batch."""
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
    vllm_enforce_eager: bool = setting(False, "Sample without CUDA graphs and compilation, as always on a CPU.")
    vllm_enable_lora: bool = setting(
        False,
        "With --tuner_type lora: send only the adapter, to a colocated vLLM that holds the weights of --model; false: "
        "send merged weights.",
    )
    vllm_max_num_seqs: int | None = setting(
        None, "Maximum number of sequences that an engine samples at the same time.", ge=1
    )
    vllm_engine_kwargs: str | None = setting(
        None,
        "Further arguments of vLLM's engines, under vLLM's names, as a JSON object such as "
        '{"max_num_batched_tokens": 16384}.',
    )
    vllm_max_model_len: int | None = setting(None, "Maximum sequence length of vLLM; null: --max_length.", gt=1)
    sleep_level: Literal[0, 1, 2] = setting(
        0, "What a colocated vLLM frees while the student trains: 0 nothing, 1 and 2 as in vLLM."
    )
    vllm_server_host: str | None = setting(
        None, "Host of the rollout server; several, separated by commas, each with its own port as HOST:PORT if needed."
    )
    vllm_server_port: int = setting(8000, "Port of the rollout servers that are given without one.", ge=1, le=65535)
    vllm_server_timeout: float = setting(
        20.0,
        "Seconds for which the run waits at the start for a rollout server that cannot be reached yet, at most 0.9 of "
        "--distributed_timeout_minutes.",
        gt=0,
    )
    steps_per_generation: int = setting(
        1, "Steps whose completions are sampled together, with the weights of the first; 1 is strictly on-policy.", ge=1
    )
    rollout_lag: Literal[0, 1] = setting(
        0, "1: sample a step's completions while the previous step trains (engines on separate devices)."
    )
    weight_bucket_mb: int = setting(512, "Maximum size, in megabytes, of a bucket of weights for the engines.", ge=1)
    verify_sync_every: int = setting(
        0,
        "Compare the engines' log-probabilities with the student's after the first push of weights and after every "
        "this many pushes; 0: after the first only.",
        ge=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_schedules(self)
        assert isinstance(self.engine_options, dict)

    @property
    def engine_options(self) -> dict[str, Any]:
        """Further arguments of vLLM, by vLLM's names. Raises ConfigError."""
        return vllm_options(self.vllm_enforce_eager, self.vllm_max_num_seqs, self.vllm_engine_kwargs)


@dataclass(frozen=True)
class TeacherSamplingConfig(Section):
    """Sampling of completions from the teacher, for `--seq_kd true`, with the temperature and lengths above."""

    teacher_samples_cache: str | None = setting(
        None,
        "Directory where completions are kept, by teacher, prompt and sampling settings; several runs may share it. "
        "null: teacher_samples in the run directory.",
        path=True,
    )
    teacher_sampling_steps: int | None = setting(
        None,
        "Steps whose completions a local teacher samples together. null: the whole run, before the models are loaded, "
        "so that its engine has the devices to itself; otherwise the engine is started again every this many steps "
        "and shares the devices with both models.",
        ge=1,
    )
    teacher_vllm_tensor_parallel_size: int = setting(
        1, "Tensor parallel size of a local teacher's engine, on the first rank's machine.", ge=1
    )
    teacher_vllm_gpu_memory_utilization: float = setting(
        0.9, "Share of each GPU's memory for a local teacher's engine.", gt=0, le=1
    )
