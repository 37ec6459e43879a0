#!/usr/bin/env python
"""A step from 8 to 4,096 GPUs on paper: phases, links, stragglers, and ranks that are lost; writes docs/scaling.md.

    python -m tools.scaling            # seconds; needs no model and no GPU

Simulated are steps of TEACHER to STUDENT, in a layout that stays the same while replicas are added (tools/timeline.py:
micro-batches, transfers, ranks of drawn speeds), with both models on the same ranks, and with the teacher on ranks of
its own.

Work of a rank is arithmetic (megatron_gkd/train/step_time.py). Rings: (n - 1) / n of the bytes over the slowest link,
and LATENCY_S for each of the 2 (n - 1) hops in a node and of the 2 log2(nodes) between nodes (trees).

Lost ranks: one an hour, in the whole job, whatever its size (MTBF_S), as a Poisson process. With a checkpoint every tau
seconds that stops training for delta, and a restart that takes R, the shares of useful time are simulated, and beside
them stands the interval of Daly (2006, "A higher order estimate of the optimum checkpoint interval for restart dumps",
Future Generation Computer Systems 22), which refines Young's sqrt(2 delta M) (1974, Communications of the ACM 17).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy

from megatron_gkd.architecture import Architecture, read_architecture
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.train.parameters import elements
from megatron_gkd.train.step_time import Rates, step_seconds
from tools.timeline import FIRST, SEED, Cluster, Costs, Simulated, simulate

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "scaling.md"
MODELS: Final = ROOT / "examples" / "models"
TEACHER, STUDENT = "Llama-3.1-70B", "Llama-3.1-8B"
TENSOR, TEACHER_TENSOR = 4, 8
PROMPT, COMPLETION = 1024, 3072
RATES: Final = Rates(400e12, 350e9, 40e9, 8)
SIZES: Final = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
PER_REPLICA: Final = 32  # samples of a step, where the batch grows with the replicas
FIXED: Final = 2048  # samples of a step, where it does not
LATENCY_S: Final = 10e-6  # of a hop
STEPS: Final = 12  # simulated
APART: Final = (64, 256, 1024, 4096)  # GPUs of which a part is the teacher's
OF_TEACHER: Final = 5 / 8  # of them
MTBF_S: Final = 3600.0
RESTART_S: Final = 240.0  # to notice, start, load the teacher and the checkpoint
NODE_WRITE, STORE_WRITE = 2e9, 100e9  # bytes a second of a checkpoint: of a node, of the file system


@dataclass(frozen=True)
class Point:
    """A step at one size. Seconds of work and transfers are those of a rank of the usual speed."""

    gpus: int
    samples: int
    teacher: float
    student: float
    groups: float  # tensor-parallel, of both models
    signals: float
    reduction: float  # of gradients, and the gather of weights
    simulated: Simulated
    held_bytes: float  # weights, gradients and optimizer of a rank, both models

    @property
    def seconds(self) -> float:
        return self.simulated.step

    @property
    def waiting(self) -> float:
        """What the step takes longer than the sum of its parts."""
        return self.seconds - (self.teacher + self.student + self.groups + self.signals + self.reduction)


def point(gpus: int, samples: int, archs: tuple[Architecture, Architecture], *, teacher_gpus: int = 0) -> Point:
    """Args: archs: the student's and the teacher's; teacher_gpus: that are the teacher's alone, of `gpus`."""
    arch, of_teacher = archs
    student = Layout(TENSOR, 1, (gpus - teacher_gpus) // TENSOR, sequence_parallel=True)
    teacher = Layout(TEACHER_TENSOR, 1, (teacher_gpus or gpus) // TEACHER_TENSOR)
    flags = f"--model {MODELS / STUDENT} --teacher_model {MODELS / TEACHER} --dataset none --lmbda 0 --dtype bf16"
    config = parse_run_config([*flags.split(), "--global_batch_size", str(samples), "--recompute_granularity", "full"])
    config = replace(config, training=replace(config.training, micro_batch_size=1))
    tokens = samples / student.data * (PROMPT + COMPLETION)
    # Sequence parallelism, of hidden states in bf16: a layer has 4 gathers and reduce-scatters in the forward pass, as
    # many when it is recomputed, and 6 in the backward pass.
    handed = {"tp": 14 * arch.num_layers * tokens * arch.hidden_size * 2 / TENSOR * (TENSOR - 1)}
    phases = step_seconds(config, arch, of_teacher, student, teacher, (PROMPT, COMPLETION), handed, RATES)
    nodes = max(1, gpus // RATES.ranks_per_node)
    hops = 2 * (min(gpus, RATES.ranks_per_node) - 1) + 2 * math.log2(nodes)
    # To each rank of the replica, all of it, over that rank's own link.
    signal = COMPLETION * of_teacher.hidden_size * 2 / (RATES.node_bytes if nodes == 1 else RATES.network_bytes)
    of_replica = samples / student.data
    passes = -(-samples // teacher.data)
    costs = Costs(
        phases["teacher"] / passes,
        phases["groups: teacher's tp"] * teacher.data / samples,
        phases["student"] / of_replica,
        phases["groups: tp"] / of_replica,
        signal,
        phases.get("gradients and weights over replicas", 0.0) + LATENCY_S * hops,
    )
    cluster = Cluster(student.data, TENSOR, teacher.data, TEACHER_TENSOR, samples, apart=teacher_gpus > 0)
    own, theirs = elements(arch, student, 0), elements(of_teacher, teacher, 0)
    return Point(
        gpus,
        samples,
        phases["teacher"],
        phases["student"],
        phases["groups: tp"] + phases["groups: teacher's tp"],
        signal * of_replica,
        costs.reduction,
        simulate(cluster, costs, steps=STEPS),
        own * (2 + 4 + 12 / student.data) + theirs * 2,
    )


def apart(gpus: int, archs: tuple[Architecture, Architecture]) -> tuple[int, Point]:
    """(GPUs of the teacher, a step): as many samples a GPU as in the table above, of whole micro-batches a replica."""
    nodes = gpus // RATES.ranks_per_node
    of_teacher = round(nodes * OF_TEACHER) * RATES.ranks_per_node
    replicas = (gpus - of_teacher) // TENSOR
    samples = round(PER_REPLICA * gpus / TENSOR / replicas) * replicas
    return of_teacher, point(gpus, samples, archs, teacher_gpus=of_teacher)


def daly(delta_s: float, mtbf_s: float = MTBF_S) -> float:
    """Seconds of work between checkpoints that cost delta_s each."""
    if delta_s >= 2 * mtbf_s:
        return mtbf_s
    x = delta_s / (2 * mtbf_s)
    return math.sqrt(2 * delta_s * mtbf_s) * (1 + math.sqrt(x) / 3 + x / 9) - delta_s


def useful(interval_s: float, delta_s: float, *, restart_s: float = RESTART_S, hours: float = 4000.0) -> float:
    """The share of the time that is training which is kept, simulated."""
    draw = numpy.random.default_rng(SEED)
    now, kept, end = 0.0, 0.0, hours * 3600
    while now < end:
        left = float(draw.exponential(MTBF_S))  # until the next rank is lost
        rounds = int(left // (interval_s + delta_s))
        kept += rounds * interval_s
        now += left
        # Another one may be lost while the job restarts.
        while (again := float(draw.exponential(MTBF_S))) < restart_s:
            now += again
        now += restart_s
    return kept / now


def saving_s(gpus: int, arch: Architecture) -> float:
    """What a synchronous checkpoint stops: 14 bytes a parameter over the slower of nodes and file system."""
    elements_of_all = elements(arch, Layout(1, 1, 1), 0)
    nodes = max(1, gpus // RATES.ranks_per_node)
    return 14 * elements_of_all / min(nodes * NODE_WRITE, STORE_WRITE)


PAGE_TEXT: Final = """\
# From 8 to 4,096 GPUs, on paper

Made by `python -m tools.scaling`. **Nothing here was measured**: it is arithmetic and a simulation, to see what grows,
what does not, and where waiting begins. What is assumed stands at the end.

{teacher} teaches {student}: student TP {tensor} with sequence parallelism and full recomputation, teacher
TP {teacher_tensor}, on the same ranks; samples of {prompt} + {completion} tokens; replicas are added. Seconds of a
step: `TP` is what tensor-parallel groups exchange, `reduction` that of gradients with the gather of weights. The step
is simulated, micro-batch by micro-batch; `waiting` is what it takes longer than a rank of the usual speed works and
sends: for the slowest rank of a group in every layer, for signals, and for the slowest replica at the reduction.

## The batch grows with the replicas: {per_replica} samples each

{weak}

## The batch stays: {fixed:,} samples

{strong}

Added replicas make a rank's share of the optimizer smaller, and nothing else of its memory: `GB` is weights,
gradients and optimizer of both models, without activations ([Memory](memory.md)).

## The teacher on ranks of its own

Five eighths of the GPUs are the teacher's, and signals travel while both work. As many samples a GPU as in the first
table. Per cent of the step that an average rank waits: a student's for signals, and for the slowest replica; a
teacher's for the student.

{apart}

It pays where both are busy: the teacher's work for each of its GPUs is that of the student for each of its own. The
layout of the first table needs no such balance.

## One lost rank an hour

A job that loses a rank every {mtbf:g} h on average, restarts in {restart:g} s from its newest checkpoint, and stops for
each save. The interval that loses least by Daly's formula, and the share of useful time by simulation, beside twice and
half that interval:

{lost}

`--save_steps` is that number of steps. With `--async_save true` a save stops training for planning and a copy to host
memory alone, so the interval can be shorter. One hour is pessimistic for few GPUs: at one loss in 50,000 GPU-hours, a
job of 4,096 GPUs loses a rank every 12 hours.

Formula: tau = sqrt(2 delta M) (1 + sqrt(delta / 2M) / 3 + (delta / 2M) / 9) - delta, of J. T. Daly, A higher order
estimate of the optimum checkpoint interval for restart dumps, Future Generation Computer Systems 22 (2006); its first
term is J. W. Young's, Communications of the ACM 17 (1974). M: mean time between losses; delta: a save.

## Assumptions

* {tflops:g} TFLOP/s of matrix products a GPU; {node:g} GB/s between GPUs of a node of {ranks}, {network:g} GB/s a GPU
  between nodes; {latency:g} us a hop. Nothing overlaps; the network has no congestion.
* A rank's speed varies by {jitter:.0%} (standard deviation) from step to step; one rank in {slow:,.0f} is
  {slower:.0%} slower for good, and one in {hiccup:,.0f} takes {hiccup_s:g} s longer in a step. {steps} steps are drawn,
  seed {seed}; the means leave out the first {first}.
* A checkpoint has 14 bytes a parameter; a node writes {node_write:g} GB/s, the file system {store:g} GB/s.
* Rows are of one length. Sampling, pushes of weights and evaluations are not in a step.
"""


def page() -> str:
    """docs/scaling.md."""
    archs = read_architecture(MODELS / STUDENT), read_architecture(MODELS / TEACHER)
    weak = [point(gpus, PER_REPLICA * gpus // TENSOR, archs) for gpus in SIZES]
    strong = [point(gpus, FIXED, archs) for gpus in SIZES]
    return PAGE_TEXT.format(
        **dict(teacher=TEACHER, student=STUDENT, tensor=TENSOR, teacher_tensor=TEACHER_TENSOR),
        **dict(prompt=PROMPT, completion=COMPLETION, per_replica=PER_REPLICA, fixed=FIXED),
        **{name: "\n".join(_table(points)) for name, points in (("weak", weak), ("strong", strong))},
        apart="\n".join(_apart(apart(gpus, archs) for gpus in APART)),
        lost="\n".join(_lost(weak, archs[0])),
        **dict(mtbf=MTBF_S / 3600, restart=RESTART_S, tflops=RATES.flops / 1e12, node=RATES.node_bytes / 1e9),
        **dict(ranks=RATES.ranks_per_node, network=RATES.network_bytes / 1e9, latency=LATENCY_S * 1e6),
        **dict(jitter=Costs.jitter, slow=1 / Costs.slow_share, slower=Costs.slow, hiccup=1 / Costs.hiccup_share),
        **dict(hiccup_s=Costs.hiccup, steps=STEPS, seed=SEED, first=FIRST),
        **dict(node_write=NODE_WRITE / 1e9, store=STORE_WRITE / 1e9),
    )


def _lost(points: list[Point], arch: Architecture) -> Iterator[str]:
    yield "| GPUs | a save stops, s | a save every | steps | useful | half as often | twice as often |"
    yield "|---|---|---|---|---|---|---|"
    for each in points:
        delta = saving_s(each.gpus, arch)
        interval = daly(delta)
        shares = " | ".join(f"{useful(interval * factor, delta):.1%}" for factor in (1.0, 2.0, 0.5))
        steps = max(1, round(interval / each.seconds))
        yield f"| {each.gpus:,} | {delta:.1f} | {interval / 60:.1f} min | {steps:,} | {shares} |"


def _apart(found: Iterable[tuple[int, Point]]) -> Iterator[str]:
    yield "| GPUs | the teacher's | samples | step | signals, % | slowest, % | teacher, % | tokens/s/GPU |"
    yield "|" + "---|" * 8
    for of_teacher, each in found:
        seen = each.simulated
        waits = " | ".join(
            f"{100 * part / seen.step:.1f}" for part in (seen.for_signals, seen.for_slowest, seen.teacher_idle)
        )
        tokens = each.samples * (PROMPT + COMPLETION) / seen.step / each.gpus
        yield f"| {each.gpus:,} | {of_teacher:,} | {each.samples:,} | {seen.step:.2f} | {waits} | {tokens:,.0f} |"


def _table(points: list[Point]) -> Iterator[str]:
    names = (
        "GPUs",
        "samples",
        "teacher",
        "student",
        "TP",
        "signals",
        "reduction",
        "waiting",
        "step",
        "tokens/s/GPU",
        "GB",
    )
    yield f"| {' | '.join(names)} |"
    yield "|" + "---|" * len(names)
    for each in points:
        tokens = each.samples * (PROMPT + COMPLETION) / each.seconds / each.gpus
        work = each.teacher, each.student, each.groups, each.signals, each.reduction, each.waiting, each.seconds
        numbers = " | ".join(f"{part:.2f}" for part in work)
        yield f"| {each.gpus:,} | {each.samples:,} | {numbers} | {tokens:,.0f} | {each.held_bytes / 1e9:.1f} |"


def main() -> int:
    PAGE.write_text(page())
    print(f"written: {PAGE.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
