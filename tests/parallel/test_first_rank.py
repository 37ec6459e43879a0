"""Work on the first rank: everybody has the result or the error, and waiting is longer than a collective may last."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gkd.errors import ConfigError, DataError, RolloutError
from megatron_gkd.parallel.first_rank import InThread, on_first_rank, on_some_ranks
from tests.ranks import run_ranks


def results() -> tuple[list[Any], list[int]]:
    """On all ranks, and on the ranks 1 and 2 alone, whose first is rank 1."""
    calls: list[int] = []

    def work() -> Any:
        calls.append(dist.get_rank())
        return {"from": dist.get_rank()}

    world = dist.group.WORLD
    assert world is not None
    found = [on_first_rank(work, world)]
    part = dist.new_group([1, 2])
    if dist.get_rank() > 0:
        found.append(on_first_rank(work, part))
    return found, calls


def test_every_rank_has_what_the_first_found() -> None:
    first, second, third = run_ranks(results, world=3)
    assert first == ([{"from": 0}], [0])
    assert second == ([{"from": 0}, {"from": 1}], [1])
    assert third == ([{"from": 0}, {"from": 1}], [])


def failures() -> list[tuple[str, str]]:
    def fail(error: Exception) -> Any:
        raise error

    world, found = dist.group.WORLD, []
    assert world is not None
    for raised in (DataError("bad row 7"), OSError(28, "disk full"), ValueError()):
        try:
            on_first_rank(lambda raised=raised: fail(raised), world)  # type: ignore[misc]
        except Exception as error:
            found.append((type(error).__name__, str(error)))
    assert on_first_rank(lambda: 5, world) == 5, "the group goes on"
    return found


def test_every_rank_raises_the_same() -> None:
    first, second = run_ranks(failures, world=2)
    assert first == [("DataError", "bad row 7"), ("OSError", "[Errno 28] disk full"), ("ValueError", "")]
    others = [(RolloutError.__name__, text) for text in ("[Errno 28] disk full", "ValueError()")]
    assert second == [("DataError", "bad row 7"), *others]


def longer_than_a_collective() -> str:
    group = dist.new_group(timeout=timedelta(seconds=1))
    return on_first_rank(lambda: time.sleep(3) or "done", group, every_s=0.2)


def test_the_others_wait_longer_than_a_collective_may_last() -> None:
    assert run_ranks(longer_than_a_collective, world=2, fresh=True) == ["done", "done"]


def test_a_group_is_required() -> None:
    with pytest.raises(ConfigError, match="group=None was given"):
        on_first_rank(lambda: 1, None)  # type: ignore[arg-type]


def test_a_call_in_a_thread() -> None:
    call = InThread(lambda: time.sleep(0.2) or 7, "test")
    assert not call.done
    assert call.result() == 7
    assert call.done
    failing = InThread(lambda: [][1], "test")
    with pytest.raises(IndexError):
        failing.result()


def some() -> tuple[Any, Any, Any]:
    """Ranks 0 and 2 of three at work: all at once, with an error of the package, and with another one."""
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None

    def fail(error: Exception) -> Any:
        raise error

    results = on_some_ranks(None if rank == 1 else lambda: rank * 10, group)
    errors = []
    for raised in (DataError("bad row 7"), OSError(28, "disk full")):
        try:
            on_some_ranks(None if rank != 2 else lambda raised=raised: fail(raised), group)  # type: ignore[misc]
        except Exception as error:
            errors.append((type(error).__name__, str(error)))
    long = on_some_ranks(None if rank == 0 else lambda: time.sleep(1.5 * rank) or rank, group, every_s=0.2)
    return results, errors, long


def test_some_ranks_work_and_all_have_the_results_or_the_error() -> None:
    for rank, (results, errors, long) in enumerate(run_ranks(some, world=3)):
        assert results == [0, None, 20]
        assert errors == [
            ("DataError", "bad row 7"),
            ("OSError" if rank == 2 else "RuntimeError", "[Errno 28] disk full"),
        ]
        assert long == [None, 1, 2]
