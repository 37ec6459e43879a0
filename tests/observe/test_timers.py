"""Seconds per phase, with a clock of the test's own."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import pytest

from megatron_gkd.observe.timers import PHASES, Timers, phases_of


def ticking() -> Callable[[], float]:
    """A clock that moves one second per reading."""
    ticks = count()
    return lambda: float(next(ticks))


def test_phases_add_up_in_the_order_of_first_use() -> None:
    timers = Timers(clock=ticking())
    for name in ("teacher", "student", "teacher"):
        with timers.phase(name):
            pass
    assert list(timers.seconds().items()) == [("teacher_s", 2.0), ("student_s", 1.0)]


def test_somebody_is_told_which_phase_begins() -> None:
    told: list[str] = []
    timers = Timers(entered=told.append)
    for name in ("teacher", "student"):
        with timers.phase(name):
            assert told[-1] == name
    assert told == ["teacher", "student"]


def test_a_phase_inside_another_counts_in_both() -> None:
    timers = Timers(clock=ticking())
    with timers.phase("step"), timers.phase("loss"):
        pass
    assert timers.seconds() == {"loss_s": 1.0, "step_s": 3.0}


def test_phases_add_up_to_the_step() -> None:
    """What the plan waited for is counted by who waited."""
    seconds = {"plan_s": 5.0, "teacher_s": 2.0, "student_s": 3.0}
    found = phases_of(10.5, seconds, within_plan=[4.0, 0.5])
    assert found == {"plan_s": 0.5, "teacher_s": 2.0, "student_s": 3.0, "other_s": 0.5}
    without = phases_of(10.5, {"plan_s": 5.0, "student_s": 3.0}, within_plan=[4.0, 0.5])
    assert without["other_s"] == 2.5, "a phase that nobody times is seen"
    assert {f"{name}_s" for name in PHASES} >= found.keys()


def test_a_phase_that_raises_is_counted() -> None:
    timers = Timers(clock=ticking())
    with pytest.raises(ZeroDivisionError), timers.phase("step"):
        raise ZeroDivisionError
    assert timers.seconds() == {"step_s": 1.0}


def test_the_device_is_waited_for_only_when_asked() -> None:
    waits: list[str] = []
    with Timers(synchronize=lambda: waits.append("wait")).phase("step"):
        waits.append("work")
    assert waits == ["wait", "work", "wait"]
