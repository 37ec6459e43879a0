"""A run that is told to stop by a signal to one of its ranks, and a run that loses a rank: what is saved, with which
code the ranks end, what they say, and that the resumed run is the one that never stopped, bit for bit.

Real commands on real processes (tests/support/faulty_runs.py), each step held until the signal is there. Not covered:
several machines; a scheduler.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.cli import EXIT_STOPPED
from megatron_gkd.errors import TrainingError
from megatron_gkd.observe.writers import JsonlWriter
from megatron_gkd.train import stopping
from megatron_gkd.train.faults import lost_rank
from megatron_gkd.train.stopping import EXIT_AT_ONCE, LAG, SAME_PRESS_S, SIGNALS, StopAgreement, StopSignals
from tests.support.checkpoint_runs import FLAGS, assert_same_bits, checkpoint_of, write_inputs
from tests.support.effort import LIMIT_S
from tests.support.faulty_runs import hold_step
from tests.support.launched import forked_ranks
from tests.support.program import Program
from tests.support.ranks import run_ranks
from tests.support.runs import command_line, metrics, train, train_on_this_rank

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = FLAGS | dict(save_steps=100, micro_batch_size=4, train_iters=8)
LAUNCH = [sys.executable, "-m", "megatron_gkd.commands.launcher", "--standalone", "--nproc-per-node", "2"]
TP2: dict[str, Any] = RUN | dict(tensor=2)
OWN: dict[str, Any] = RUN | dict(tensor=2, teacher_placement="separate", teacher_world_size=1)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def saved_steps(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in sorted((run_dir / "checkpoints").glob("step_*"))]


def stop_in_step_two(flags: dict[str, Any], directory: Path, world: int, *, rank: int, number: int) -> Program:
    """The signal comes to one rank while the student is before its second update."""
    directory.mkdir()
    (directory / "hold_2").touch()
    argv = ["train", *command_line(**flags)]
    command = Program(argv, directory, world=world, prepare=partial(hold_step, directory))
    command.wait_for(directory / "at_0_2")
    command.wait_for(directory / "at_1_2")
    command.send(rank, number)
    time.sleep(0.5)  # the teacher's rank goes on meanwhile, as far ahead as it may
    (directory / "hold_2").unlink()
    return command


@pytest.mark.parametrize(
    ("number", "rank", "async_save"), [(signal.SIGINT, 1, False), (signal.SIGUSR1, 0, True)], ids=["INT", "USR1"]
)
def test_a_signal_to_one_rank_stops_all_after_the_step(
    inputs: dict[str, Any], tmp_path: Path, number: signal.Signals, rank: int, async_save: bool
) -> None:
    flags = inputs | TP2 | dict(save=tmp_path / "run", async_save=async_save)
    command = stop_in_step_two(flags, tmp_path / "ranks", 2, rank=rank, number=number)
    assert command.codes() == [EXIT_STOPPED] * 2, command.output()
    assert saved_steps(tmp_path / "run") == [2]
    assert f"{number.name} was received: stopped after step 2" in command.text(rank)
    assert f"--load {tmp_path / 'run'} goes on" in command.text(1 - rank)
    assert "checkpoints/step_00000002 saved, " in command.text(0)
    if number == signal.SIGINT:
        assert "Ctrl-C again ends at once" in command.text(rank)
        assert "Traceback" not in command.text(0) + command.text(1)
        whole = train(world=2, **flags | dict(save=tmp_path / "whole"))
        train(world=2, **flags, load=tmp_path / "run")
        assert_same_bits(tmp_path / "run", whole, first_step=1)


def test_a_second_interrupt_ends_a_rank_at_once(inputs: dict[str, Any], tmp_path: Path) -> None:
    """One whose step does not end: it is held."""
    flags = inputs | TP2 | dict(save=tmp_path / "run")
    (tmp_path / "ranks").mkdir()
    (tmp_path / "ranks" / "hold_2").touch()
    argv = ["train", *command_line(**flags)]
    command = Program(argv, tmp_path / "ranks", world=2, prepare=partial(hold_step, tmp_path / "ranks"))
    command.wait_for(tmp_path / "ranks" / "at_0_2")
    command.send(0, signal.SIGINT)
    deadline = time.monotonic() + LIMIT_S
    while "Ctrl-C again ends at once" not in command.text(0):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(2 * SAME_PRESS_S)
    command.send(0, signal.SIGINT)
    command.processes[0].join(LIMIT_S)
    (tmp_path / "ranks" / "hold_2").unlink()
    assert command.codes() == [EXIT_AT_ONCE, 2], command.output()
    assert "ended at once" in command.text(0)
    assert saved_steps(tmp_path / "run") == []


@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 2), (signal.SIGUSR1, 1)], ids=["teacher", "student"])
def test_ranks_of_the_teachers_stop_with_the_student(
    inputs: dict[str, Any], tmp_path: Path, number: signal.Signals, rank: int
) -> None:
    """Whichever rank is told: all stop after the same step, at most LAG steps after the teacher's rank has heard it."""
    flags = inputs | OWN | dict(teacher_tensor=1, save=tmp_path / "run")
    command = stop_in_step_two(flags, tmp_path / "ranks", 3, rank=rank, number=number)
    assert command.codes() == [EXIT_STOPPED] * 3, command.output()
    (step,) = saved_steps(tmp_path / "run")
    assert step <= (2 + LAG if rank == 1 else 4 + LAG)
    assert all(f"stopped after step {step}," in command.text(r) for r in range(3))
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, step + 1))
    if rank == 2:
        whole = train(world=3, **flags | dict(save=tmp_path / "whole"))
        train(world=3, **flags, load=tmp_path / "run")
        assert_same_bits(tmp_path / "run", whole, first_step=1)


