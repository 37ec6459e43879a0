"""All ranks go on, or all raise: an error on one is an error on all, and what differs is named with both values.

Work of some ranks: everybody has the result or the error, and waiting may be longer than a collective may last.

Also: no other module of the package sends objects, so an agreement has one home.
"""

from __future__ import annotations

import ast
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gkd.errors import ConfigError, DataError, RolloutError
from megatron_gkd.parallel.together import (
    InThread,
    all_or_none,
    describe_differences,
    first_problem,
    from_first,
    gathered,
    name_ranks,
    on_every_rank,
    on_first,
    on_first_rank,
    on_some_ranks,
    require_same,
)
from tests.support.ranks import run_ranks

PACKAGE = Path(__file__).resolve().parents[2] / "megatron_gkd"
OBJECTS = {"all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list"}
# While an optimizer is made, megatron-core's own all_gather_object is given the student's ranks as its world.
PATCHES_MEGATRON = PACKAGE / "train/student.py"


def test_objects_are_sent_by_one_module() -> None:
    """A rank that raises alone between two of these leaves the others waiting: so they are called where none does."""
    senders = {
        path
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if (isinstance(node, ast.Attribute) and node.attr in OBJECTS)
        or (isinstance(node, ast.ImportFrom) and any(alias.name in OBJECTS for alias in node.names))
    }
    assert senders == {PACKAGE / "parallel/together.py", PATCHES_MEGATRON}


def text_of(action) -> str:  # type: ignore[no-untyped-def]
    try:
        return f"went on with {action()}"
    except (ConfigError, DataError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def failing(kind: type[Exception], on_rank: int) -> str:
    def action() -> int:
        if dist.get_rank() == on_rank:
            raise kind("row 3 is bad")
        return dist.get_rank()

    return text_of(lambda: all_or_none(action))


def test_an_error_on_one_rank_is_an_error_on_all() -> None:
    host = socket.gethostname()
    wanted = ["ConfigError: rank 1 (" + host + ") cannot go on: row 3 is bad", "DataError: row 3 is bad"]
    assert run_ranks(failing, DataError, 1, world=2) == wanted
    # Also one of the program's own, whose rank alone has the traceback.
    assert "rank 1 (" in run_ranks(failing, KeyError, 1, world=2)[0]
    assert run_ranks(failing, DataError, 9, world=2) == ["went on with 0", "went on with 1"]


def who_says_it(on_ranks: list[int]) -> bool:
    """Whether this rank's error is said by another one as well."""

    def action() -> None:
        if dist.get_rank() in on_ranks:
            raise DataError("row 3 is bad")

    try:
        all_or_none(action)
    except (ConfigError, DataError) as error:
        return error.reported_elsewhere
    raise AssertionError("nobody failed")


def test_of_ranks_with_the_same_error_the_lowest_says_it() -> None:
    assert run_ranks(who_says_it, [0, 1], world=2) == [False, True]
    assert run_ranks(who_says_it, [1], world=2) == [True, False]


def same(facts_by_rank: list[dict[str, str]]) -> str:
    return text_of(lambda: require_same(facts_by_rank[dist.get_rank()], "started alike"))


def test_facts_that_differ_are_told_alike_on_all_ranks() -> None:
    alike = {"--lr": "1", "--beta": "0.5"}
    assert run_ranks(same, [alike, dict(reversed(alike.items()))], world=2) == ["went on with None"] * 2
    first, second = run_ranks(same, [alike, alike | {"--beta": "0.7"}], world=2)
    host = socket.gethostname()
    wanted = f"--beta is 0.5 on rank 0 ({host}) and 0.7 on rank 1 ({host})"
    assert first == second == f"ConfigError: the ranks were not started alike: {wanted}"


def test_differences_by_rank_and_host() -> None:
    hosts = ["a", "a", "b", "b"]
    facts = [{"x": "1", "y": "2"}, {"x": "1", "y": "2"}, {"x": "5", "y": "2"}, {"x": "1"}]
    wanted = (
        "x is 1 on ranks 0, 1, 3 (a, b) and 5 on rank 2 (b); y is 2 on ranks 0, 1, 2 (a, b) and absent on rank 3 (b)"
    )
    assert describe_differences(hosts, facts) == wanted


def test_many_differences_stay_one_line() -> None:
    facts = [{f"f{i}": str(rank) for i in range(9)} for rank in range(9)]
    text = describe_differences(["h"] * 9, facts)
    assert text.endswith("; and 5 more differences")
    assert "5 other values elsewhere" in text


@pytest.mark.parametrize(
    ("ranks", "wanted"),
    [
        ([3], "rank 3 (h3)"),
        ([0, 1], "ranks 0, 1 (h0, h1)"),
        (list(range(10)), "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"),
    ],
)
def test_names_of_ranks(ranks: list[int], wanted: str) -> None:
    assert name_ranks(ranks, [f"h{rank}" for rank in range(10)]).startswith(wanted)


def of_a_part() -> list[Any]:
    """Ranks 1 and 2 of three among themselves: what they hold, what the first of them says, and whose problem it is."""
    part, rank = dist.new_group([1, 2]), dist.get_rank()
    if rank == 0:
        return []
    problem = first_problem(f"bad {rank}" if rank == 2 else None, part)
    return [gathered(rank, part), from_first(rank, part), on_first(lambda: rank * 10, part), problem]


def test_a_group_agrees_by_itself() -> None:
    assert run_ranks(of_a_part, world=3) == [[], *[[[1, 2], 1, 10, "rank 1: bad 2"]] * 2]


def told_as_another() -> str:
    def fail() -> None:
        if dist.get_rank() == 1:
            raise DataError("row 3 is bad")

    try:
        all_or_none(fail, elsewhere=RolloutError)
    except (DataError, RolloutError) as error:
        return f"{type(error).__name__}: {error} {error.reported_elsewhere}"
    return "went on"


def test_the_others_may_raise_an_error_of_their_own_kind() -> None:
    assert run_ranks(told_as_another, world=2) == [
        "RolloutError: row 3 is bad True",
        "DataError: row 3 is bad False",
    ]


def kept() -> bool:
    mine = object()  # cannot be sent
    return on_every_rank(lambda: mine, dist.group.WORLD) is mine


def test_what_every_rank_makes_it_keeps() -> None:
    assert run_ranks(kept, world=2) == [True, True]


# ---- slow work -------------------------------------------------------------------------------------------------------


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
