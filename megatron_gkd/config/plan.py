"""Settings of `megatron-gkd plan`; the flags of `train` go with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_gkd.config.schema import Section, setting


@dataclass(frozen=True)
class PlanConfig(Section):
    """What each rank of a run would hold and send: one step, rehearsed without memory and without other ranks."""

    world_size: int = setting(1, "Ranks of the run.", ge=1)
    ranks_per_node: int | None = setting(
        None, "Ranks per node, for --teacher_nodes and predicted times (null: 8 for the times).", ge=1
    )
    gpu_memory_gb: float = setting(80.0, "Memory of a rank's GPU, 10^9 bytes.", gt=0)
    reserved_gb: float = setting(
        4.0, "Part of it for the CUDA context, communicators, workspaces and fragmentation, 10^9 bytes.", ge=0
    )
    prompt_tokens: int | None = setting(
        None, "Prompt of every sample of the batch; null: a quarter of --max_length.", ge=1
    )
    completion_tokens: int | None = setting(
        None, "Completion of every sample; null: what the prompt leaves of --max_length.", ge=1
    )
    images_per_sample: int = setting(1, "Images in every prompt of a vision-language student.", ge=0)
    image_width: int = setting(640, "Width of each image, in pixels.", ge=1, le=2**16)
    image_height: int = setting(480, "Height of each image, in pixels.", ge=1, le=2**16)
    rehearse: bool = setting(
        True,
        "Rehearse a rank of each kind; false: only the closed formula, at once, without the bytes that ranks exchange.",
    )
    search: bool = setting(
        False,
        "Search for layouts that fit, ordered by predicted time, instead of planning the layout of the flags.",
    )
    matmul_tflops: float = setting(
        400.0, "For predicted times: rate of matrix products, 10^12 operations per second per GPU.", gt=0
    )
    node_gb_per_s: float = setting(
        350.0, "For predicted times: rate between the GPUs of a node, 10^9 bytes per second.", gt=0
    )
    network_gb_per_s: float = setting(
        40.0, "For predicted times: rate between nodes, 10^9 bytes per second per GPU.", gt=0
    )
    lines: int = setting(0, "For each kind of memory, name this many lines of code that hold most of it.", ge=0)
    output: Literal["text", "json"] = setting("text", "Format of the output.")
    picture: str | None = setting(None, "Also draw memory and phases to this file, whose name must end with .svg.")

    def lengths(self, max_length: int) -> tuple[int, int]:
        """(prompt, completion) tokens of a sample."""
        prompt = self.prompt_tokens or max(1, max_length // 4)
        return prompt, self.completion_tokens or max(1, max_length - prompt)
