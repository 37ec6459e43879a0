"""Settings of `megatron-gkd plan`; the flags of `train` go with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_gkd.config.schema import Section, setting


@dataclass(frozen=True)
class PlanConfig(Section):
    """What each rank of a run would hold and send: one step of it, rehearsed without memory and without peers."""

    world_size: int = setting(1, "Ranks that the run is to have.", ge=1)
    ranks_per_node: int | None = setting(
        None, "Ranks of a node, for --teacher_nodes and predicted times; null: there 8.", ge=1
    )
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
    images_per_sample: int = setting(1, "Of a student that sees images: how many are in every prompt.", ge=0)
    image_width: int = setting(640, "Of each of these images, in pixels.", ge=1, le=2**16)
    image_height: int = setting(480, "Likewise.", ge=1, le=2**16)
    rehearse: bool = setting(
        True,
        "Rehearse a rank of each kind; false: the closed formula alone, in no time and without bytes on the links.",
    )
    search: bool = setting(
        False,
        "Look for layouts that fit, in the order of predicted time, instead of planning the one that the flags say.",
    )
    matmul_tflops: float = setting(
        400.0, "For predicted times: rate of matrix products, 10^12 operations a second and GPU.", gt=0
    )
    node_gb_per_s: float = setting(
        350.0, "For predicted times: rate between GPUs of a node, 10^9 bytes a second.", gt=0
    )
    network_gb_per_s: float = setting(
        40.0, "For predicted times: rate between nodes, 10^9 bytes a second and GPU.", gt=0
    )
    lines: int = setting(0, "Lines of code that are named for each kind of memory, those that hold most.", ge=0)
    output: Literal["text", "json"] = setting("text", "What is printed.")
    picture: str | None = setting(None, "Also write memory and phases as a picture: a file that ends with .svg.")

    def lengths(self, max_length: int) -> tuple[int, int]:
        """(prompt, completion) tokens of a sample."""
        prompt = self.prompt_tokens or max(1, max_length // 4)
        return prompt, self.completion_tokens or max(1, max_length - prompt)
