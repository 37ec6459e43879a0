"""Sections of a run's configuration (run.py): layout, data, batch and optimizer."""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_gkd.config.row_flags import plugins_setting, prompt_template_setting, teacher_prompt_template_setting
from megatron_gkd.config.schema import Section, setting
from megatron_gkd.config.template_flags import kwargs_setting, template_kwargs, thinking_setting


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
        None, "Layers of the first pipeline stage; the others share the rest evenly. null: as many as the others.", ge=1
    )
    decoder_last_pipeline_num_layers: int | None = setting(
        None, "Layers of the last pipeline stage; null: as many as the others.", ge=1
    )
    account_for_embedding_in_pipeline_split: bool = setting(
        False, "Count the embedding as a layer of the first stage when layers are distributed evenly."
    )
    account_for_loss_in_pipeline_split: bool = setting(
        False, "Count the head and the loss as a layer of the last stage when layers are distributed evenly."
    )
    pipeline_model_parallel_layout: str | None = setting(
        None,
        "Layers of every stage, in Megatron's form: E the embedding, t a layer, L the loss, | between stages, *n "
        "repeats what precedes it, such as Et*3|t*5|t*4L. With a virtual pipeline: layers of every chunk.",
    )
    use_distributed_optimizer: bool = setting(True, "Shard the optimizer's state over the data parallel ranks.")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA if there is a GPU, otherwise CPU with gloo.")
    distributed_timeout_minutes: float = setting(
        10.0, "Minutes after which a collective that has not finished is an error.", gt=0
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
        (),
        "Share of the samples that each --dataset gets, in their order; empty: in proportion to their rows.",
        gt=0,
        repeats=True,
    )
    eval_dataset: list[str] = setting((), "Held-out data, in the same forms.", path=True)
    eval_samples: int | None = setting(None, "Rows of the held-out data that are used; null: all.", gt=0)
    max_length: int = setting(1024, "Maximum number of tokens of prompt and completion together.", ge=2)
    packing: bool = setting(False, "Pack several samples into one sequence of at most --max_length tokens.")
    on_bad_row: Literal["stop", "skip"] = setting("stop", "At a malformed row: stop, or skip and count it.")
    overlong: Literal["drop", "truncate_left", "stop"] = setting(
        "drop", "A row longer than --max_length: drop and count it, cut its prompt from the left, or stop."
    )
    loss_scale: Literal["last_round", "all"] = setting(
        "last_round",
        "Which turns of the assistant carry the loss: the last one of a row, or all, each as a separate row with the "
        "turns before it as its prompt. Marks in the data take precedence.",
    )
    chat_template_kwargs: str | None = kwargs_setting()
    enable_thinking: bool | None = thinking_setting()
    external_plugins: list[str] = plugins_setting()
    prompt_template: str | None = prompt_template_setting()
    teacher_prompt_template: str | None = teacher_prompt_template_setting()
    max_image_tiles: int | None = setting(
        None,
        "Maximum number of tiles of an image, for the student and its teacher (if there are several, a view of the "
        "whole image is added); null: as in the model's processor.",
        ge=1,
    )
    image_url_dir: str | None = setting(
        None,
        "Directory in which images that rows name by an http(s) URL are kept: each is fetched once, when its row is "
        "read. null: such a row is malformed.",
        path=True,
    )
    prompt_only: Literal["stop", "drop"] = setting(
        "stop",
        "A row without a completion when one is needed (held-out rows; --lmbda below 1 with --seq_kd false): stop, or "
        "drop and count it.",
    )
    shuffle: bool = setting(
        True, "Use the rows in a new random order in every epoch; false: in the order of the files."
    )
    streaming: bool = setting(
        False, "Read and tokenise training rows when they are used, instead of all of them before the first step."
    )
    data_cache_dir: str | None = setting(
        None,
        "Directory in which tokenised data sets are kept, for the other ranks of a node and for later starts; null: "
        "$GKD_DATA_CACHE_DIR, or megatron_gkd in $HF_HOME (~/.cache/huggingface); none: every rank tokenises.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        assert self.template_kwargs, "raises for what is not a JSON object"

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
        "teacher, unless it has flags of its own), instead of --micro_batch_size; with or without --packing.",
        ge=1,
    )
    global_batch_size: int = setting(16, "Samples per step, over all ranks.", ge=1)
    train_iters: int | None = setting(None, "Steps to train; null: as many as --num_train_epochs needs.", ge=1)
    num_train_epochs: float | None = setting(None, "Passes over the data; null, and no --train_iters: 1.", gt=0)
    lr: float = setting(1e-5, "Peak learning rate (AdamW).", gt=0)
    min_lr: float = setting(0.0, "Learning rate at the end of the decay.", ge=0)
    lr_decay_style: Literal["constant", "linear", "cosine"] = setting(
        "cosine", "Schedule of the learning rate after the warm-up."
    )
    lr_warmup_fraction: float = setting(
        0.05, "Share of the steps in which the learning rate rises linearly from 0.", ge=0, le=1
    )
    lr_warmup_iters: int | None = setting(None, "Steps of the warm-up, instead of a share.", ge=0)
    weight_decay: float = setting(0.1, "AdamW weight decay.", ge=0)
    moe_aux_loss_coeff: float = setting(
        0.0, "Coefficient of the load-balancing loss of a mixture-of-experts student's routers; 0: none.", ge=0
    )
    moe_router_load_balancing_type: Literal["aux_loss", "seq_aux_loss", "global_aux_loss"] = setting(
        "aux_loss", "The tokens over which loads are balanced: those of a micro-batch (aux_loss)."
    )
    moe_z_loss_coeff: float = setting(0.0, "Coefficient of the routers' z-loss; 0: none.", ge=0)
    clip_grad: float = setting(1.0, "Maximum gradient norm; 0: no clipping.", ge=0)
    adam_beta1: float = setting(0.9, "AdamW beta 1.", ge=0, lt=1)
    adam_beta2: float = setting(0.95, "AdamW beta 2.", ge=0, lt=1)
    adam_eps: float = setting(1e-8, "AdamW epsilon.", gt=0)
    max_bad_steps: int = setting(
        3,
        "Stop after this many consecutive steps whose loss or gradient norm is not finite; such steps change no "
        "weights.",
        ge=1,
    )
    seed: int = setting(42, "Seed of the order of the rows and the source of each sample.", ge=0, lt=2**32)

    def warmup_steps(self, num_steps: int) -> int:
        """Steps of the warm-up in a run of this many steps."""
        share = int(self.lr_warmup_fraction * num_steps)
        return share if self.lr_warmup_iters is None else self.lr_warmup_iters

    def num_steps(self, num_rows: int) -> int:
        """Steps on a data set of this many rows: --train_iters, else the steps that cover --num_train_epochs (or 1)."""
        return self.train_iters or math.ceil((self.num_train_epochs or 1) * num_rows / self.global_batch_size)
