"""Settings of `megatron-gkd sample`."""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from megatron_gkd.config import environment
from megatron_gkd.config.dtypes import Dtype, DtypeChoice
from megatron_gkd.config.schema import Section, setting
from megatron_gkd.config.template_flags import kwargs_setting, template_kwargs, thinking_setting
from megatron_gkd.errors import ConfigError


@dataclass(frozen=True)
class SampleConfig(Section):
    """Sampling of a data set's prompts from a model, to a file."""

    model: str = setting(
        help="Model to sample from: a Hugging Face model directory, or a name on Hugging Face's hub.", path=True
    )
    result_path: str = setting(help="JSONL file that is written: the prompts with the sampled completions.", path=True)
    dataset: list[str] = setting(
        help="Prompts: JSONL or Parquet files, data sets saved on disk, or names on a hub "
        "(OWNER/NAME[:SUBSET][#ROWS]); completions in them are not used.",
        path=True,
    )
    max_new_tokens: int = setting(512, "Maximum number of tokens sampled per completion.", gt=0)
    num_return_sequences: int = setting(1, "Completions per prompt.", ge=1)
    temperature: float = setting(0.9, "Sampling temperature; 0 takes the most probable token.", ge=0, le=2)
    top_p: float = setting(
        1.0, "Sample from the smallest set of tokens with this probability; 1: from all.", gt=0, le=1
    )
    top_k: int = setting(0, "Sample from this many most probable tokens; 0: from all.", ge=0)
    seed: int = setting(42, "Seed; a completion depends on it, its row and its number alone.", ge=0)
    dtype: DtypeChoice = setting("auto", "Precision of the engine; auto: bf16 on CUDA, fp32 on a CPU.")
    write_batch_size: int = setting(1000, "Write the result every this many prompts.", ge=1)
    truncated: Literal["drop", "keep"] = setting(
        "drop", "Completions cut at --max_new_tokens: drop and count them, or keep them, marked by their finish_reason."
    )
    respelled: Literal["drop", "keep"] = setting(
        "keep",
        "Completions whose text is read back as other tokens of the same text: keep them, marked by exact_tokens, or "
        "drop and count them.",
    )
    on_bad_row: Literal["stop", "skip"] = setting("stop", "Malformed rows: stop with their place, or skip and count.")
    overlong: Literal["drop", "stop"] = setting(
        "drop", "Prompts that leave no room for --max_new_tokens: drop and count them, or stop with their place."
    )
    chat_template_kwargs: str | None = kwargs_setting()
    enable_thinking: bool | None = thinking_setting()
    max_image_tiles: int | None = setting(
        None, "Of a vision-language model: most tiles of an image; null: as its processor says.", ge=1
    )
    image_url_dir: str | None = setting(
        None, "As in training: directory in which images of URLs are kept; null: such a row is malformed.", path=True
    )
    infer_backend: Literal["vllm"] = setting("vllm", "Engine.")
    vllm_mode: Literal["colocate", "server", "subprocess"] = setting(
        "colocate",
        "colocate: vLLM in this process; subprocess: a server that this process starts and ends; server: one that runs "
        "(a plain `vllm serve` will do).",
    )
    vllm_gpu_memory_utilization: float = setting(0.9, "Share of each GPU's memory for vLLM.", gt=0, le=1)
    vllm_tensor_parallel_size: int = setting(1, "Tensor parallel size of vLLM; above 1 in mode subprocess.", ge=1)
    vllm_max_model_len: int | None = setting(
        None, "Longest sequence of vLLM; null: what the longest prompt needs, at most the model's.", gt=1
    )
    vllm_server_host: str | None = setting(None, "Host of the server, HOST or HOST:PORT, in mode server.")
    vllm_server_port: int = setting(8000, "Port of the server.", ge=1, le=65535)
    timeout_minutes: float = setting(240.0, "Time limit, in minutes, of a server for one batch of prompts.", gt=0)
    log_level: Literal["debug", "info", "warning", "error"] = setting("info", "Least severe messages that are shown.")

    @property
    def template_kwargs(self) -> str:
        """The variables of the chat template, as JSON. Raises ConfigError."""
        return template_kwargs(self.chat_template_kwargs, self.enable_thinking)

    def without_effect(self) -> list[str]:
        """Flags that differ from their defaults and have no effect with the given --vllm_mode and --temperature."""
        unused = {
            "colocate": ("vllm_server_port", "timeout_minutes"),
            "subprocess": ("vllm_server_port",),
            "server": ("vllm_gpu_memory_utilization",),
        }[self.vllm_mode]
        if self.temperature == 0:  # the most probable token is taken
            unused += ("top_p", "top_k", "seed")
        defaults = {item.name: item.default for item in fields(self)}
        return [name for name in unused if getattr(self, name) != defaults[name]]

    @property
    def precision(self) -> Dtype:
        """The dtype, after `auto` has been resolved."""
        assert self.dtype != "auto", "resolve it for the device first"
        return self.dtype

    def check(self) -> None:
        """Raise ConfigError for combinations that cannot work."""
        assert self.template_kwargs, "raises for what is not a JSON object"
        several_gpus = "--vllm_mode subprocess with --vllm_tensor_parallel_size for a model that needs several GPUs"
        environment.refuse_several_ranks("sample", f", and give {several_gpus}")
        if self.vllm_mode == "server" and self.vllm_server_host is None:
            raise ConfigError("--vllm_mode server needs --vllm_server_host; give the host of a running server")
        if self.vllm_mode != "server" and self.vllm_server_host is not None:
            raise ConfigError(
                f"--vllm_server_host {self.vllm_server_host} is not used in --vllm_mode {self.vllm_mode}; pass "
                "--vllm_mode server, or leave it out"
            )
        if self.vllm_mode != "subprocess" and self.vllm_tensor_parallel_size > 1:
            raise ConfigError(
                f"--vllm_tensor_parallel_size {self.vllm_tensor_parallel_size} needs --vllm_mode subprocess: sampling "
                "runs in one process, and only there vLLM starts further ones"
            )
