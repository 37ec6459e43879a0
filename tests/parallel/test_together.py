"""All ranks go on, or all raise: an error on one is an error on all, and what differs is named with both values."""

from __future__ import annotations

import socket

import pytest
import torch.distributed as dist

from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.parallel.together import all_or_none, describe_differences, name_ranks, require_same
from tests.ranks import run_ranks


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
        return error.told_elsewhere
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
