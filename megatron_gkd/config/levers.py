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
