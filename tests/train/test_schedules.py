"""Who takes a step's values: the sources of its samples, what is asked of the sampler, the divergence of the loss; and
a run with a schedule resumes bit for bit.

The sampler is a recorder; with a real one the same requests and settings go the way of those of a constant
(test_on_policy.py). Does not cover: texts and values of schedules (tests/config/test_schedules.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gkd.config.run import DistillationConfig
from megatron_gkd.data.collate import collate
from megatron_gkd.records import Sample, StepPlan, StepValues
from megatron_gkd.rollout.protocol import Completion, Request, SamplingSettings
from megatron_gkd.schedule import sample_sources
from megatron_gkd.teacher.signals import HiddenSignal
from megatron_gkd.train.draws import Draws, draw_step
from megatron_gkd.train.objective import DistillationLoss
from megatron_gkd.train.rollouts import Rollouts
from tests.support.checkpoint_runs import FLAGS, STEPS, assert_same_bits, checkpoint_of, write_inputs
from tests.support.ranks import one_rank_group, run_ranks
from tests.support.runs import metrics, train
from tests.train.test_draws import CountedRows, Sampled, config, rows, step_plans

__all__ = ["rows"]  # a fixture

SCHEDULED: dict[str, Any] = dict(teacher_model="t", max_length=100, lmbda="0:0,8:1", max_completion_length="0:2,8:18")


def test_sources_lengths_and_the_plan_follow_the_step(rows: CountedRows) -> None:
    of_run = config(**SCHEDULED, beta="stepwise,0:0,3:1")
    plans, seed = step_plans(of_run, rows, Draws(of_run, rows), rollouts=Sampled()), of_run.training.seed
    asked = []
    for step in range(8):
        drawn = draw_step(of_run, rows, step)
        lmbda = (step + 1) / 8
        assert drawn.sources == sample_sources(seed, step, 4, lmbda=lmbda, seq_kd=False)
        asked += [(step, request.max_tokens) for request in plans.requests(step)]
        assert plans.plan(step).values == StepValues(lmbda, float(step >= 2), 0.9, 2 + 2 * (step + 1))
    assert asked
    assert all(most == 2 + 2 * (step + 1) for step, most in asked)
    assert [sources.count("student") for sources in (draw_step(of_run, rows, 7).sources,)] == [4]


class Bridge:
    """Notes what it is told, and answers."""

    def __init__(self) -> None:
        self.version: int | None = None
        self.pushes: list[int] = []
        self.sampled: list[tuple[float, int]] = []  # temperature, requests

    def push(self, version: int) -> Any:
        self.pushes.append(version)
        self.version = version
        return SimpleNamespace(gather_s=0.0, load_s=0.0, attempts=1, num_bytes=0)

    def generate(self, requests: Sequence[Request], settings: SamplingSettings) -> list[Completion]:
        self.sampled.append((settings.temperature, len(requests)))
        assert self.version is not None
        return [Completion(request.key, (5,), (-1.0,), "stop", self.version) for request in requests]

    def collect(self, requests: Sequence[Request], generated: Any) -> dict[int, Completion]:
        return {completion.key: completion for completion in generated}

    def sample(self, requests: Sequence[Request], settings: SamplingSettings) -> dict[int, Completion]:
        return self.collect(requests, self.generate(requests, settings))

    def sleep(self) -> None:
        """Nothing."""


def carry_out(bridge: Bridge, temperatures: Sequence[float], counts: Sequence[int], **options: Any) -> list[int]:
    """Completions of every step."""
    engines: Any = bridge
    rollouts = Rollouts(
        engines, lambda step: SamplingSettings(temperatures[step]), vocab_size=9, train_iters=len(counts), **options
    )
    return [len(rollouts.for_step(step, lambda k: [Request(i, (1,), 1, 0) for i in range(counts[k])]))
            for step in range(len(counts))]  # fmt: skip


def test_steps_that_are_sampled_together_keep_their_own_temperature() -> None:
    bridge, counts = Bridge(), [2, 1, 3, 0, 2, 1]
    assert carry_out(bridge, [0.5, 0.5, 0.7, 0.7, 0.9, 0.9], counts, steps_per_generation=3) == counts
    assert bridge.sampled == [(0.5, 3), (0.7, 3), (0.9, 3)]
    assert bridge.pushes == [0, 3]


def test_steps_without_samples_of_the_student_push_nothing() -> None:
    """But for the first, which shows early that the engines can hold its weights."""
    bridge, counts = Bridge(), [0, 0, 0, 2, 0, 1]
    assert carry_out(bridge, [0.9] * 6, counts) == counts
    assert bridge.pushes == [0, 3, 5]
    late, counts = Bridge(), [0, 0, 2, 1]
    assert carry_out(late, [0.9, 0.9, 0.7, 0.5], counts, lag=1) == counts
    assert late.sampled == [(0.7, 2), (0.5, 1)]
    assert late.pushes == [0, 1, 2]


def losses_of(betas: list[float]) -> list[tuple[float, float]]:
    """Per beta: the loss of an objective that goes from one to the next, and of one that was made for it."""
    draw = torch.Generator().manual_seed(5)
    head, teacher_head = (torch.randn(20, 6, generator=draw) for _ in range(2))
    samples = (Sample(0, 0, (1, 2), (3, 4, 5), "dataset"),)
    batch, hidden = collate(samples), torch.randn(4, 1, 6, generator=draw)
    signal = HiddenSignal(torch.randn(3, 6, generator=draw))
    model: Any = SimpleNamespace(head_input=lambda x: x, head_weight=lambda: head, head_grad_is_reduced=True)

    def made(beta: float | str) -> DistillationLoss:
        return DistillationLoss(
            DistillationConfig(beta=beta), tp_group=one_rank_group(), vocab_size=20, teacher_head=teacher_head
        )

    walking, found = made("0:0,9:1"), []
    for step, beta in enumerate(betas):
        walking.begin(StepPlan(step, samples, (((0,),),), (((0,),),), values=StepValues(0.0, beta, 1.0, 1)))
        found.append(tuple(float(loss(model, hidden, batch, signal)[0]) for loss in (walking, made(beta))))
    return found  # type: ignore[return-value]


def test_the_divergence_follows_through_its_end_points() -> None:
    (found,) = run_ranks(losses_of, [0.0, 0.3, 0.5, 0.7, 1.0, 0.0], world=1)
    assert all(walking == fresh for walking, fresh in found)
    assert len({walking for walking, _ in found}) == 5, "each beta has a loss of its own"


def test_a_scheduled_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    """From within a ramp, through the end point beta 1."""
    flags = write_inputs(tmp_path) | FLAGS | dict(beta="1:0,3:1", tensor=2)
    whole = train(world=2, **flags, save=tmp_path / "whole")
    rows_of_run = metrics(whole)
    expected = [0.0, 0.5, 1.0, 1.0]
    assert [row["schedule/beta"] for row in rows_of_run] == pytest.approx(expected, abs=1e-15)
    assert {row["schedule/lmbda"] for row in rows_of_run} == {0.0}
    assert not any("schedule/temperature" in row for row in rows_of_run), "nothing is sampled"
    resumed = tmp_path / "resumed"
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "hf")
    shutil.rmtree(checkpoint_of(resumed, STEPS))
    (resumed / "checkpoints" / "latest").write_text(checkpoint_of(resumed).name)
    train(world=2, **flags, save=resumed, load=resumed)
    assert_same_bits(resumed, whole, 1)
