"""A process that forks the ranks of one training run after another, killing one of them where it is told to. It is
forked itself from the server of the test ranks, which has imported everything (preload.py).

    zygote.run({"argv": [...], "world": 4, "directory": D, "kill": [rank, event]})    kill: None to let the run end
    -> {"codes": [...], "events": [...]}

What can be killed at is counted: an event is the beginning or the end of a call that matters for what is on disk or for
the other ranks (EVENTS). So a point is a number, the same in every run of a layout, and as likely inside a save as the
save has a share of the events. The rank sends itself SIGKILL there; the others are killed when it is gone, as a
launcher does. `events` is what each rank has counted, where the run ended by itself.

`directory` takes the rendezvous file, the counts and the output of the ranks. A run that takes longer than LIMIT_S is
killed whole; the process ends with `close`, or when whoever made it is gone.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist

from megatron_gkd.architecture import read_architecture
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.train.checkpoint import files
from megatron_gkd.train.student import Student
from tests.support import forkserver, ranks
from tests.support.effort import LIMIT_S
from tests.support.runs import train_on_this_rank

EVENTS: Final[tuple[tuple[Any, str], ...]] = (
    *((os, name) for name in ("fsync", "rename", "unlink", "mkdir")),
    *((shutil, "rmtree"), (torch, "save"), (files, "hash_file"), (Student, "train_step")),
    *((dist, n) for n in ("all_reduce", "barrier", "all_gather_object", "gather_object", "broadcast_object_list")),
)


class RunZygote:
    """The process, from where it is asked."""

    def __init__(self) -> None:
        forkserver.configure()
        context = multiprocessing.get_context("forkserver")
        self._connection, there = context.Pipe()
        self._process = context.Process(target=serve, args=(there,))
        self._process.start()
        there.close()

    def run(self, request: dict[str, Any]) -> dict[str, Any]:
        self._connection.send(request | {"environment": dict(os.environ)})
        answer: dict[str, Any] = self._connection.recv()
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join(LIMIT_S)


def serve(connection: Connection) -> None:
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        os.environ.update(request["environment"])
        import_what_is_late(request["argv"])
        gc.collect()
        gc.freeze()  # megatron-core collects with every checkpoint: the ranks would walk all that was imported
        connection.send(carry_out(request))


@cache
def _import_for(model: str) -> None:
    read_architecture(model)
    load_tokenizer(model)


def import_what_is_late(argv: list[str]) -> None:
    """What transformers and the command line import when they are first used, before the first fork."""
    _import_for(parse_run_config(argv, command="train").model.model)


def carry_out(request: dict[str, Any]) -> dict[str, Any]:
    directory, world = Path(request["directory"]), request["world"]
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    victim, event = request["kill"] or (None, None)
    children = [
        fork(rank, world, request["argv"], directory, event if rank == victim else None) for rank in range(world)
    ]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + LIMIT_S
    while len(codes) < world:
        for rank, child in enumerate(children):
            if rank not in codes and (ended := os.waitpid(child, os.WNOHANG))[0]:
                codes[rank] = os.waitstatus_to_exitcode(ended[1])
        if any(codes.values()) or time.monotonic() > deadline:
            for rank, child in enumerate(children):
                if rank not in codes:
                    os.kill(child, signal.SIGKILL)
                    codes[rank] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        time.sleep(0.01)
    counted = [directory / f"events{rank}" for rank in range(world)]
    return {
        "codes": [codes[rank] for rank in range(world)],
        "events": [int(path.read_text()) if path.exists() else None for path in counted],
    }


def fork(rank: int, world: int, argv: list[str], directory: Path, kill_at: int | None) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        output = os.open(directory / f"output{rank}", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1)
        os.dup2(output, 2)
        torch.set_num_threads(1)
        ranks.share_gloo_device()
        dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world)
        counter = count_events(kill_at)
        train_on_this_rank(argv)
        (directory / f"events{rank}").write_text(str(counter()))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def count_events(kill_at: int | None) -> Callable[[], int]:
    """Wrap the functions of EVENTS; returns what tells the count."""
    count = 0

    def event() -> None:
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def wrap(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            event()
            result = original(*args, **kwargs)
            event()
            return result

        setattr(owner, name, counted)

    for owner, name in EVENTS:
        wrap(owner, name)
    return lambda: count
