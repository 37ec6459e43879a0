"""All ranks go on, or all raise: for whatever one rank alone may find wrong, while the others would wait for it.

    inputs = all_or_none(lambda: read(path))            done by every rank; an error on one is an error on all
    require_same({"--beta": "0.5"}, "started alike")    what differs is named, with ranks, hosts and values
    path = on_first(lambda: choose())                   done by the first rank, told to the others

Work that takes longer than a collective may last is first_rank.py's.

Communication: every function is collective over WORLD; small objects through the backend of WORLD.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeVar

import torch
import torch.distributed as dist

from megatron_gkd.errors import ConfigError, GKDError

_SHOWN: Final = 4  # differences in one message
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


def all_or_none(action: Callable[[], T]) -> T:
    """What `action` returns on this rank. What it raises on a rank is raised there, and told on all others.

    `action` makes no collectives of its own before it may raise. Communication: one all_gather_object.

    Raises:
        ConfigError: on the ranks that had no error of their own: number, host and text of the first that had.
    """
    value, mine = None, None
    try:
        value = action()
    except Exception as error:  # the others wait for this rank, whatever it is
        mine = error
    told = None if mine is None else (socket.gethostname(), str(mine) if isinstance(mine, GKDError) else repr(mine))
    others = gathered(told)
    speaker = next((rank for rank, problem in enumerate(others) if problem is not None), None)
    if mine is not None:
        same = others[speaker or 0]
        if isinstance(mine, GKDError) and told is not None and same is not None:
            mine.told_elsewhere = speaker != dist.get_rank() and same[1] == told[1]
        raise mine
    if speaker is not None:
        host, problem = others[speaker] or ("", "")
        repeated = ConfigError(f"rank {speaker} ({host}) cannot go on: {problem}")
        repeated.told_elsewhere = True
        raise repeated
    return value  # type: ignore[return-value]


def require_same(facts: Mapping[str, str], how: str) -> None:
    """Raise the same ConfigError on all ranks where they do not hold the same facts.

    Args:
        facts: what it is -> its value, both for people.
        how: of the ranks, "started alike".

    Communication: one all_gather_object of a digest; where these differ one of all facts.
    """
    digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
    if len(set(gathered(digest))) == 1:
        return
    everyone = gathered((socket.gethostname(), dict(facts)))
    differences = describe_differences([host for host, _ in everyone], [found for _, found in everyone])
    raise ConfigError(f"the ranks were not {how}: {differences}")


def describe_differences(hosts: Sequence[str], facts: Sequence[Mapping[str, str]]) -> str:
    """`--beta is 0.5 on rank 0 (node0) and 0.7 on rank 1 (node1); ...`, of facts by rank."""
    names = dict.fromkeys(name for found in facts for name in found)
    lines = []
    for name in names:
        by_value: dict[str, list[int]] = {}
        for rank, found in enumerate(facts):
            by_value.setdefault(found.get(name, "absent"), []).append(rank)
        if len(by_value) > 1:
            values = [f"{value} on {name_ranks(ranks, hosts)}" for value, ranks in by_value.items()]
            shown = values[:_SHOWN] + ([f"{len(values) - _SHOWN} other values elsewhere"] if values[_SHOWN:] else [])
            lines.append(f"{name} is {' and '.join(shown)}")
    return "; ".join(lines[:_SHOWN]) + (f"; and {len(lines) - _SHOWN} more differences" if lines[_SHOWN:] else "")


def name_ranks(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """`rank 3 (node1)`, `ranks 0, 1, 2 (node0)`; `hosts` of all ranks."""
    numbers = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
    names = list(dict.fromkeys(hosts[rank] for rank in ranks))
    where = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {numbers} ({where})"