@pytest.mark.parametrize(("flags", "world", "victim"), [(TP2, 2, 1), (OWN | dict(teacher_tensor=1), 3, 2)])
def test_a_killed_rank_ends_the_others_with_advice(
    inputs: dict[str, Any], tmp_path: Path, flags: dict[str, Any], world: int, victim: int
) -> None:
    flags = inputs | flags | dict(save=tmp_path / "run", save_steps=1)
    started = time.monotonic()
    command = stop_in_step_two(flags, tmp_path / "ranks", world, rank=victim, number=signal.SIGKILL)
    codes = command.codes()
    assert codes[victim] == -signal.SIGKILL
    assert [codes[rank] for rank in range(world) if rank != victim] == [2] * (world - 1), command.output()
    assert time.monotonic() - started < 300, "they waited for --distributed_timeout_minutes"
    for rank in range(world):
        if rank != victim:
            assert f"start all ranks again with the same command line and --load {tmp_path / 'run'}" in command.text(
                rank
            )
            assert "Traceback" not in command.text(rank)
    assert 1 in saved_steps(tmp_path / "run")


def test_a_hanging_rank_ends_the_others_when_the_time_is_up(inputs: dict[str, Any], tmp_path: Path) -> None:
    flags = inputs | TP2 | dict(save=tmp_path / "run", save_steps=1, distributed_timeout_minutes=0.2)
    started = time.monotonic()
    command = stop_in_step_two(flags, tmp_path / "ranks", 2, rank=1, number=signal.SIGSTOP)
    command.processes[0].join(LIMIT_S)
    assert command.processes[0].exitcode == 2, command.output()
    assert time.monotonic() - started > 12
    command.send(1, signal.SIGKILL)
    assert "did not answer within --distributed_timeout_minutes 0.2" in command.text(0)
    assert "Traceback" not in command.text(0)
    assert saved_steps(tmp_path / "run") == [1]


