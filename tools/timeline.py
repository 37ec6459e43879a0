"""Steps of a cluster, simulated event by event: who is free when, and what each waits for (docs/scaling.md).

    found = simulate(Cluster(...), Costs(...), steps=20)

Events are micro-batches and transfers. A tensor-parallel group takes a micro-batch in the time of its slowest rank,
since the group exchanges in every layer. A sample's signal leaves when the teacher has made it, and arrives when the
receiving link has carried what came before. All replicas wait for the slowest at the reduction, once a step.

    together   teacher and student share their ranks. The teacher's groups work, then the signals of a pass travel, and
               a student's group begins when all of its own are there.
    apart      the teacher has ranks of its own. A student's group begins with its first micro-batch as soon as that
               one's signal is there; the teacher goes on with the next pass, and begins one when the signals of the
               pass before the last have been received.

Drawn, from a seed: a speed of every rank in every step; ranks that are slow for good; hiccups. What a rank waits for is
told apart: for signals, for the slowest replica, and (of a teacher apart) for the student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy

SEED: Final = 1
FIRST: Final = 4  # steps that are left out of the means: they fill the pipeline


@dataclass(frozen=True)
class Cluster:
    """Sizes. Where `apart`, ranks of the student are followed by those of the teacher."""

    student_groups: int  # replicas
    student_tensor: int
    teacher_groups: int
    teacher_tensor: int
    samples: int  # of a step; a micro-batch is one
    apart: bool = False


@dataclass(frozen=True)
class Costs:
    """Seconds on ranks of the usual speed. Work varies with the rank's speed, transfers do not."""

    teacher: float  # work of a micro-batch
    teacher_exchange: float  # its tensor-parallel exchange
    student: float
    student_exchange: float
    signal: float  # on the link of the student's rank, of a sample
    reduction: float  # of gradients, with the gather of weights
    jitter: float = 0.02  # standard deviation of a rank's speed in a step
    slow_share: float = 1e-3  # of ranks that are slow for good,
    slow: float = 0.05  # by so much
    hiccup_share: float = 1e-5  # of a rank in a step
    hiccup: float = 2.0  # seconds


@dataclass(frozen=True)
class Simulated:
    """Means of a step, in seconds; what is waited for: of the average rank of the model."""

    step: float
    for_signals: float  # the student's ranks, for teacher and links
    for_slowest: float  # the student's ranks, at the reduction
    teacher_idle: float  # of ranks of the teacher's own


def simulate(cluster: Cluster, costs: Costs, *, steps: int = 20, seed: int = SEED) -> Simulated:
    """See the module docstring. The same for the same arguments."""
    assert steps > FIRST + 1
    draw = numpy.random.default_rng(seed)
    student_ranks = cluster.student_groups * cluster.student_tensor
    own = cluster.teacher_groups * cluster.teacher_tensor if cluster.apart else 0
    usual = 1 + costs.slow * (draw.random(student_ranks + own) < costs.slow_share)
    student_free = numpy.zeros(cluster.student_groups)
    teacher_free = numpy.zeros(cluster.teacher_groups)
    ends, received, waited = list[float](), [0.0, 0.0], numpy.zeros((steps, 3))
    for step in range(steps):
        speed = usual * draw.normal(1, costs.jitter, len(usual)).clip(min=1 - 3 * costs.jitter)
        lost = costs.hiccup * (draw.random(len(usual)) < costs.hiccup_share)
        of_student, of_teacher = slice(0, student_ranks), slice(student_ranks if cluster.apart else 0, None)
        if cluster.apart:
            waited[step, 2] = numpy.maximum(received[step] - teacher_free, 0).mean()
            teacher_free = numpy.maximum(teacher_free, received[step])
        else:
            teacher_free = numpy.full_like(teacher_free, student_free[0])
        of_pass = lost[of_teacher] * cluster.apart  # together, a hiccup falls into the student's part
        made = _worked(cluster, costs, teacher_free, _slowest(speed[of_teacher], cluster.teacher_tensor), of_pass)
        begins = student_free
        if not cluster.apart:  # its ranks have done their part for the teacher; nothing leaves before a pass has ended
            begins = numpy.repeat(teacher_free, cluster.teacher_tensor).reshape(cluster.student_groups, -1).max(axis=1)
            made = teacher_free[numpy.arange(cluster.samples) % cluster.teacher_groups]
        there = _arrivals(made, begins, costs.signal, cluster)
        slowest = _slowest(speed[of_student], cluster.student_tensor)
        begun = begins + lost[of_student].reshape(cluster.student_groups, -1).max(axis=1)
        free, waits = _student(begun, there, costs, slowest)
        received.append(float(there.max()))
        waited[step, :2] = waits.mean(), (free.max() - free).mean()
        student_free = numpy.full_like(student_free, free.max() + costs.reduction)
        ends.append(float(student_free[0]))
    of_step = (ends[-1] - ends[FIRST]) / (steps - 1 - FIRST)
    return Simulated(of_step, *(float(seconds) for seconds in waited[FIRST + 1 :].mean(axis=0)))


def _slowest(speed: numpy.ndarray, tensor: int) -> numpy.ndarray:
    return speed.reshape(-1, tensor).max(axis=1)


def _worked(
    cluster: Cluster, costs: Costs, free: numpy.ndarray, slowest: numpy.ndarray, lost: numpy.ndarray
) -> numpy.ndarray:
    """[samples]: when each signal is made; `free` moves on. Sample i is group i % groups' number i // groups."""
    groups, made = len(free), numpy.zeros(cluster.samples)
    free += lost.reshape(groups, -1).max(axis=1)
    for first in range(0, cluster.samples, groups):
        here = min(groups, cluster.samples - first)
        free[:here] += costs.teacher * slowest[:here] + costs.teacher_exchange
        made[first : first + here] = free[:here]
    return made


def _arrivals(made: numpy.ndarray, begins: numpy.ndarray, transfer: float, cluster: Cluster) -> numpy.ndarray:
    """[micro-batches, replicas]: when the link of each replica has carried the signal. Micro-batch k of replica j is
    sample k * replicas + j, so signals are used in the order in which they are made. Nothing is received before the
    replica begins."""
    link, there = begins.copy(), made.reshape(-1, cluster.student_groups).copy()
    for row in there:
        link = numpy.maximum(link, row) + transfer
        row[:] = link
    if not cluster.apart:
        there[:] = there.max(axis=0)
    return there


def _student(
    begins: numpy.ndarray, there: numpy.ndarray, costs: Costs, slowest: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(when each replica has its gradients, what it has waited for signals)."""
    free, waits = begins, numpy.zeros(len(begins))
    for row in there:
        waits += numpy.maximum(row - free, 0)
        free = numpy.maximum(free, row) + costs.student * slowest + costs.student_exchange
    return free, waits
