"""The simulated timeline (tools/timeline.py): without chance it is arithmetic, which is written here again; with it,
everybody waits for the slowest, more so among more.

Not covered: whether clusters behave so.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.timeline import Cluster, Costs, simulate

COSTS = Costs(3.0, 0.5, 2.0, 0.25, 0.125, 1.0, jitter=0.0, slow_share=0.0, hiccup_share=0.0)
TOGETHER = Cluster(student_groups=4, student_tensor=4, teacher_groups=2, teacher_tensor=8, samples=8)
APART = replace(TOGETHER, apart=True)


def test_together_one_follows_the_other() -> None:
    """4 passes of the teacher, 2 signals on each link, 2 micro-batches of the student, the reduction."""
    found = simulate(TOGETHER, COSTS, steps=8)
    assert found.step == pytest.approx(4 * 3.5 + 2 * 0.125 + 2 * 2.25 + 1.0)
    assert found.for_signals == pytest.approx(2 * 0.125)
    assert (found.for_slowest, found.teacher_idle) == (0, 0)


def test_apart_the_slower_of_the_two_decides() -> None:
    busy_teacher = simulate(APART, COSTS, steps=12)
    assert busy_teacher.step == pytest.approx(4 * 3.5)
    assert busy_teacher.teacher_idle == 0
    waits = busy_teacher.for_signals + busy_teacher.for_slowest
    assert waits == pytest.approx(4 * 3.5 - 2 * 2.25 - 1.0), "all that the student does not work"
    busy_student = simulate(APART, replace(COSTS, teacher=0.5, student=4.0), steps=12)
    assert busy_student.step == pytest.approx(2 * 4.25 + 1.0 + 0.125), "and for the link, once a step"
    assert busy_student.teacher_idle > 0
    assert busy_student.for_signals == pytest.approx(0.125), "the second signal comes while the first is worked on"


def test_a_slow_link_is_waited_for() -> None:
    assert simulate(APART, replace(COSTS, signal=20.0), steps=12).step > 2 * 20


def test_everybody_waits_for_the_slowest() -> None:
    """The same for the same seed; the longer, the more ranks there are; one slow rank in a group is enough."""
    drawn = replace(COSTS, jitter=0.02, hiccup_share=1e-3)
    sizes = [replace(TOGETHER, student_groups=4 * n, teacher_groups=2 * n, samples=8 * n) for n in (1, 16, 256)]
    steps = [simulate(size, drawn).step for size in sizes]
    assert steps == [simulate(size, drawn).step for size in sizes]
    assert steps[0] < steps[1] < steps[2]
    assert simulate(TOGETHER, drawn, seed=2).step != steps[0]
    exact = simulate(TOGETHER, COSTS).step
    slow = simulate(TOGETHER, replace(COSTS, slow_share=1.0)).step
    assert slow - exact == pytest.approx(0.05 * (4 * 3.0 + 2 * 2.0)), "work, and no transfer"
    hiccups = simulate(TOGETHER, replace(COSTS, hiccup_share=1.0)).step
    assert hiccups - exact == pytest.approx(2.0 - 2 * 0.125), "the signals arrive meanwhile"
