"""All ranks go on, or all raise the same error: how a checkpoint is saved and loaded by everyone or by nobody.

Communication: every function is collective over WORLD; small objects through the backend of WORLD.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def gathered(value: T) -> list[T]:
    """The values of all ranks, on all ranks, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gathered_first(value: T) -> list[T] | None:
    """The values of all ranks on the first rank; None elsewhere."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def from_first(value: T | None) -> T:
    """The first rank's value, on all ranks."""
    values: list[Any] = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_first(action: Callable[[], T]) -> T:
    """What `action` returns on the first rank, on all ranks; what it raises is raised on all ranks."""
    outcome: tuple[T | None, BaseException | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except Exception as error:
            outcome = (None, error)
    value, failure = from_first(outcome)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def first_problem(mine: str | None) -> str | None:
    """The problem of the lowest rank that has one, on all ranks."""
    return next((f"rank {r}: {p}" for r, p in enumerate(gathered(mine)) if p is not None), None)


def all_true(mine: bool) -> bool:
    """Whether it holds on every rank. One int32 all_reduce."""
    device = "cpu" if dist.get_backend() == "gloo" else torch.cuda.current_device()
    flag = torch.tensor(int(mine), dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
