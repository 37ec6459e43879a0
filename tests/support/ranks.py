"""Run a test function on N real gloo ranks, on processes that stay alive between tests.

    def body(scale):                          # module level: it is pickled by reference
        x = torch.ones(1) * scale
        dist.all_reduce(x, group=tp_group(2))
        return x.item()

    def test_sum():
        assert run_ranks(body, 3.0, world=2) == [6.0, 6.0]

What a rank finds when `fn` is called: the test process's environment variables of that moment, WORLD initialised on
gloo with `world` ranks, one thread for torch; and `random`, `numpy` and `torch` are seeded with `seed`, THE SAME ON
EVERY RANK (so that every rank can draw the whole tensor and keep its shard). `tp_group(n)` and `one_rank_group()` give
process groups that are made once per pool.

How it works: one pool of processes per world size, forked from a server that has imported torch, megatron.core and the
package (forkserver.py) before any torch operation ran (forking a process that has run a backward hangs; spawning
costs 15 s). What the server imported is frozen for the garbage collector: a collection after each call would otherwise
walk its half million objects, 0.3 s a rank. Work and results travel through pipes as plain pickles (no shared memory),
so results must be picklable; tensors are copied. Between calls the processes are stopped.

Failure: the rank that failed FIRST is reported with its traceback (its peers usually fail later, with "connection
closed by peer"); the pool is thrown away and the next call starts a new one. After `timeout_s` the report holds the
Python stack of every rank that was still at work, and the pool is killed.

Groups that a call makes are destroyed after it. All else that it leaves stays, since ranks are shared: megatron's
parallel_state, torch default dtype, monkeypatches, cached modules. Undo what you set
(try/finally), or pass `fresh=True` to run in new processes that end with the call (about 0.3 s for two ranks). With
`with_vllm=True` they are new processes that have imported vLLM (tests/support/vllm_zygote.py); importing it themselves
costs each rank 12 seconds of a core.

Not covered: NCCL, several machines, functions defined in a test or lambda, output capture (a rank's prints bypass
pytest).
"""

import atexit
import contextlib
import ctypes
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

from tests.support import forkserver
from tests.support.effort import LIMIT_S

# Groups that something still refers to keep their threads, two each. A pool above this is ended, and the next call
# forks a new one, which takes less than a second.
_MOST_THREADS = 60
_PR_SET_PDEATHSIG = 1
_GC_THRESHOLDS = (20_000, 10, 10)  # python's (700, 10, 10) are a tenth of the time of a step of a tiny model
_GRACE_S = 1.0  # after the first failure, how long to wait for a peer that failed before it
_GLOO_TIMEOUT = timedelta(minutes=30)  # the caller's timeout_s governs; gloo's own must not be shorter


class RankFailureError(AssertionError):
    """A rank raised or died; the message names the first one and holds its traceback."""


def run_ranks(
    fn: Callable[..., Any],
    *args: Any,
    world: int,
    timeout_s: float = LIMIT_S,
    fresh: bool = False,
    with_vllm: bool = False,
    seed: int = 1234,
) -> list[Any]:
    """Call `fn(*args)` on every one of `world` gloo ranks; return each rank's result, in rank order."""
    if fresh or with_vllm:
        pool = _Pool(world, with_vllm=with_vllm)
        try:
            results = pool.run(fn, args, seed, timeout_s)
        except BaseException:
            pool.kill()
            raise
        pool.close()
        return results
    live = _pools.get(world)
    if live is None:
        live = _pools[world] = _Pool(world)
    try:
        results = live.run(fn, args, seed, timeout_s)
    except BaseException:  # also KeyboardInterrupt: ranks in the middle of a call cannot be used again
        del _pools[world]
        live.kill()
        raise
    if live.num_threads() > _MOST_THREADS:
        _pools.pop(world).close()
    else:
        live.stand_still()
    return results


# ---- groups, called inside a rank -----------------------------------------------------------------------------------

_groups: dict[int, dist.ProcessGroup] = {}


def tp_group(size: int) -> dist.ProcessGroup:
    """This rank's group of `size` consecutive ranks; made on first use (then every rank must call this), then
    cached.
    """
    world = dist.get_world_size()
    if world % size != 0:
        raise ValueError(f"tp_group({size}): the world of {world} ranks does not divide into groups of {size}")
    if size not in _groups:
        for start in range(0, world, size):  # every rank takes part in the creation of every group, in the same order
            group = dist.new_group(list(range(start, start + size)))
            if start <= dist.get_rank() < start + size:
                _groups[size] = group
    return _groups[size]


def one_rank_group() -> dist.ProcessGroup:
    """A group with this rank alone: how "no tensor parallelism" is said."""
    return tp_group(1)


# ---- the pool, in the test process ----------------------------------------------------------------------------------


