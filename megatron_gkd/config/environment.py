"""Numbers that a launcher passes in environment variables. A malformed one raises ConfigError with its name, its value
and what is needed. No torch.

    RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_PORT     whole numbers; empty: not set
    GKD_LAST_WORDS     directory to which each rank writes its last line, for commands/launcher.py
    OMP_NUM_THREADS    a whole number from 1, or OpenMP's list for nested levels (`4,2`), of which the first is used
"""

from __future__ import annotations

import os
import re

from megatron_gkd.errors import ConfigError

LAST_WORDS = "GKD_LAST_WORDS"


def number(name: str, *, least: int = 0, most: int | None = None) -> int | None:
    """The variable as a whole number; None where it is not set or empty."""
    text = os.environ.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"\d{1,9}", text) or int(text) < least or (most is not None and int(text) > most):
        above = f" to {most}" if most is not None else ""
        raise ConfigError(
            f"environment variable {name} is {os.environ[name]!r}; it must be a whole number from {least}{above}: "
            "start with torchrun (launch/), or set it so"
        )
    return int(text)


def refuse_several_ranks(what: str, advice: str = "") -> None:
    """Raise ConfigError if torchrun has started several ranks of a command that is one process."""
    if (number("WORLD_SIZE") or 1) > 1:
        raise ConfigError(f"{what} runs in one process, and torchrun started several; start it without{advice}")


def rank_in_messages() -> int:
    """RANK for messages: 0 where it is not set or malformed (code that needs it raises)."""
    text = os.environ.get("RANK", "").strip()
    return int(text) if re.fullmatch(r"\d{1,9}", text) else 0


def num_threads() -> int:
    """Threads per process, from OMP_NUM_THREADS; 1 where it is not set or empty."""
    text = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not text:
        return 1
    levels = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d{1,6}", level) and int(level) for level in levels):
        raise ConfigError(
            f"environment variable OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS']!r}; it must be a whole number "
            "from 1 (threads per rank), or a list of them: unset it, or set 1"
        )
    return int(levels[0])
