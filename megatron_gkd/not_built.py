"""What the settings name and this version does not have: one table, and the refusal.

Each entry names a flag, says when the flag asks for something that is missing, and what to do instead. All that apply
are raised in one `NotBuiltError`, before any work is done. Building a feature means deleting its entries here.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from megatron_gkd.errors import NotBuiltError
from megatron_gkd.settings import show

if TYPE_CHECKING:
    from megatron_gkd.config import RunConfig

Command = Literal["train", "eval"]
BOTH: tuple[Command, ...] = ("train", "eval")
TRAIN: tuple[Command, ...] = ("train",)


@dataclass(frozen=True)
class NotBuilt:
    """One thing that is missing."""

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


def _above_one(flag: str) -> Callable[[RunConfig], bool]:
    """Applies when a size is set above 1."""
    return lambda cfg: (cfg.get(flag) or 1) > 1


def _is_file(name: str) -> bool:
    return name.endswith((".jsonl", ".parquet")) or os.path.exists(name)


def _names_hub_data(flag: str) -> Callable[[RunConfig], bool]:
    """Applies when a data set is not a file: then it is the name of one on a hub."""
    return lambda cfg: not all(_is_file(name) for name in cfg.get(flag))


def _names_hub_model(flag: str) -> Callable[[RunConfig], bool]:
    """Applies when a model is not a directory: then it is the name of one on a hub."""
    return lambda cfg: cfg.get(flag) is not None and not os.path.isdir(cfg.get(flag))


_DATA = (
    "data sets are read from .jsonl and .parquet files and from directories that save_to_disk wrote; fetching one by "
    "its name is missing: save it first"
)
_MODEL = (
    "there is no such directory, and fetching a model by its name is missing: give a directory in Hugging Face format"
)

NOT_BUILT: tuple[NotBuilt, ...] = (
    NotBuilt("model", _names_hub_model("model"), _MODEL),
    NotBuilt("teacher_model", _names_hub_model("teacher_model"), _MODEL),
    NotBuilt(
        "teacher_context_parallel_size",
        _above_one("teacher_context_parallel_size"),
        "use tensor and pipeline parallelism",
    ),
    NotBuilt(
        "teacher_expert_model_parallel_size",
        _above_one("teacher_expert_model_parallel_size"),
        "use tensor and pipeline parallelism",
    ),
    NotBuilt("context_parallel_size", _above_one("context_parallel_size"), "use tensor and pipeline parallelism"),
    NotBuilt(
        "expert_model_parallel_size", _above_one("expert_model_parallel_size"), "use tensor and pipeline parallelism"
    ),
    NotBuilt("dataset", _names_hub_data("dataset"), _DATA, TRAIN),
    NotBuilt("eval_dataset", _names_hub_data("eval_dataset"), _DATA),
)
