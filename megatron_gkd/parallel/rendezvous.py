"""How the ranks of a run find each other, with errors that say what is missing.

    start = read_start()                            from RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT; checked
    store = meet(start, about="gloo", timeout=...)  returns when every rank has come, or raises on all that came

The first rank (or the launcher's agent) keeps a store at MASTER_ADDR:MASTER_PORT. The first rank opens a meeting under
a new name; every rank writes a record of itself there; the first rank reads all records and gives every rank the same
answer. So only the first rank's work grows with the number of ranks. These faults are found, each with a message of one
line: an address that leads nowhere, a port that is taken, a rank that never comes (by number), one that comes twice,
another WORLD_SIZE, another device.

The name makes restarts work. An agent may keep one store for all attempts of a job, with the records and addresses of
ranks that have died. TORCHELASTIC_RESTART_COUNT does not distinguish attempts: every node counts its own failures, and
a node whose ranks did not fail has counted none. A rank that finds the name of an earlier meeting gets no answer there,
and waits for the next one.

Communication: the store's own; no process group exists yet.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # exported, not by name

from megatron_gkd.config import environment
from megatron_gkd.errors import ConfigError

NEEDED: Final = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LINGER_S: Final = 3.0  # the first rank keeps the store alive until the others have read why the start failed
_SHORTEST_PAUSE_S: Final = 0.01  # between two looks at the store, of which one costs a message
_LONGEST_PAUSE_S: Final = 0.5
_MEETING: Final = "megatron_gkd/meeting"
_WELL: Final = "all have come"
_SHOWN: Final = 8


@dataclass(frozen=True)
class Start:
    """This rank's place in the world, and the address of the first rank."""

    rank: int
    world_size: int
    address: str
    port: int

    @property
    def place(self) -> str:
        return f"MASTER_ADDR {self.address}, MASTER_PORT {self.port}"


def read_start() -> Start | None:
    """Read from the environment; None for a plain start of one process. Raises ConfigError for wrong values."""
    present = [name for name in NEEDED if os.environ.get(name, "").strip()]
    if not present:
        return None
    if len(present) < len(NEEDED):
        raise ConfigError(
            f"torch.distributed needs {', '.join(NEEDED)}; only {', '.join(present)} set: start with torchrun, or "
            "with none of them for one process"
        )
    rank, world_size = environment.number("RANK"), environment.number("WORLD_SIZE", least=1)
    port = environment.number("MASTER_PORT", least=1, most=65535)
    assert rank is not None
    assert world_size is not None
    assert port is not None
    if rank >= world_size:
        raise ConfigError(
            f"RANK is {rank} and WORLD_SIZE is {world_size}: ranks are counted from 0 to {world_size - 1}; start with "
            "torchrun, or give every process a number of its own below WORLD_SIZE"
        )
    return Start(rank, world_size, os.environ["MASTER_ADDR"].strip(), port)


def meet(start: Start, *, about: str, timeout: timedelta) -> Store:
    """Wait for all ranks; returns a store for their process group. Collective over the world that `start` describes.

    Args:
        about: must be the same on every rank: the backend.

    Raises:
        ConfigError: as the module docstring says.
    """
    began = time.monotonic()
    store = _open_store(start, timeout)
    mine = {"host": socket.gethostname(), "world_size": start.world_size, "about": about, "name": uuid.uuid4().hex}
    try:
        if start.rank == 0:
            left = timeout - timedelta(seconds=time.monotonic() - began)
            meeting, verdict = _hold_meeting(store, start, mine, left, timeout)
        else:
            meeting, verdict = _find_meeting(store, start, mine, timeout)
    except (dist.DistError, RuntimeError) as error:
        raise ConfigError(
            f"rank 0 did not come, or ended, while the ranks met ({start.place}; {_short(error)}): its own message "
            "says why. Nothing was begun"
        ) from error
    if verdict != _WELL:
        raise ConfigError(verdict)
    return PrefixStore(f"default_pg_{meeting}", store)  # the store may serve others too, and earlier attempts


def _open_store(start: Start, timeout: timedelta) -> Store:
    minutes = f"{timeout.total_seconds() / 60:g} minutes"
    try:
        # As torch's env:// makes it, but that it does not wait for the others: it cannot say which are missing.
        of_agent = _of_agent()
        store = TCPStore(
            start.address,
            start.port,
            start.world_size,
            is_master=start.rank == 0 and not of_agent,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=not of_agent,
        )
    except (dist.DistError, RuntimeError) as error:
        text = _short(error)
        if "EADDRINUSE" in text or "address already in use" in text.lower():
            raise ConfigError(
                f"port {start.port} of {socket.gethostname()} is taken by another program, so no rank can be met there "
                "(MASTER_PORT, or the port of RDZV_ENDPOINT): give another port, the same on all nodes"
            ) from error
        raise ConfigError(
            f"rank {start.rank} on {socket.gethostname()} could not reach the first rank at {start.address}:"
            f"{start.port}{_unresolved(start.address)} within {minutes} (--distributed_timeout_minutes): nothing was "
            "begun. Is rank 0 started, is MASTER_ADDR its address as seen from here, and MASTER_PORT its port? "
            f"({text})"
        ) from error
    return store


