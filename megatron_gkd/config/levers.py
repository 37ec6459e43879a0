"""Megatron's levers under Megatron's names: what a run costs, and not what it computes.

Sections of a run's configuration (run.py), read by model/levers.py and train/student.py. docs/levers.md says of each
what it costs, what it saves and where it is tested. What a model or a machine does not allow is refused there; what
contradicts another flag, here and in validate.py.
"""

# ruff: noqa: RUF009 (setting() is dataclasses.field with metadata, not a default that instances would share)

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_gkd.config.schema import Section, setting


@dataclass(frozen=True)
class RecomputeConfig(Section):
    """Recomputation of the student's activations in the backward pass: less memory for more work, the same numbers."""

    recompute_granularity: Literal["none", "selective", "full"] = setting(
        "none",
        "none: keep all activations; selective: recompute --recompute_modules; full: keep the inputs of whole layers "
        "alone.",
    )
    recompute_method: Literal["uniform", "block"] | None = setting(
        None,
        "Of full. uniform: recompute all layers, in groups of --recompute_num_layers, of which the first input is "
        "kept; block: recompute the first --recompute_num_layers layers of each model chunk. null: uniform.",
    )
    recompute_num_layers: int | None = setting(None, "Of full; see --recompute_method. null: 1.", ge=1)
    recompute_modules: list[Literal["core_attn", "mlp", "layernorm", "moe", "moe_act"]] = setting(
        (), "Of selective: the modules that are recomputed; empty: core_attn."
    )

    def problems(self) -> Iterator[str]:
        """What stands beside a granularity that has no use for it."""
        asked = f"the granularity is {self.recompute_granularity}"
        for flag in ("recompute_method", "recompute_num_layers"):
            if getattr(self, flag) is not None and self.recompute_granularity != "full":
                yield f"--{flag} is for --recompute_granularity full, and {asked}; change one of them"
        if self.recompute_modules and self.recompute_granularity != "selective":
            yield f"--recompute_modules is for --recompute_granularity selective, and {asked}; change one of them"


@dataclass(frozen=True)
class OverlapConfig(Section):
    """Communication of the student's data parallel ranks beside its computation."""

    overlap_grad_reduce: bool = setting(False, "Reduce gradients, bucket by bucket, while the backward pass goes on.")
    overlap_param_gather: bool = setting(
        False,
        "Gather updated weights while the next forward pass goes on; needs --use_distributed_optimizer and "
        "--overlap_grad_reduce.",
    )
    align_param_gather: bool = setting(
        False, "All stages of an interleaved pipeline gather the weights of a model chunk at the same time."
    )
    ddp_bucket_size: int | None = setting(
        None, "Parameters in a bucket; null: 40 million, or one million times the data parallel ranks.", ge=1
    )

    def problems(self, *, sharded: bool) -> Iterator[str]:
        """What needs another flag. `sharded`: --use_distributed_optimizer."""
        if self.overlap_param_gather and not sharded:
            yield "--overlap_param_gather gathers what --use_distributed_optimizer has split; give both, or neither"
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            yield "--overlap_param_gather needs --overlap_grad_reduce, which makes the buckets; give both"
        if self.align_param_gather and not self.overlap_param_gather:
            yield "--align_param_gather needs --overlap_param_gather; give both, or neither"
        if self.ddp_bucket_size is not None and not self.overlap_grad_reduce:
            yield "--ddp_bucket_size needs --overlap_grad_reduce: without it all gradients are one bucket"
