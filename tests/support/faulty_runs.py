"""What the tests of faults share: numbers that go wrong at given steps, and steps that wait for a test."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_gkd.records import StepPlan
from megatron_gkd.teacher.signals import HiddenSignal, Signal, SignalStore
from megatron_gkd.train import loop
from megatron_gkd.train.student import Student
from tests.support.runs import train_on_this_rank


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
            assert isinstance(signal, HiddenSignal)
            hidden = signal.hidden.clone()
            hidden[batch.loss_sample.to(hidden.device) == batch.positions.index(position)] = float("nan")
            return HiddenSignal(hidden)
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

    def recording(self: Student, *args: Any, **options: Any) -> Any:
        before = everything(self)
        result = train_step(self, *args, **options)
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


# ---- commands whose steps are held -----------------------------------------------------------------------------------


def hold_step(directory: Path, rank: int) -> None:
    """A rank says `at_RANK_N` when it begins its update N, and waits there while the file `hold_N` exists (`prepare` of
    a Program).
    """
    train_step, number = Student.train_step, 0

    def held(self: Student, *args: Any, **options: Any) -> Any:
        nonlocal number
        number += 1
        (directory / f"at_{rank}_{number}").touch()
        while (directory / f"hold_{number}").exists():
            time.sleep(0.01)
        return train_step(self, *args, **options)

    Student.train_step = held  # type: ignore[method-assign]