def _of_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _hold_meeting(
    store: Store, start: Start, mine: dict[str, Any], left: timedelta, timeout: timedelta
) -> tuple[str, str]:
    """On the first rank: (name of the meeting, the problem or _WELL); answers every rank."""
    meeting = mine["name"]
    records: Any = PrefixStore(f"megatron_gkd/{meeting}", store)  # Any: torch's own types leave out what it has
    records.append("rank_0", json.dumps(mine) + "\n")
    store.set(_MEETING, meeting)
    keys = [f"rank_{rank}" for rank in range(start.world_size)]
    with contextlib.suppress(dist.DistError, RuntimeError):  # said below, by number
        records.wait(keys, max(left, timedelta(seconds=1)))
    came = {rank: _who_came(records.get(key)) for rank, key in enumerate(keys) if records.check([key])}
    verdict = _twice(came, start) or _missing({r: them[0] for r, them in came.items()}, start, timeout) or _unlike(came)
    if store.get(_MEETING).decode() != meeting:
        verdict = _given_twice(0, start)
    others = [one["name"] for rank, them in came.items() if rank for one in them]
    if others:
        records.multi_set([f"verdict_{name}" for name in others], [verdict or _WELL] * len(others))
    records.set("closed", "")
    if verdict:
        time.sleep(_LINGER_S)
    return meeting, verdict or _WELL


def _who_came(lines: bytes) -> list[Any]:
    """The processes that came as one rank, each once; with an agent, which gives every rank once, the newest."""
    found = {record["name"]: record for record in map(json.loads, lines.decode().splitlines())}
    return list(found.values())[-1:] if _of_agent() else list(found.values())


def _find_meeting(store: Store, start: Start, mine: dict[str, Any], timeout: timedelta) -> tuple[str, str]:
    """On the other ranks: (name of the meeting, the first rank's answer)."""
    # The first rank waits as long for the last one; it may have come later than this one.
    end = time.monotonic() + 2 * timeout.total_seconds() + _LINGER_S
    records: Any = None
    key, meeting, pause = f"verdict_{mine['name']}", "", _SHORTEST_PAUSE_S
    while time.monotonic() < end:
        if store.check([_MEETING]) and (found := store.get(_MEETING).decode()) != meeting:
            meeting = found
            records = PrefixStore(f"megatron_gkd/{meeting}", store)
            records.append(f"rank_{start.rank}", json.dumps(mine) + "\n")
        if meeting and records.check([key]):
            return meeting, records.get(key).decode()
        # A store that no agent keeps is of this attempt, so is the meeting; answers are written before it is closed.
        if meeting and not _of_agent() and records.check(["closed"]) and not records.check([key]):
            return meeting, _given_twice(start.rank, start)
        time.sleep(pause)
        pause = min(1.5 * pause, _LONGEST_PAUSE_S)
    minutes = 2 * timeout.total_seconds() / 60
    raise ConfigError(
        f"rank 0 did not answer rank {start.rank} on {mine['host']} within {minutes:g} minutes "
        f"({start.place}): it never came, or another process had the same RANK before this one. Nothing was begun"
    )


def _given_twice(rank: int, start: Start) -> str:
    return (
        f"RANK {rank} was given to two processes ({start.place}), or another job meets there: give every process a "
        "number of its own, and every job a port of its own"
    )


def _twice(came: dict[int, list[Any]], start: Start) -> str:
    return next((_given_twice(rank, start) for rank, them in came.items() if len(them) > 1), "")


def _missing(came: dict[int, Any], start: Start, timeout: timedelta) -> str:
    missing = [rank for rank in range(start.world_size) if rank not in came]
    if not missing:
        return ""
    hosts = {host: [r for r, it in came.items() if it["host"] == host] for host in {it["host"] for it in came.values()}}
    there = "; ".join(f"{_ranks(ranks)} on {host}" for host, ranks in sorted(hosts.items())[:_SHOWN])
    return (
        f"{len(came)} of {start.world_size} ranks came to {start.place} within "
        f"{timeout.total_seconds() / 60:g} minutes (--distributed_timeout_minutes): {_ranks(missing)} missing. There: "
        f"{there}. Nothing was begun; start the others too (their own messages say why they ended), or correct the "
        "number of ranks"
    )


def _unlike(came: dict[int, list[Any]]) -> str:
    first = came[0][0]
    for rank, (record,) in came.items():
        for key, what in (("world_size", "WORLD_SIZE"), ("about", "the backend (it follows from --device)")):
            if record[key] != first[key]:
                return (
                    f"{what} is {first[key]} on rank 0 ({first['host']}) and {record[key]} on rank {rank} "
                    f"({record['host']}): start all ranks alike"
                )
    return ""


def _ranks(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN])) + (f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _unresolved(address: str) -> str:
    try:
        socket.getaddrinfo(address, None)
    except OSError as error:
        return f" (the name does not lead to an address: {error.strerror or error})"
    return ""


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
