"""Starts that fail say what failed, in one line: variables, addresses, ports, ranks that never come or come twice.

Ranks are threads here, each with a store of its own: nothing but the store is used before a process group exists.
Does not cover: what gloo and NCCL say when ranks have met and cannot connect to each other.
"""

from __future__ import annotations

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # exported, not by name

from megatron_gkd.errors import ConfigError
from megatron_gkd.parallel import rendezvous
from megatron_gkd.parallel.rendezvous import NEEDED, Start, meet, read_start

SHORT, LONG = timedelta(seconds=1), timedelta(seconds=60)


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> int:
    for name in (*NEEDED, "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"):
        monkeypatch.delenv(name, raising=False)
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        found = listening.getsockname()[1]
    monkeypatch.setattr(rendezvous, "_LINGER_S", 1.0)
    return found


def outcome(start: Start, timeout: timedelta = LONG, about: str = "gloo") -> str:
    """The error, or "met"; a store is kept, as the process group keeps it, until all ranks have an answer."""
    try:
        _kept.append(meet(start, about=about, timeout=timeout))
    except ConfigError as error:
        return str(error)
    return "met"


_kept: list[Any] = []


def outcomes(*calls: tuple[Any, ...]) -> list[str]:
    with ThreadPoolExecutor(len(calls)) as threads:
        found = list(threads.map(lambda call: outcome(*call), calls))
    _kept.clear()
    assert not any("\n" in text for text in found)
    return found


def start(rank: int, world_size: int, port: int) -> Start:
    return Start(rank, world_size, "127.0.0.1", port)


def test_ranks_that_all_come_meet(port: int) -> None:
    assert outcomes(*((start(rank, 3, port),) for rank in range(3))) == ["met"] * 3


def test_a_rank_that_never_comes_is_named_on_every_other(port: int) -> None:
    found = outcomes((start(0, 4, port), SHORT), (start(1, 4, port), SHORT))
    host = socket.gethostname()
    for text in found:
        assert text.startswith(f"2 of 4 ranks came to MASTER_ADDR 127.0.0.1, MASTER_PORT {port} within")
        assert f"ranks 2, 3 missing. There: ranks 0, 1 on {host}. Nothing was begun" in text


def test_a_first_rank_that_never_comes(port: int) -> None:
    text = outcome(start(1, 2, port), SHORT)
    assert f"rank 1 on {socket.gethostname()} could not reach the first rank at 127.0.0.1:{port} within" in text
    assert "nothing was begun" in text


def test_a_name_that_leads_nowhere(port: int) -> None:
    text = outcome(Start(1, 2, "no-such-host.invalid", port), SHORT)
    assert "at no-such-host.invalid:" in text
    assert "the name does not lead to an address" in text


def test_a_port_that_is_taken(port: int) -> None:
    with socket.socket(socket.AF_INET6) as other:
        other.bind(("::", port))
        other.listen()
        text = outcome(start(0, 2, port), SHORT)
    assert text.startswith(f"port {port} of {socket.gethostname()} is taken by another program")


def test_another_world_size_is_told_with_both(port: int) -> None:
    found = outcomes((start(0, 2, port),), (start(1, 3, port),))
    host = socket.gethostname()
    wanted = f"WORLD_SIZE is 2 on rank 0 ({host}) and 3 on rank 1 ({host}): start all ranks alike"
    assert found == [wanted, wanted]


def test_another_backend_is_told_with_both(port: int) -> None:
    found = outcomes((start(0, 2, port), LONG, "nccl"), (start(1, 2, port), LONG, "gloo"))
    assert found[0] == found[1]
    assert "the backend (it follows from --device) is nccl on rank 0" in found[0]
    assert "and gloo on rank 1" in found[0]


