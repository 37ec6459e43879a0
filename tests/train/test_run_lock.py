"""One job in one run directory: the second is refused with the first one's name, a dead one's lock is taken over, and
all ranks have to see the same directory.

Other machines are locks that name another one. Does not cover: real network file systems.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_gkd.errors import ConfigError, GKDError
from megatron_gkd.train import run_lock
from megatron_gkd.train.run_lock import LOCK, RunLock, describe_process, locked
from tests.support.ranks import run_ranks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WATCH_S", 1.0)
    monkeypatch.setattr(run_lock, "SETTLE_S", 0.2)
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)


def write_lock(run_dir: Path, **changes: object) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / LOCK).write_text(json.dumps(describe_process() | {"token": "other"} | changes))
    return run_dir


def test_the_second_job_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    first = RunLock(tmp_path)
    first.take()
    wanted = (
        rf"is in use by another job: process {os.getpid()} on {socket.gethostname()}, since \d{{4}}-.*delete .*{LOCK}"
    )
    with pytest.raises(ConfigError, match=wanted):
        RunLock(tmp_path).take()
    first.release()
    assert list(tmp_path.iterdir()) == []
    second = RunLock(tmp_path)
    second.take()
    second.release()


def test_a_start_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "new" / "run")
    lock.take()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    """Killed and not yet waited for, it is dead too."""
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    write_lock(tmp_path, pid=child.pid, process_start=run_lock._process_start(child.pid))
    with pytest.raises(ConfigError, match=rf"process {child.pid} on"):
        RunLock(tmp_path).take()
    child.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()
    child.wait()


def test_another_process_with_the_number_of_a_dead_one(tmp_path: Path) -> None:
    write_lock(tmp_path, process_start=1)
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def test_a_job_on_another_machine_lives_while_its_lock_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WATCH_S", 60.0)  # ends with the first change
    write_lock(tmp_path, machine="b", host="node7", pid=5, job="77")
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.1):
            os.utime(tmp_path / LOCK)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match="process 5 on node7, job 77, since"):
            RunLock(tmp_path).take()
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("content", [None, "", "[]", "{"])
def test_a_lock_that_stands_still_on_another_machine_is_taken_over(tmp_path: Path, content: str | None) -> None:
    """Also one that was never written out."""
    write_lock(tmp_path, machine="b")
    if content is not None:
        (tmp_path / LOCK).write_text(content)
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def test_of_several_that_take_over_one_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All find the dead one's lock at the same moment."""
    write_lock(tmp_path, process_start=1)
    locks, is_alive = [RunLock(tmp_path) for _ in range(4)], run_lock.is_alive
    together = threading.Barrier(len(locks))

    def judged(path: Path, held: run_lock.Held) -> bool:
        if held.owner["token"] != "other":
            return is_alive(path, held)
        together.wait(60)
        return False

    def take(lock: RunLock) -> bool:
        try:
            return bool(lock.take())
        except ConfigError:
            return False

    monkeypatch.setattr(run_lock, "is_alive", judged)
    with ThreadPoolExecutor(len(locks)) as threads:
        taken = list(threads.map(take, locks))
    for lock in locks:
        lock.release()
    assert sum(taken) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_job_whose_lock_was_taken_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(run_lock, "end_this_process", lambda why: ended.set())
    lock = RunLock(tmp_path)
    lock.take()
    before = (tmp_path / LOCK).stat().st_mtime_ns
    while (tmp_path / LOCK).stat().st_mtime_ns == before:
        time.sleep(0.01)
    assert not ended.is_set()
    (tmp_path / LOCK).unlink()
    while (held := run_lock.read_lock(tmp_path / LOCK)) is None or not held.owner:
        time.sleep(0.01)  # it is written again, and to its end
    write_lock(tmp_path, token="another")
    assert ended.wait(60)
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text())["token"] == "another"


def enter(saves: list[str], directories: list[str]) -> str:
    run_lock.SEEN_S, before = 0.5, os.getcwd()
    os.chdir(directories[dist.get_rank()])
    try:
        with locked(Path(saves[dist.get_rank()])):
            return "entered"
    except GKDError as error:
        return str(error)
    finally:
        os.chdir(before)
        run_lock.SEEN_S = 30.0


def test_a_directory_that_is_another_on_another_node(tmp_path: Path) -> None:
    nodes = [tmp_path / "node0", tmp_path / "node1"]
    for node in nodes:
        node.mkdir()
    directories, host = [str(node) for node in nodes], socket.gethostname()
    found = run_ranks(enter, ["run", "run"], directories, world=2)
    assert found[0] == found[1]
    assert found[0].startswith(
        f"--save run is not one directory for all ranks: rank 1 ({host}) looks in {nodes[1]}/run"
    )
    assert f"wrote in {nodes[0]}/run" in found[0]
    assert not [path for node in nodes for path in node.iterdir()]
    shared = str(tmp_path / "shared")
    assert run_ranks(enter, [shared, shared], directories, world=2) == ["entered"] * 2


def test_the_second_job_of_several_ranks_is_refused_on_all(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.take()
    found = run_ranks(enter, [str(tmp_path)] * 2, [str(tmp_path)] * 2, world=2)
    lock.release()
    assert found[0] == found[1]
    assert f"in use by another job: process {os.getpid()} on" in found[0]
