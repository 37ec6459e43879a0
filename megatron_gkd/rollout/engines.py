"""Opening the engines that a configuration asks for, and which rank drives which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from megatron_gkd.config import SamplingConfig
from megatron_gkd.errors import NotBuiltError
from megatron_gkd.rollout.protocol import Engine


@dataclass(frozen=True)
class LocalEngines:
    """The engines that this rank drives.

    Colocated: one, shared with the other ranks of its tensor parallel group; `reports` on the first of them. Servers:
    all of them on rank 0, none elsewhere.
    """

    engines: Mapping[int, Engine]  # index among all engines -> engine
    num_engines: int
    reports: bool  # whether completions of this rank's engines are collected from it


def open_engines(
    sampling: SamplingConfig,
    *,
    model_path: str,
    dtype: Literal["fp32", "bf16", "fp16"],
    max_model_len: int,
    group: dist.ProcessGroup,
) -> LocalEngines:
    """Collective over `group`, all ranks of the run. Raises ConfigError or RolloutError."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    if sampling.vllm_mode == "colocate":
        from megatron_gkd.rollout.colocate import ColocatedEngine

        tensor = sampling.vllm_tensor_parallel_size
        engine = ColocatedEngine(
            model_path,
            dtype=dtype,
            tensor_parallel_size=tensor,
            max_model_len=max_model_len,
            gpu_memory_utilization=sampling.vllm_gpu_memory_utilization,
            sleep_level=sampling.sleep_level,
        )
        return LocalEngines({rank // tensor: engine}, world_size // tensor, reports=rank % tensor == 0)
    raise NotBuiltError(f"--vllm_mode {sampling.vllm_mode}")
