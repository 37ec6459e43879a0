"""One job per run directory, and one run directory for all ranks.

    with locked(run_dir):    collective over WORLD
        ...                  SAVE/.lock.json says which process of which machine runs here, and since when

A second job is refused at its start, with host, process and time of the first. The lock of a dead job is taken over,
with a warning:

    same machine     the process is gone, or another one has its id (start time of the process, boot of the machine)
    another machine  the lock's heartbeat (its modification time, every BEAT_S) does not change for WATCH_S; clocks are
                     not compared. So a job that was moved to another node after a crash starts that much later.

Made for shared file systems: the file is created exclusively (O_EXCL), taken over by a rename and then read back, and
opened anew for each read. A job that finds its lock taken over, because its heartbeat stopped for longer than WATCH_S,
ends at once, so that two never write. To remove a lock by hand, delete the file of a job that is certainly gone.

Then every rank looks for a file that the first one has just written. If `--save` is another directory on another node,
that is an error now instead of at the first checkpoint.

Communication: `locked` is collective over WORLD (parallel/together.py: `on_first_rank`, one all_gather_object).
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch.distributed as dist

from megatron_gkd.errors import ConfigError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.parallel.together import gathered, on_first_rank
from megatron_gkd.train.checkpoint import check_writable

logger = get_logger(__name__)

LOCK: Final = ".lock.json"
BEAT_S = 10.0
WATCH_S = 45.0
SETTLE_S = 1.0  # after a takeover: longer than another start is between its look and its rename
SEEN_S = 30.0  # a shared file system may show a new file that late


class Held(NamedTuple):
    """The content of a lock file."""

    owner: dict[str, Any]  # empty where it cannot be read, as while it is written
    changed_ns: int

    def describe(self) -> str:
        if not self.owner:
            return "a process that has not written its name"
        job = f", job {self.owner['job']}" if self.owner.get("job") else ""
        return f"process {self.owner.get('pid')} on {self.owner.get('host')}{job}, since {self.owner.get('since')}"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the run directory while the block runs. Collective over WORLD.

    Raises:
        ConfigError: another job runs there, or it is not one directory for all ranks.
        CheckpointError: it cannot be written.
    """
    lock = RunLock(run_dir)
    assert dist.group.WORLD is not None
    try:
        token = on_first_rank(lock.take, dist.group.WORLD)
        _check_one_directory(run_dir, token)
        yield
    finally:
        lock.release()


