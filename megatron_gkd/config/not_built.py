"""The features that flags name and this version does not have: one table, and the error.

Each entry has a flag, the condition under which it asks for something that is missing, and what to do instead. All
entries that apply are raised in one `NotBuiltError`, before any work is done. When a feature is built, its entries are
deleted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_gkd.config.schema import show
from megatron_gkd.errors import NotBuiltError

if TYPE_CHECKING:
    from megatron_gkd.config.run import RunConfig

Command = Literal["train", "eval"]
BOTH: tuple[Command, ...] = ("train", "eval")
TRAIN: tuple[Command, ...] = ("train",)


@dataclass(frozen=True)
class NotBuilt:
    """A missing feature."""

    flag: str
    applies: Callable[[RunConfig], bool]
    advice: str
    commands: tuple[Command, ...] = BOTH


def refuse_not_built(cfg: RunConfig, command: Command = "train") -> None:
    """Raise a NotBuiltError that names every flag that asks for something missing."""
    found = [entry for entry in NOT_BUILT if command in entry.commands and entry.applies(cfg)]
    if found:
        raise NotBuiltError(
            "not built yet: "
            + "; ".join(f"--{entry.flag} {show(cfg.get(entry.flag))} ({entry.advice})" for entry in found)
        )


NOT_BUILT: tuple[NotBuilt, ...] = (
    NotBuilt(
        "cp_comm_type",
        lambda cfg: "a2a+p2p" in cfg.kernels.cp_comm_type,
        "its two levels of groups are not made here; give p2p, all_gather or a2a",
    ),
    NotBuilt(
        "moe_router_load_balancing_type",
        lambda cfg: cfg.training.moe_router_load_balancing_type != "aux_loss",
        "its scale with a loss per token has not been verified; use aux_loss",
        TRAIN,
    ),
    NotBuilt("lora_dropout", lambda cfg: cfg.tuner.lora_dropout > 0, "distillation runs without dropout; give 0"),
    NotBuilt("moe_z_loss_coeff", lambda cfg: cfg.training.moe_z_loss_coeff > 0, "use --moe_aux_loss_coeff", TRAIN),
)
