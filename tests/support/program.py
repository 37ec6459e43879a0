"""Commands of the package as processes of their own, without a new interpreter for each: forked from the server of the
test ranks, which has imported everything (preload.py).

    done = run(["eval", "--model", ...])                # one plain process
    done = run(["train", ...], world=2, cwd=tmp_path)   # the environment that torchrun gives two ranks
    done.returncode, done.stdout, done.stderr           # as of subprocess.run; of several ranks, one after the other

A process has its own session, working directory, environment and output, calls `megatron_gkd.cli.main`, and ends with
its exit code. `Program` is the same for tests that send signals or look at a run while it goes on.

Not covered: the start of an interpreter, torchrun and the entry points. One test each runs them for real
(test_end_to_end.py, test_cli.py, test_stopping.py, commands/test_convert.py).
"""

from __future__ import annotations

import atexit
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from tests.support import forkserver, ranks
from tests.support.effort import LIMIT_S

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE_S = 20.0  # what the others have to end by themselves when a rank has failed; a launcher gives them 30 s


def run(
    argv: Sequence[str],
    *,
    world: int | None = None,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    limit_s: float = LIMIT_S,
) -> subprocess.CompletedProcess[str]:
    """Carry out `megatron-gkd ARGV`; the exit code is the first one of a rank that is not zero.

    Raises subprocess.TimeoutExpired, with all ranks killed, after `limit_s`.
    """
    with tempfile.TemporaryDirectory(prefix="program-") as directory:
        program = Program(argv, Path(directory), world=world, cwd=cwd, env=env)
        codes = program.codes(limit_s)
        outputs = ["".join(program.text(rank, stream) for rank in range(program.world)) for stream in ("out", "err")]
        if None in codes:
            raise subprocess.TimeoutExpired(list(argv), limit_s, *outputs)
    return subprocess.CompletedProcess(list(argv), next((code for code in codes if code), 0), *outputs)


class Program:
    """`megatron-gkd ARGV` on `world` processes, or on one that no launcher has started (None).

    `prepare(rank)` is called in each of them first. `directory` takes their output: out0, err0, out1, ...
    """

    def __init__(
        self,
        argv: Sequence[str],
        directory: Path,
        *,
        world: int | None = None,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        prepare: Callable[[int], None] | None = None,
    ) -> None:
        forkserver.configure()
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.world = directory, world or 1
        environment = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""} | dict(env or {})
        if world is not None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            size = str(world)
            environment |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        context = multiprocessing.get_context("forkserver")
        self.processes = []
        for rank in range(self.world):
            of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world is not None else {}
            arguments = (list(argv), rank, directory, environment | of_rank, cwd or Path.cwd(), prepare)
            self.processes.append(context.Process(target=_carry_out, args=arguments))
            self.processes[-1].start()

    def send(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_for(self, path: Path, limit_s: float = LIMIT_S) -> None:
        """Until the file is there. A rank that ends before fails the test."""
        deadline = time.monotonic() + limit_s
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} did not appear\n{self.output()}"
            assert all(process.is_alive() for process in self.processes), self.output()
            time.sleep(0.02)

    def codes(self, limit_s: float = LIMIT_S) -> list[int | None]:
        """Exit codes, when all have ended. What has not ended in time is killed, and its code is None.

        As under a launcher, ranks that are left when one has failed get SIGTERM after some time.
        """
        deadline, failed_at = time.monotonic() + limit_s, None
        while any(process.is_alive() for process in self.processes) and time.monotonic() < deadline:
            if failed_at is None and any(process.exitcode for process in self.processes):
                failed_at = time.monotonic()
            if failed_at is not None and time.monotonic() - failed_at > GRACE_S:
                self._send_to_all(signal.SIGTERM)
                failed_at = float("inf")
            self.processes[0].join(0.05) if self.processes[0].is_alive() else time.sleep(0.02)
        codes = [process.exitcode for process in self.processes]
        self._send_to_all(signal.SIGKILL)
        return codes

    def _send_to_all(self, number: int) -> None:
        for process in self.processes:
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def text(self, rank: int, stream: str = "err") -> str:
        path = self.directory / f"{stream}{rank}"
        return path.read_text() if path.exists() else ""

    def output(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.text(rank)[-3000:]}" for rank in range(self.world))


def _carry_out(
    argv: list[str],
    rank: int,
    directory: Path,
    environment: dict[str, str],
    cwd: Path,
    prepare: Callable[[int], None] | None,
) -> None:
    for descriptor, stream in ((1, "out"), (2, "err")):
        output = os.open(directory / f"{stream}{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, descriptor)
        os.close(output)
    call_the_package(argv, environment, cwd, None if prepare is None else lambda: prepare(rank))


def call_the_package(
    argv: list[str], environment: dict[str, str], cwd: Path, prepare: Callable[[], None] | None = None
) -> None:
    """In a forked process: a session and a parent's life of its own, then what `python -m megatron_gkd ARGV` does."""
    os.setsid()
    threading.Thread(target=ranks.end_with_parent, daemon=True).start()
    gc.freeze()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["megatron-gkd", *argv]
    torch.set_num_threads(1)
    ranks.share_gloo_device()
    if prepare is not None:
        prepare()
    from megatron_gkd.cli import main

    try:
        sys.exit(main(argv))
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()
