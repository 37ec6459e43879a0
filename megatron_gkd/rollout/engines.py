"""Opens the engines of a configuration, and decides which rank drives which."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

import torch.distributed as dist

from megatron_gkd.config.dtypes import Dtype
from megatron_gkd.config.run import SamplingConfig
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.errors import ConfigError
from megatron_gkd.parallel.together import on_first
from megatron_gkd.rollout.protocol import Engine


@dataclass(frozen=True)
class LocalEngines:
    """The engines that this rank drives.

    Colocated: one, shared with the other ranks of its tensor parallel group; `reports` is true on the first of them.
    Servers: all of them on rank 0, none elsewhere.
    """

    engines: Mapping[int, Engine]  # index among all engines -> engine
    num_engines: int
    reports: bool  # whether completions of this rank's engines are collected from it


def open_engines(
    sampling: SamplingConfig,
    *,
    model_path: str,
    dtype: Dtype,
    max_model_len: int,
    group: dist.ProcessGroup,
    image_options: Mapping[str, Any] = MappingProxyType({}),
    adapter: Mapping[str, Any] | None = None,
) -> LocalEngines:
    """Collective over `group`, all ranks of the run. Raises ConfigError or RolloutError.

    Args:
        image_options: for engines that the run starts and whose model sees images (`engine_image_options`).
        adapter: for a colocated engine that receives adapters only (vllm/colocate.py).
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if sampling.vllm_mode == "colocate":
        from megatron_gkd.rollout.vllm.colocate import ColocatedEngine

        tensor = sampling.vllm_tensor_parallel_size
        engine = ColocatedEngine(
            model_path,
            dtype=dtype,
            tensor_parallel_size=tensor,
            max_model_len=max_model_len,
            gpu_memory_utilization=sampling.vllm_gpu_memory_utilization,
            sleep_level=sampling.sleep_level,
            adapter=adapter,
            engine_options={**image_options, **sampling.engine_options},
        )
        return LocalEngines({rank // tensor: engine}, world_size // tensor, reports=rank % tensor == 0)
    options = {**image_options, **sampling.engine_options}
    return _servers_on_rank_0(
        sampling, options, model_path=model_path, dtype=dtype, max_model_len=max_model_len, group=group
    )


def engine_image_options(images: ImageTokens | None, most: int, *, in_server: bool) -> dict[str, Any]:
    """Options that make vLLM's image processor do what ours does. `most` is the largest number of images in a prompt.

    Args:
        in_server: for a server that the run starts; else for a colocated engine.
    """
    if images is None:
        return {}
    options: dict[str, Any] = {"enable_scale_out": True} if in_server else {"skip_tokenizer_init": False}
    if images.max_tiles is not None:
        options["mm_processor_kwargs"] = {"max_patches": images.max_tiles}
    if images.square is not None:  # else mean and deviation of pixels are buffers, which a dummy load draws at random
        options["mm_device_do_normalize"] = False
    return {"limit_mm_per_prompt": {"image": max(most, 1), "video": 0}, **options}


def server_urls(host: str, port: int) -> list[str]:
    """URLs of `--vllm_server_host`: comma-separated HOST, HOST:PORT or URL. Raises ConfigError."""
    urls = []
    for name in host.split(","):
        if "@" in name:  # not shown: what stands before it is a secret
            raise ConfigError("--vllm_server_host contains a user name or a password; set VLLM_API_KEY instead")
        try:
            parts = urlsplit(name.strip() if "//" in name else f"http://{name.strip()}")
            where, own_port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"--vllm_server_host {host}: {name!r} has a bad port or host ({error})") from error
        if parts.scheme not in ("http", "https") or not where or parts.path.strip("/"):
            raise ConfigError(f"--vllm_server_host {host}: {name!r} is not HOST, HOST:PORT or http(s)://HOST:PORT")
        where = f"[{where}]" if ":" in where else where
        urls.append(f"{parts.scheme}://{where}:{own_port or port}")
    if len(set(urls)) < len(urls):
        raise ConfigError(f"--vllm_server_host {host} names a server twice")
    return urls


def probe_servers(
    sampling: SamplingConfig, *, model_path: str, dtype: Dtype, max_model_len: int, most_s: float
) -> None:
    """Check each server of `--vllm_server_host` without changing it. On one rank.

    Args:
        most_s: how long the other ranks wait for this one; all servers together are retried for less than that, and at
            most for --vllm_server_timeout.

    Raises ConfigError or RolloutError if a server cannot be reached, or has another dtype, model or length than needed.
    """
    from megatron_gkd.rollout.vllm.server import ServerEngine

    assert sampling.vllm_server_host is not None, "RunConfig.validate refuses --vllm_mode server without a host"
    give_up = time.monotonic() + min(sampling.vllm_server_timeout, 0.9 * most_s)
    for url in server_urls(sampling.vllm_server_host, sampling.vllm_server_port):
        left_s = max(give_up - time.monotonic(), 0.0)
        engine = ServerEngine(url, model_path=model_path, dtype=dtype, timeout_s=most_s, connect_s=left_s)
        try:
            _check_lengths([engine], [url], max_model_len)
        finally:
            engine.close()


def _servers_on_rank_0(
    sampling: SamplingConfig,
    options: Mapping[str, Any],
    *,
    model_path: str,
    dtype: Dtype,
    max_model_len: int,
    group: dist.ProcessGroup,
) -> LocalEngines:
    """Rank 0 opens them; an error there is raised on every rank."""
    urls = server_urls(sampling.vllm_server_host, sampling.vllm_server_port) if sampling.vllm_server_host else []
    engines: list[Engine] = []

    def open_all() -> None:
        from megatron_gkd.rollout.vllm.server import ServerEngine, SubprocessEngine

        for url in urls:
            engines.append(ServerEngine(url, model_path=model_path, dtype=dtype))  # noqa: PERF401 - kept on failure
        if sampling.vllm_mode == "subprocess":
            engines.append(
                SubprocessEngine(
                    model_path,
                    dtype=dtype,
                    max_model_len=max_model_len + 1,  # a server takes prompts up to one token less
                    tensor_parallel_size=sampling.vllm_tensor_parallel_size,
                    gpu_memory_utilization=sampling.vllm_gpu_memory_utilization,
                    engine_options=options,
                )
            )
        _check_lengths(engines, urls, max_model_len)

    try:
        on_first(open_all, group)
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return LocalEngines(dict(enumerate(engines)), max(1, len(urls)), reports=bool(engines))


def _check_lengths(engines: Sequence[Engine], urls: Sequence[str], max_model_len: int) -> None:
    for url, engine in zip(urls, engines, strict=False):
        if engine.max_model_len < max_model_len:
            raise ConfigError(
                f"{url} takes {engine.max_model_len} tokens of prompt and completion, and {max_model_len} are needed: "
                "start it with a larger --max-model-len, or give --vllm_max_model_len or a smaller --max_length"
            )
