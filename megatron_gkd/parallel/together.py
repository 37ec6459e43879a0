"""All ranks continue, or all raise: for errors that one rank alone may find, and work that one rank does for all.

    inputs = all_or_none(lambda: read(path))            on every rank; an error on one is an error on all
    require_same({"--beta": "0.5"}, "started alike")    raises with the differences, their ranks, hosts and values
    path = on_first(lambda: choose())                   on the first rank; the result is sent to the others

and for work that may take longer than the time limit of a collective (`--distributed_timeout_minutes`):

    completions = on_first_rank(work, group)            on the first rank; every rank gets the result
    results = on_some_ranks(work, group)                work is None on ranks that only wait; the results by rank
    rows = on_every_rank(work, group)                   on every rank, which keeps its own result

There the work runs in a thread, and every `every_s` seconds its rank signals in a collective that it is still working.
The error of the lowest rank that failed is raised on all ranks, in its class if that is one of the package's (otherwise
RolloutError on the ranks that wait for the first one, RuntimeError for several).

Small objects, of any type that can be pickled, are sent here and nowhere else in the package. Work makes no collectives
before it may raise.

Communication: every function is collective over its group ("world": all ranks), through the group's backend.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeVar

import torch
import torch.distributed as dist

from megatron_gkd import errors
from megatron_gkd.errors import ConfigError, GKDError, RolloutError
from megatron_gkd.parallel.collectives import require_group
from megatron_gkd.platform import world_timeout

EVERY_S: Final = 10.0
_SHOWN: Final = 4  # differences in one message
Group = dist.ProcessGroup | Literal["world"]
T = TypeVar("T")


# ---- objects ---------------------------------------------------------------------------------------------------------


def gathered(value: T, group: Group = "world") -> list[T]:
    """The values of all ranks of the group, on all of them, in rank order. One all_gather_object."""
    ranks = _ranks(group)
    values: list[Any] = [None] * ranks.size()
    dist.all_gather_object(values, value, group=ranks)
    return values


def gathered_first(value: T) -> list[T] | None:
    """The values of all ranks on the first rank; None elsewhere. One gather_object."""
    values: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values)
    return values


def from_first(value: T | None, group: Group = "world") -> T:
    """The first rank's value, on all ranks. One broadcast_object_list."""
    values: list[Any] = [value]
    ranks = _ranks(group)
    dist.broadcast_object_list(values, src=dist.get_global_rank(ranks, 0), group=ranks)
    return values[0]


def _ranks(group: Group) -> dist.ProcessGroup:
    return require_group(dist.group.WORLD if isinstance(group, str) else group, "group")


# ---- agreement -------------------------------------------------------------------------------------------------------


def on_first(action: Callable[[], T], group: Group = "world") -> T:
    """The result of `action` on the first rank, on all ranks; an error is raised on all ranks."""
    outcome: tuple[T | None, BaseException | None] = (None, None)
    if _ranks(group).rank() == 0:
        try:
            outcome = (action(), None)
        except Exception as error:
            outcome = (None, error)
    value, failure = from_first(outcome, group)
    if failure is not None:
        raise failure
    return value  # type: ignore[return-value]


def first_problem(mine: str | None, group: Group = "world") -> str | None:
    """The problem of the lowest rank that has one, on all ranks."""
    return next((f"rank {r}: {p}" for r, p in enumerate(gathered(mine, group)) if p is not None), None)


