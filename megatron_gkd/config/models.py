"""Sections of a run's configuration (run.py): the student, and who teaches it."""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_gkd.config.dtypes import Dtype, DtypeChoice
from megatron_gkd.config.schema import Section, setting
from megatron_gkd.config.servers import (
    LocalTeacher,
    NoTeacher,
    SelfTeaching,
    ServerTeachers,
    TeacherKind,
    parse_servers,
)


@dataclass(frozen=True)
class ModelConfig(Section):
    """Student model."""

    model: str = setting(help="Student: a Hugging Face model directory, or a name on a hub.", path=True)
    dtype: DtypeChoice = setting(
        "auto",
        "Type of the weights and activations of both models; losses and reductions are always fp32. auto: bf16 on "
        "CUDA, fp32 on a CPU.",
    )
    use_hf: bool = setting(
        True,
        "Names of models and data sets without HF:: or MS:: in front are looked up on Hugging Face's hub; false: on "
        "ModelScope, which needs the package modelscope-hub.",
    )
    freeze_embeddings: bool = setting(
        False, "Do not train the student's embedding; with tied embeddings this is its head too."
    )
    freeze_router: bool = setting(False, "Do not train the routers of a mixture-of-experts student.")
    freeze_vision: bool = setting(
        True, "Do not train the vision tower of a vision-language student; false: train it with the rest."
    )
    freeze_projector: bool = setting(
        False, "Do not train its projector, between tower and decoder, which is trained by default."
    )

    @property
    def precision(self) -> Dtype:
        """The dtype, after `auto` has been resolved (train/setup.py, `with_dtype`)."""
        assert self.dtype != "auto", "with_dtype resolves it"
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
        "Teacher: a Hugging Face model directory, or a name on a hub; optional with --teacher_model_server. Without "
        "both, the student's current weights teach, with the column teacher_prompt of the data as their prompt. With "
        "--tuner_type lora, then and where it is the same as --model, the student's frozen weights teach.",
        path=True,
    )
    teacher_model_server: str | None = setting(
        None,
        "URL of an external teacher (launch/teacher_server.sh, vllm serve, swift deploy); several, separated by "
        "commas, serve one teacher. "
        'Several teachers: a JSON list such as [{"url": "http://a:8000", "tags": ["math"]}, {"url": "http://b:8000"}]; '
        "one without tags takes the rest. Needs --gkd_logits_topk.",
    )
    teacher_tag_key: str | None = setting(
        None, "The column of the data that holds a row's tag, if the teacher servers have tags."
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
    teacher_decoder_last_pipeline_num_layers: int | None = setting(
        None, "Layers of the teacher's last pipeline stage; null: as many as the others.", ge=1
    )
    teacher_account_for_embedding_in_pipeline_split: bool = setting(
        False, "Count the teacher's embedding as a layer of its first stage."
    )
    teacher_account_for_loss_in_pipeline_split: bool = setting(
        False, "Count the teacher's head as a layer of its last stage."
    )
    teacher_pipeline_model_parallel_layout: str | None = setting(
        None, "Layers of every stage of the teacher, in the form of --pipeline_model_parallel_layout."
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
        "colocate: the teacher shares the student's ranks; separate: the last --teacher_world_size ranks hold only the "
        "teacher, and work ahead of the student.",
    )
    teacher_world_size: int | None = setting(
        None, "Ranks of the teacher with --teacher_placement separate, the last of the world.", ge=1
    )
    teacher_nodes: int | None = setting(
        None, "The last nodes of the job that are the teacher's, instead of --teacher_world_size.", ge=1
    )
    offload_teacher_model: bool = setting(False, "Keep the teacher in host memory while the student trains.")
    teacher_micro_batch_size: int | None = setting(
        None, "Samples in a micro-batch of the teacher; null: --micro_batch_size.", ge=1
    )
    teacher_micro_batch_tokens: int | None = setting(
        None,
        "Maximum number of tokens in a micro-batch of the teacher, padding included, instead of a number of samples.",
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
        """The kind of teacher that the flags say."""
        if self.objective == "sft":
            return NoTeacher()
        if self.teacher_model_server is not None:
            return ServerTeachers(parse_servers(self.teacher_model_server))
        if self.teacher_model is not None:
            return LocalTeacher(self.teacher_model, self.teacher_placement == "separate")
        return SelfTeaching()