def test_a_rank_that_is_given_twice(port: int) -> None:
    """Found before the last rank has come; one that comes later is told so, and the others train."""
    twice = outcomes((start(0, 3, port), SHORT), (start(1, 3, port),), (start(1, 3, port),))
    assert [text.split(" (")[0] for text in twice] == ["RANK 1 was given to two processes"] * 3


def test_an_answer_that_comes_with_the_end_of_the_meeting_counts(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rank answers and closes between two looks of another one."""
    closed_first = iter([False, True])

    class Late(PrefixStore):
        def check(self, keys: list[str]) -> bool:
            if keys[0].startswith("verdict") and not next(closed_first, True):
                while not super().check(["closed"]):
                    time.sleep(0.01)
                return False
            return bool(super().check(keys))

    monkeypatch.setattr(rendezvous, "PrefixStore", Late)
    assert outcomes((start(0, 2, port),), (start(1, 2, port),)) == ["met", "met"]


def test_a_second_one_that_comes_later(port: int) -> None:
    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(lambda rank: outcome(start(rank, 2, port)), range(2))) == ["met"] * 2
        late = outcome(start(1, 2, port))
    _kept.clear()
    assert late.startswith("RANK 1 was given to two processes")


@pytest.mark.parametrize("died", [False, True], ids=["after_they_met", "while_they_met"])
def test_an_attempt_does_not_see_what_the_last_one_left(port: int, monkeypatch: pytest.MonkeyPatch, died: bool) -> None:
    """An agent's store lives through all attempts. The last rank comes first, and finds the old meeting."""
    agent = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=LONG)
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def met(rank: int) -> Store:
        return meet(start(rank, 2, port), about="gloo", timeout=LONG)

    with ThreadPoolExecutor(2) as threads:
        if died:
            assert outcome(start(0, 2, port), SHORT).startswith("1 of 2 ranks came")
        else:
            of_first, _ = threads.map(met, range(2))
            of_first.set("address", "of the dead")
        old = PrefixStore(f"megatron_gkd/{agent.get('megatron_gkd/meeting').decode()}", agent)
        last = threads.submit(met, 1)
        while not old.check(["rank_1"]) or old.get("rank_1").count(b"\n") < 2 - died:
            time.sleep(0.01)
        stores = [met(0), last.result()]
    assert not stores[0].check(["address"])
    stores[0].set("address", "of the living")
    assert stores[1].get("address") == b"of the living"


WHOLE = dict(RANK="1", WORLD_SIZE="2", MASTER_ADDR="node0", MASTER_PORT="29500")


def read(monkeypatch: pytest.MonkeyPatch, **changed: str) -> Start | None:
    for name in NEEDED:
        monkeypatch.delenv(name, raising=False)
    for name, value in changed.items():
        monkeypatch.setenv(name, value)
    return read_start()


def test_what_the_launcher_says(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, **WHOLE) == Start(1, 2, "node0", 29500)
    assert read(monkeypatch) is None
    assert read(monkeypatch, **dict.fromkeys(WHOLE, "")) is None


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (dict(RANK="2"), r"RANK is 2 and WORLD_SIZE is 2: ranks are counted from 0 to 1"),
        (dict(RANK="a"), r"RANK is 'a'; it must be a whole number from 0"),
        (dict(RANK="-1"), r"RANK is '-1'"),
        (dict(WORLD_SIZE="0"), r"WORLD_SIZE is '0'; it must be a whole number from 1"),
        (dict(MASTER_PORT="tcp://10.0.0.1:80"), r"MASTER_PORT is 'tcp://10.0.0.1:80'; .* from 1 to 65535"),
        (dict(MASTER_PORT="70000"), r"MASTER_PORT is '70000'; .* from 1 to 65535"),
        (dict(MASTER_ADDR=""), r"only RANK, WORLD_SIZE, MASTER_PORT set"),
    ],
)
def test_what_the_launcher_cannot_say(monkeypatch: pytest.MonkeyPatch, changed: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(monkeypatch, **(WHOLE | changed))