def all_true(mine: bool) -> bool:
    """Whether the condition holds on every rank. One int32 all_reduce."""
    device = "cpu" if dist.get_backend() == "gloo" else torch.cuda.current_device()
    flag = torch.tensor(int(mine), dtype=torch.int32, device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


def all_or_none(
    action: Callable[[], T], group: Group = "world", *, elsewhere: Callable[[str], GKDError] | None = None
) -> T:
    """What `action` returns on this rank. What it raises on a rank is raised there, and told on all others.

    Args:
        elsewhere: makes the others' error, of the text alone; None: see below. Communication: one all_gather_object.

    Raises:
        ConfigError: on the ranks that had no error of their own: number, host and text of the first that had.
    """
    value, mine = None, None
    try:
        value = action()
    except Exception as error:  # the others wait for this rank, whatever it is
        mine = error
    told = None if mine is None else (socket.gethostname(), str(mine) if isinstance(mine, GKDError) else repr(mine))
    others = gathered(told, group)
    speaker = next((rank for rank, problem in enumerate(others) if problem is not None), None)
    if mine is not None:
        same = others[speaker or 0]
        if isinstance(mine, GKDError) and told is not None and same is not None:
            mine.reported_elsewhere = speaker != _ranks(group).rank() and same[1] == told[1]
        raise mine
    if speaker is not None:
        host, problem = others[speaker] or ("", "")
        where = f"rank {speaker} ({host}) cannot go on: "
        repeated = ConfigError(where + problem) if elsewhere is None else elsewhere(problem)
        repeated.reported_elsewhere = True
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


# ---- slow work -------------------------------------------------------------------------------------------------------


def on_first_rank(work: Callable[[], T], group: dist.ProcessGroup, *, every_s: float = EVERY_S) -> T:
    """`work` is called on the first rank alone; every rank returns what it returned.

    Args:
        every_s: seconds between two signs of life, at most a quarter of a collective's time limit.

    Communication: broadcast_object_list, one every `every_s` seconds, and one at the end, which carries the result.
    """
    at_work = InThread(work, "work of the first rank") if _ranks(group).rank() == 0 else None
    done = False
    while not done:
        done, failure, value = from_first(None if at_work is None else at_work.news(every_s), group)
    if failure is not None:
        raise _repeated(failure, at_work, RolloutError)
    return value


def on_some_ranks(
    work: Callable[[], T] | None, group: dist.ProcessGroup, *, every_s: float = EVERY_S
) -> list[T | None]:
    """The results of all ranks, in rank order, None for those without work.

    Args:
        every_s: as of `on_first_rank`.

    Communication: all_gather_object, likewise.
    """
    at_work = None if work is None else InThread(work, "work of this rank")
    while True:
        news = gathered((True, None, None) if at_work is None else at_work.news(every_s), group)
        for rank, (_, failure, _) in enumerate(news):
            if failure is not None:
                raise _repeated(failure, at_work if rank == _ranks(group).rank() else None, RuntimeError)
        if all(done for done, _, _ in news):
            return [value for _, _, value in news]


def on_every_rank(work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """What `work` returns on this rank, which need not be pickled; all ranks return, or all raise."""
    kept: list[T] = []
    on_some_ranks(lambda: kept.append(work()), group)
    return kept[0]


def _repeated(failure: tuple[str, str], at_work: InThread | None, other: type[Exception]) -> BaseException:
    """The error itself where it was raised; elsewhere one of its class and text, `other` where that is not ours."""
    if at_work is not None and at_work.error is not None:
        return at_work.error
    name, text = failure
    made: BaseException = getattr(errors, name, other)(text)
    return made


class InThread:
    """A call that runs in a thread of its own; `value` and `error` hold once `done`."""

    def __init__(self, work: Callable[[], Any], name: str) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.value = work()
            except BaseException as error:  # handed to whoever waits
                self.error = error

        self._thread = threading.Thread(target=run, name=name, daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        self._thread.join(timeout_s)

    def result(self) -> Any:
        """Wait; return what the call returned, or raise what it raised."""
        self.wait()
        if self.error is not None:
            raise self.error
        return self.value

    def news(self, every_s: float) -> tuple[bool, tuple[str, str] | None, Any]:
        """Wait a while: whether it is done, (class, text) of its error, and its value. The class is "" for an error
        that is not one of the package's."""
        self.wait(min(every_s, world_timeout().total_seconds() / 4))
        if not self.done:
            return False, None, None
        if self.error is None:
            return True, None, self.value
        name = type(self.error).__name__ if isinstance(self.error, GKDError) else ""
        return True, (name, str(self.error) or repr(self.error)), None