@pytest.mark.slow
def test_torchrun_hands_sigterm_on(inputs: dict[str, Any], tmp_path: Path) -> None:
    """SIGTERM to torchrun, as a scheduler sends it: the ranks save within the 30 seconds that it leaves them."""
    run_dir = tmp_path / "run"
    argv = command_line(**inputs | TP2 | dict(save=run_dir, train_iters=100000, save_hf=False))
    with forked_ranks() as environment, open(tmp_path / "output", "a") as output:
        launcher = subprocess.Popen(
            [*LAUNCH, "-m", "megatron_gkd", "train", *argv],
            stdout=output,
            stderr=output,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        )
        try:
            deadline = time.monotonic() + LIMIT_S
            while len(metrics(run_dir)) < 2:
                assert launcher.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.2)
            launcher.send_signal(signal.SIGTERM)
            assert launcher.wait(LIMIT_S) == EXIT_STOPPED
        finally:
            launcher.kill()
    text = (tmp_path / "output").read_text()
    (step,) = saved_steps(run_dir)
    assert text.count(f"stopped after step {step}, with a checkpoint") == 3, text[-4000:]
    assert "rank 0: SIGTERM was received: stopped after step" in text.splitlines()[-1]
    assert "Traceback" not in text
    assert len(metrics(run_dir)) == step


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_the_handlers_are_there_for_the_length_of_the_block_alone() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopSignals() as signals:
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received == "SIGUSR1"
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_what_a_second_signal_means(monkeypatch: pytest.MonkeyPatch, second: signal.Signals) -> None:
    """After an interrupt it ends; at the same moment it is the same Ctrl-C; after SIGTERM it is no more than that."""
    told: queue.Queue[bytes | int] = queue.Queue()
    monkeypatch.setattr(stopping, "_tell", told.put)
    monkeypatch.setattr(stopping, "SAME_PRESS_S", 0.0)
    with StopSignals(told.put) as signals:
        os.kill(os.getpid(), signal.SIGTERM)
        while signals.received is None:  # of two that wait, Python hears the one with the lower number first
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)
        assert told.get(timeout=LIMIT_S) == stopping.HEARD
        os.kill(os.getpid(), second)
        assert told.get(timeout=LIMIT_S) == stopping.AT_ONCE
        assert told.get(timeout=LIMIT_S) == EXIT_AT_ONCE
    assert signals.received == "SIGTERM"
    monkeypatch.setattr(stopping, "SAME_PRESS_S", LIMIT_S)
    with StopSignals(told.put):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), second)
        assert told.get(timeout=LIMIT_S) == stopping.HEARD
    assert told.empty()


def test_another_thread_leaves_the_handlers_alone() -> None:
    found = []

    def enter() -> None:
        with StopSignals():
            found.append([signal.getsignal(number) for number in SIGNALS])

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]


def answers(asking: dict[int, int]) -> list[bool]:
    """Of six steps, where each rank asks from the step on that `asking` gives it."""
    import torch.distributed as dist

    agreement = StopAgreement()
    first = asking.get(dist.get_rank(), 99)
    found = [agreement.after_step(step >= first) for step in range(6)]
    agreement.close()
    return found


def test_all_ranks_get_the_same_answer_for_the_same_step() -> None:
    assert run_ranks(answers, {1: 2}, world=2) == [[False] * 4 + [True] * 2] * 2
    assert run_ranks(answers, {}, world=2) == [[False] * 6] * 2


def test_an_error_of_another_kind_is_not_a_lost_rank() -> None:
    assert lost_rank(RuntimeError("size mismatch"), "run", 10) is None
    assert lost_rank(TrainingError("gloo timed out"), "run", 10) is None
    text = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3"
    assert "--distributed_timeout_minutes 10" in str(lost_rank(RuntimeError(text), "run", 10))


def test_a_full_disk_is_an_error_that_names_the_record(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    (tmp_path / "checkpoints/step_00000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step_00000001/manifest.json").touch()
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    with pytest.raises(TrainingError, match=r"metrics.jsonl cannot be written \(No space left on device\).*--load"):
        writer.write(1, {"loss": 1.0})
    writer.close()


def fill_the_disk_after_the_first_step(argv: list[str]) -> str:
    """The record's file becomes /dev/full when its first row is written."""
    write = JsonlWriter.write

    def last(self: JsonlWriter, *row: Any) -> None:
        write(self, *row)
        if self._path.name == "metrics.jsonl":
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, self._file.fileno())
            os.close(full)

    JsonlWriter.write = last  # type: ignore[method-assign]
    try:
        train_on_this_rank(argv)
    except TrainingError as error:
        return str(error)
    finally:
        JsonlWriter.write = write  # type: ignore[method-assign]
    return "no error"


def test_a_run_whose_record_cannot_be_written_ends_and_can_be_resumed(inputs: dict[str, Any], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    flags = inputs | RUN | dict(save=run_dir, save_steps=1, train_iters=3)
    (error,) = run_ranks(fill_the_disk_after_the_first_step, command_line(**flags), world=1, fresh=True)
    assert f"{run_dir / 'metrics.jsonl'} cannot be written (No space left on device)" in error
    assert saved_steps(run_dir) == [1]
    train(world=1, **flags, load=run_dir)
    assert [row["step"] for row in metrics(run_dir)] == [1, 2, 3]
    assert checkpoint_of(run_dir, 3).is_dir()