class _Pool:
    """`world` living rank processes; one call at a time."""

    def __init__(self, world: int, *, with_vllm: bool = False) -> None:
        forkserver.configure()
        self.world = world
        self.tmp = tempfile.mkdtemp(prefix="ranks-")
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        context = multiprocessing.get_context("forkserver")
        for rank in range(world):
            here, there = context.Pipe()
            process: Any
            if with_vllm:
                from tests.support.vllm_zygote import ForkedRank

                process = ForkedRank(rank, world, self.tmp, there)
            else:
                process = context.Process(target=rank_main, args=(rank, world, self.tmp, there), name=f"rank{rank}")
                process.start()
            there.close()
            self.connections.append(here)
            self.processes.append(process)
        try:
            self._collect("start of the ranks", LIMIT_S)
        except BaseException:
            self.kill()
            raise

    def run(self, fn: Callable[..., Any], args: tuple[Any, ...], seed: int, timeout_s: float) -> list[Any]:
        self._signal(signal.SIGCONT)
        call = pickle.dumps((fn, args))
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((call, seed, dict(os.environ))))
        return self._collect(getattr(fn, "__qualname__", repr(fn)), timeout_s)

    def _collect(self, what: str, timeout_s: float) -> list[Any]:
        """Wait for one message of every rank."""
        results: dict[int, Any] = {}
        failures: list[tuple[float, int, str]] = []
        deadline = time.monotonic() + timeout_s
        waiting = dict(enumerate(self.connections))
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ready in wait(list(waiting.values()), timeout=left):
                rank = next(r for r, c in waiting.items() if c is ready)
                del waiting[rank]
                try:
                    ok, when, payload = pickle.loads(ready.recv_bytes())  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    self.processes[rank].join(1)
                    ok, when = False, 0.0  # before its peers, which fail because it is gone
                    payload = f"the process ended with exit code {self.processes[rank].exitcode}"
                if ok:
                    results[rank] = payload
                else:
                    failures.append((when, rank, payload))
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            _, rank, text = min(failures)
            raise RankFailureError(f"{what}: rank {rank} of {self.world} failed first:\n{text}")
        if waiting:
            stacks = self._stacks(list(waiting))
            raise TimeoutError(
                f"{what}: ranks {sorted(waiting)} of {self.world} not done after {timeout_s} s\n{stacks}"
            )
        return [results[rank] for rank in range(self.world)]

    def _stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        texts = []
        for rank in ranks:
            path = f"{self.tmp}/stack{rank}"
            if os.path.exists(path):
                with open(path) as file:
                    texts.append(f"--- rank {rank}, most recent call first\n{file.read()}")
        return "\n".join(texts)

    def stand_still(self) -> None:
        """Stop the processes until the next call: gloo's threads wake up a hundred times a second, with or without
        work, and those of idle ranks took a tenth of two cores."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, number)

    def num_threads(self) -> int:
        """Of the rank that has most."""
        return max(len(os.listdir(f"/proc/{process.pid}/task")) for process in self.processes)

    def close(self) -> None:
        """Tell the ranks to end; kill those that do not."""
        self._signal(signal.SIGCONT)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
        for process in self.processes:
            process.join(5)
        self.kill()

    def kill(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()
        for connection in self.connections:
            connection.close()
        shutil.rmtree(self.tmp, ignore_errors=True)


_pools: dict[int, _Pool] = {}


def close_pools() -> None:
    """End every living pool (conftest calls this when the session ends)."""
    while _pools:
        _pools.popitem()[1].close()


atexit.register(close_pools)  # before multiprocessing's own exit hook, which would wait for the ranks


# ---- the rank process -----------------------------------------------------------------------------------------------


def rank_main(rank: int, world: int, tmp: str, connection: Connection) -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))  # ends it also where it stands still
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)
    with open(f"{tmp}/stack{rank}", "w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=False)
        torch.set_num_threads(1)
        start = _attempt(lambda: _init_world(rank, world, tmp))
        connection.send_bytes(start)
        while True:
            try:
                message = connection.recv_bytes()
            except EOFError:
                break
            if not message:
                break
            call, seed, environment = pickle.loads(message)
            os.environ.clear()
            os.environ.update(environment)
            result = _attempt(lambda: _call(call, seed))  # noqa: B023 - called before the next turn
            _destroy_groups_left()
            connection.send_bytes(result)
    if dist.is_initialized():
        dist.destroy_process_group()


def share_gloo_device() -> None:
    """Let all gloo groups of this process have one device: one thread and one listening socket in place of one for each
    group. Such a thread wakes up a hundred times a second, with or without work, and a run has a dozen groups."""
    gloo = dist.ProcessGroupGloo
    devices: dict[int, Any] = {}  # by process: a fork has no such thread

    class OneDevice(gloo):  # type: ignore[misc, valid-type]
        def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
            options = gloo._Options()
            if os.getpid() not in devices:
                interface = os.environ.get("GLOO_SOCKET_IFNAME")  # which torch heeds where it is given no device
                found = gloo.create_device(interface=interface) if interface else gloo.create_default_device()
                devices[os.getpid()] = found
            options._devices, options._threads, options._timeout = [devices[os.getpid()]], 2, timeout
            super().__init__(store, rank, size, options)

    dist.distributed_c10d.ProcessGroupGloo = OneDevice


def _init_world(rank: int, world: int, tmp: str) -> None:
    share_gloo_device()
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp}/rendezvous", rank=rank, world_size=world, timeout=_GLOO_TIMEOUT
    )


def _call(call: bytes, seed: int) -> Any:
    fn, args = pickle.loads(call)
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)
    return fn(*args)


def _destroy_groups_left() -> None:
    """Destroy the groups that the call made: each has threads and sockets, and a rank serves hundreds of calls."""
    kept = {id(dist.group.WORLD), *map(id, _groups.values())}
    made = [group for group in dist.distributed_c10d._world.pg_map if id(group) not in kept]
    for group in made:
        dist.destroy_process_group(group)
    if made:
        gc.collect()  # models refer to their groups in cycles


def _attempt(action: Callable[[], Any]) -> bytes:
    """(ok, when, result or traceback) as a plain pickle: multiprocessing's own would share tensor memory."""
    try:
        return pickle.dumps((True, time.monotonic(), action()))
    except BaseException:  # a SystemExit in a rank is a failure of the test as well
        return pickle.dumps((False, time.monotonic(), traceback.format_exc()))


def end_with_parent() -> None:
    """A rank that waits in a collective must not outlive a killed test process."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
