"""What the tests of faults share: numbers that go wrong at given steps, and real commands on ranks of their own that
can be signalled and killed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.records import StepPlan
from megatron_gkd.signals import Signal, SignalStore
from megatron_gkd.train import loop
from megatron_gkd.train.student import Student
from tests import ranks
from tests.train.runs import train_on_this_rank


@contextlib.contextmanager
def nan_signals(bad_steps: Sequence[int], position: int) -> Iterator[None]:
    """The teacher's signal of one sample is NaN in these steps, counted from 1."""
    distill, gather = loop.distill, SignalStore.gather
    step_now = 0

    def noting(student: Student, teacher: Any, loss: Any, plan: StepPlan, **options: Any) -> Any:
        nonlocal step_now
        step_now = plan.step + 1
        result = distill(student, teacher, loss, plan, **options)
        step_now = 0  # evaluations are spared
        return result

    def spoilt(self: SignalStore, batch: Any) -> Signal:
        signal = gather(self, batch)
        if step_now in bad_steps and position in batch.positions:
            assert signal.hidden is not None
            hidden = signal.hidden.clone()
            hidden[batch.loss_sample.to(hidden.device) == batch.positions.index(position)] = float("nan")
            return Signal(hidden, None, None)
        return signal

    loop.distill, SignalStore.gather = noting, spoilt  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        loop.distill, SignalStore.gather = distill, gather  # type: ignore[method-assign]


def everything(student: Student) -> list[torch.Tensor]:
    """A copy of weights, main weights, moments and step counts of this rank."""
    tensors = [parameter.detach() for chunk in student.chunks for parameter in chunk.parameters()]
    for member in getattr(student.optimizer, "chained_optimizers", [student.optimizer]):
        for group in member.optimizer.param_groups:
            for parameter in group["params"]:
                tensors += [parameter.detach(), *member.optimizer.state[parameter].values()]
    return [tensor.clone() for tensor in tensors]


@contextlib.contextmanager
def recorded_steps() -> Iterator[list[bool]]:
    """Whether each step of this process left everything as it was, bit for bit."""
    train_step, found = Student.train_step, []  # type: ignore[var-annotated]

    def recording(self: Student, *args: Any) -> Any:
        before = everything(self)
        result = train_step(self, *args)
        found.append(all(torch.equal(a, b) for a, b in zip(before, everything(self), strict=True)))
        return result

    Student.train_step = recording  # type: ignore[method-assign]
    try:
        yield found
    finally:
        Student.train_step = train_step  # type: ignore[method-assign]


def train_with_nan(argv: list[str], bad_steps: Sequence[int], position: int) -> tuple[list[bool], str | None]:
    """On a rank: what each step left as it was, and the error that the run ended with."""
    with recorded_steps() as unchanged, nan_signals(bad_steps, position):
        try:
            train_on_this_rank(argv)
        except RuntimeError as error:
            return unchanged, str(error)
        return unchanged, None


# ---- commands on ranks of their own ----------------------------------------------------------------------------------


class Command:
    """`megatron-gkd ARGV` as `world` processes with the environment that torchrun would give them."""

    def __init__(self, argv: list[str], directory: Path, world: int) -> None:
        ranks._configure_forkserver()
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.world = directory, world
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        self.processes = [
            context.Process(target=command_on_rank, args=(argv, rank, world, port, directory)) for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def send(self, rank: int, number: int) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)

    def wait_for(self, path: Path, timeout_s: float = 90) -> None:
        deadline = time.monotonic() + timeout_s
        while not path.exists():
            assert time.monotonic() < deadline, f"{path} did not appear\n{self.output()}"
            assert all(process.is_alive() for process in self.processes), self.output()
            time.sleep(0.02)

    def codes(self, timeout_s: float = 90) -> list[int | None]:
        """Exit codes, when all have ended."""
        deadline = time.monotonic() + timeout_s
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        return codes

    def text(self, rank: int) -> str:
        return (self.directory / f"output{rank}").read_text()

    def output(self) -> str:
        return "\n".join(f"--- rank {rank}\n{self.text(rank)[-3000:]}" for rank in range(self.world))


def command_on_rank(argv: list[str], rank: int, world: int, port: int, directory: Path) -> None:
    """The process of a rank. A step begins when the file `goN` is there; `atN` says that it waits for that."""
    output = os.open(directory / f"output{rank}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    hold_step(directory, rank)
    from megatron_gkd.cli import main

    sys.exit(main(["train", *argv]))


def hold_step(directory: Path, rank: int) -> None:
    """A rank says `at_RANK_N` when it begins its update N, and waits there while the file `hold_N` exists."""
    train_step, number = Student.train_step, 0

    def held(self: Student, *args: Any) -> Any:
        nonlocal number
        number += 1
        (directory / f"at_{rank}_{number}").touch()
        while (directory / f"hold_{number}").exists():
            time.sleep(0.01)
        return train_step(self, *args)

    Student.train_step = held  # type: ignore[method-assign]
