"""Settings of `megatron-gkd plan`; the flags of `train` go with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_gkd.config.schema import Section, setting


@dataclass(frozen=True)
class PlanConfig(Section):
    """What each rank of a run would hold and send: one step of it, rehearsed without memory and without peers."""

    world_size: int = setting(1, "Ranks that the run is to have.", ge=1)
    ranks_per_node: int | None = setting(None, "Ranks of a node, for --teacher_nodes.", ge=1)
    gpu_memory_gb: float = setting(80.0, "Memory of a rank's GPU, 10^9 bytes.", gt=0)
    reserved_gb: float = setting(
        4.0, "What is left of it for the CUDA context, communicators, workspaces and fragmentation, 10^9 bytes.", ge=0
    )
    prompt_tokens: int | None = setting(
        None, "Prompt of every sample of the batch; null: a quarter of --max_length.", ge=1
    )
    completion_tokens: int | None = setting(
        None, "Completion of every sample; null: what the prompt leaves of --max_length.", ge=1
    )
    lines: int = setting(0, "Lines of code that are named for each kind of memory, those that hold most.", ge=0)
    output: Literal["text", "json"] = setting("text", "What is printed.")

    def lengths(self, max_length: int) -> tuple[int, int]:
        """(prompt, completion) tokens of a sample."""
        prompt = self.prompt_tokens or max(1, max_length // 4)
        return prompt, self.completion_tokens or max(1, max_length - prompt)
