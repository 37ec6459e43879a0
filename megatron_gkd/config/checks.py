"""Settings of `megatron-gkd check teacher`, `megatron-gkd check data` and `megatron-gkd check train`."""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from megatron_gkd.config import environment
from megatron_gkd.config.dtypes import Dtype, DtypeChoice
from megatron_gkd.config.hub_names import read_name
from megatron_gkd.config.row_flags import plugins_setting, prompt_template_setting, teacher_prompt_template_setting
from megatron_gkd.config.schema import Section, setting
from megatron_gkd.config.servers import parse_servers
from megatron_gkd.config.template_flags import kwargs_setting, template_kwargs, thinking_setting
from megatron_gkd.errors import ConfigError


@dataclass(frozen=True)
class CheckConfig(Section):
    """Comparison of a teacher server with the same model run locally, on real rows."""

    teacher_model: str = setting(
        help="The teacher: a Hugging Face model directory, or a name on Hugging Face's hub.", path=True
    )
    teacher_model_server: str = setting(help="URL of the teacher server; several with commas.")
    gkd_logits_topk: int = setting(help="K, as in training: the most probable tokens that are compared.", gt=0)
    dataset: list[str] = setting(
        help="Rows with completions: JSONL or Parquet files, data sets saved on disk, or names on a hub.", path=True
    )
    num_rows: int = setting(16, "Rows that are compared, from the first on.", ge=1)
    max_length: int = setting(1024, "Longest row in tokens; longer ones are left out.", ge=2)
    beta: float = setting(0.5, "Divergence of the loss that is compared.", ge=0, le=1)
    dtype: DtypeChoice = setting(
        "auto", "Precision of the local teacher; give the server's. auto: bf16 on CUDA, fp32 on a CPU."
    )
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: CUDA where there is a GPU, else CPU.")
    logprob_tolerance: float | None = setting(
        None, "Largest difference of a log-probability; null: 0.001 in fp32, 1 in bf16 and fp16.", gt=0
    )
    loss_tolerance: float | None = setting(
        None, "Largest difference of a token's loss; null: 0.0001 in fp32, 0.1 in bf16 and fp16.", gt=0
    )
    timeout_s: float = setting(600.0, "Time limit, in seconds, of the server for all rows.", gt=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe messages that are shown.")

    @property
    def precision(self) -> Dtype:
        """The dtype, after `auto` has been resolved."""
        assert self.dtype != "auto", "resolve it for the device first"
        return self.dtype

    @property
    def servers(self) -> tuple[str, ...]:
        """The URLs of --teacher_model_server."""
        return tuple(entry.url for entry in parse_servers(self.teacher_model_server))

    @property
    def tolerances(self) -> tuple[float, float]:
        """Largest accepted difference (of a log-probability, of a token's loss)."""
        logprob, loss = (1e-3, 1e-4) if self.precision == "fp32" else (1.0, 0.1)
        return self.logprob_tolerance or logprob, self.loss_tolerance or loss

    def check(self) -> None:
        """Raise ConfigError for combinations that cannot work."""
        environment.refuse_several_ranks("check")
        if any(entry.tags for entry in parse_servers(self.teacher_model_server)):
            raise ConfigError(
                "--teacher_model_server has tags, and check compares one teacher: give the URLs of its servers alone"
            )
        if not os.path.isdir(self.teacher_model) and read_name(self.teacher_model, "model") is None:
            raise ConfigError(
                f"--teacher_model {self.teacher_model}: there is no such directory; give one in Hugging Face format"
            )


@dataclass(frozen=True)
class CheckDataConfig(Section):
    """What a data set trains on: rows as tokens, and counts over all rows."""

    model: str = setting(
        help="The student: a Hugging Face model directory, or a name on Hugging Face's hub, for its tokenizer and chat "
        "template.",
        path=True,
    )
    dataset: list[str] = setting(
        help="Data to be checked: JSONL or Parquet files, data sets saved on disk, or names on a hub.", path=True
    )
    num_rows: int = setting(3, "Rows that are shown, from the first on; all are checked and counted.", ge=0)
    max_rows: int | None = setting(None, "Rows that are read; null: all.", ge=1)
    max_length: int = setting(1024, "As in training: maximum number of tokens of prompt and completion together.", ge=2)
    max_completion_length: int | None = setting(
        None, "As in training with --lmbda above 0: room that every prompt leaves; null: none.", gt=0
    )
    on_bad_row: Literal["stop", "skip"] = setting(
        "stop",
        "All malformed rows are counted; with stop, at which training would stop, one of them is a failure.",
    )
    overlong: Literal["drop", "truncate_left", "stop"] = setting(
        "drop", "A row over --max_length: drop and count it, cut its prompt from the left, or stop."
    )
    loss_scale: Literal["last_round", "all"] = setting(
        "last_round", "As in training: the turns of the assistant that carry the loss."
    )
    chat_template_kwargs: str | None = kwargs_setting()
    enable_thinking: bool | None = thinking_setting()
    external_plugins: list[str] = plugins_setting()
    prompt_template: str | None = prompt_template_setting()
    teacher_prompt_template: str | None = teacher_prompt_template_setting()
    max_image_tiles: int | None = setting(
        None, "As in training of a vision-language student: most tiles of an image; null: the processor's.", ge=1
    )
    image_url_dir: str | None = setting(
        None, "As in training: directory in which images of URLs are kept; null: such a row is malformed.", path=True
    )
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe messages that are shown.")

    @property
    def template_kwargs(self) -> str:
        """The variables of the chat template, as JSON. Raises ConfigError."""
        return template_kwargs(self.chat_template_kwargs, self.enable_thinking)

    def check(self) -> None:
        """Raise ConfigError for combinations that cannot work."""
        environment.refuse_several_ranks("check")
        assert self.template_kwargs, "raises for what is not a JSON object"
        if not os.path.isdir(self.model) and read_name(self.model, "model") is None:
            raise ConfigError(f"--model {self.model}: there is no such directory; give one in Hugging Face format")


@dataclass(frozen=True)
class CheckTrainConfig(Section):
    """Whether `train` would start with its flags, given beside these, on a number of ranks."""

    world_size: int = setting(1, "Ranks of the run.", ge=1)
    ranks_per_node: int | None = setting(None, "Ranks per node, for --teacher_nodes.", ge=1)
    read_models: bool = setting(True, "Check both models' config.json against the layouts.")