class RunLock:
    """The lock file, on the first rank; the other ranks hold nothing."""

    def __init__(self, run_dir: Path) -> None:
        self._directory, self.path = run_dir, run_dir / LOCK
        self._token: str | None = None
        self._made: list[Path] = []
        self._stop = threading.Event()
        self._beating: threading.Thread | None = None

    def take(self) -> str:
        """Returns the token that identifies this start. Not collective; may take WATCH_S."""
        check_writable(self._directory / "checkpoints")
        missing = [path for path in (self._directory, *self._directory.parents) if not path.exists()]
        self._directory.mkdir(parents=True, exist_ok=True)
        self._made = missing  # deepest first; they go again where the run leaves nothing in them
        owner = describe_process() | {"token": uuid.uuid4().hex}
        while not self._create(owner):
            held = read_lock(self.path)
            if held is None:
                continue  # it has just been given back
            if is_alive(self.path, held):
                raise ConfigError(
                    f"{self._directory} is in use by another job: {held.describe()}. Wait for it, end it, or give "
                    f"another --save; if it is certainly gone, delete {self.path}"
                )
            if self._take_over(held, owner):
                logger.warning("the job that held %s is gone (%s): its lock is taken over", self.path, held.describe())
                break
        self._token = str(owner["token"])
        (self._directory / seen_name(self._token)).touch()
        self._beating = threading.Thread(target=self._beat, name="run lock", daemon=True)
        self._beating.start()
        return self._token

    def release(self) -> None:
        """Release the lock; does nothing if it was never taken."""
        if self._token is not None:
            self._stop.set()
            assert self._beating is not None
            self._beating.join()
            with contextlib.suppress(OSError):
                (self._directory / seen_name(self._token)).unlink(missing_ok=True)
                held = read_lock(self.path)
                if held is not None and held.owner.get("token") == self._token:
                    self.path.unlink()
            self._token = None
        for directory in self._made:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()
        self._made = []

    def _create(self, owner: dict[str, Any]) -> bool:
        try:
            with open(self.path, "x", encoding="utf-8") as file:
                file.write(json.dumps(owner))
        except FileExistsError:
            return False
        return True

    def _take_over(self, dead: Held, owner: dict[str, Any]) -> bool:
        """Whether this start now has the lock of a dead job; if several try, one gets it."""
        mine = self.path.with_name(f"{LOCK}.{owner['token']}")
        mine.write_text(json.dumps(owner), encoding="utf-8")
        if read_lock(self.path) != dead:
            mine.unlink()
            return False
        os.replace(mine, self.path)
        time.sleep(SETTLE_S)
        now = read_lock(self.path)
        return now is not None and now.owner.get("token") == owner["token"]

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                held = read_lock(self.path)
                if held is None and self._token is not None:
                    self._create(describe_process() | {"token": self._token})  # somebody deleted it
                elif held is not None and held.owner.get("token") == self._token:
                    os.utime(self.path)
                elif held is not None and held.owner:
                    end_this_process(f"{self._directory} was taken over by another job: {held.describe()}")
            except OSError as error:  # a file system that is away; the next beat tries again
                logger.warning("%s: no heartbeat: %s", self.path, error)


def end_this_process(why: str) -> None:
    """End at once, from any thread: nothing may be written any more."""
    sys.stderr.write(f"megatron-gkd: error: {why}; this run ends without saving\n")
    sys.stderr.flush()
    os._exit(2)


def read_lock(path: Path) -> Held | None:
    """None where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            text, changed_ns = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(text)
    except ValueError:
        owner = {}
    return Held(owner if isinstance(owner, dict) else {}, changed_ns)


def is_alive(path: Path, held: Held) -> bool:
    """Whether the owner of a lock is running. On another machine: watches for WATCH_S whether the lock changes."""
    if held.owner.get("machine") == _machine():
        return _process_start(int(held.owner.get("pid", 0))) == held.owner.get("process_start")
    give_up = time.monotonic() + WATCH_S
    logger.info("%s: held by %s; looking whether it is alive, up to %g s", path, held.describe(), WATCH_S)
    while time.monotonic() < give_up:
        time.sleep(min(1.0, WATCH_S / 20))
        now = read_lock(path)
        if now != held:
            return now is not None
    return False


def describe_process() -> dict[str, Any]:
    """The owner's entry in a lock."""
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "machine": _machine(),
        "process_start": _process_start(os.getpid()),
    }


def _machine() -> str:
    """Equal where process ids mean the same: host, boot, and PID namespace (containers have their own)."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _process_start(pid: int) -> int | None:
    """In ticks since boot; None if there is no such process, or only a zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])


def seen_name(token: str) -> str:
    """The file that every rank must see. Its name is new for every start, so an older one is never mistaken for it."""
    return f".seen_{token}"


def _check_one_directory(run_dir: Path, token: str) -> None:
    give_up, file = time.monotonic() + SEEN_S, run_dir / seen_name(token)
    while not (seen := file.exists()) and time.monotonic() < give_up:
        time.sleep(0.2)
    everyone = gathered((seen, socket.gethostname(), str(run_dir.absolute())))
    if dist.get_rank() == 0:
        file.unlink(missing_ok=True)
    for rank, (found, host, where) in enumerate(everyone):
        if not found:
            raise ConfigError(
                f"--save {run_dir} is not one directory for all ranks: rank {rank} ({host}) looks in {where}, where "
                f"what rank 0 ({everyone[0][1]}) wrote in {everyone[0][2]} is not found; give a path on a file system "
                "that all nodes share, and an absolute one"
            )
