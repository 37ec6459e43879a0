"""A step's rows are read once, however often its draw is asked for."""

from __future__ import annotations

import json
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.rollout.protocol import Completion, Request
from megatron_gkd.train.draws import Draws, draw_step
from megatron_gkd.train.plans import StepPlans
from megatron_gkd.train.teacher_sampling import teacher_requests
from tests.support.runs import command_line
from tests.support.tiny_tokenizers import chat_tokenizer

BATCH = 4


class CountedRows(StreamedRows):
    """Counts how often each record is read and tokenised."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.reads: Counter[int] = Counter()
        super().__init__(*args, **kwargs)
        self.reads.clear()  # those that are checked at the start

    def _read(self, index: int) -> Any:
        self.reads[index] += 1
        return super()._read(index)


@pytest.fixture
def rows(tmp_path: Path) -> CountedRows:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f"{json.dumps({'prompt': f'{i}?', 'completion': f'{i}!'})}\n" for i in range(40)))
    return CountedRows([path], chat_tokenizer(), max_length=100)


def config(**flags: Any) -> RunConfig:
    given = dict(model="m", dataset="d.jsonl", save="s", global_batch_size=BATCH, device="cpu", report_to="none")
    return parse_run_config(command_line(**{**given, **flags}), command="train")


class Sampled:
    """In the place of rollouts: asks for the step's requests, as they do, and answers them."""

    def for_step(self, step: int, requests: Any) -> dict[int, Completion]:
        found: list[Request] = requests(step)
        return {request.key: Completion(request.key, (7, 8), (-1.0, -1.0), "stop", step) for request in found}

    def waiting(self, step: int) -> dict[int, Completion] | None:
        return {}


def step_plans(config: RunConfig, rows: CountedRows, draws: Draws, **options: Any) -> StepPlans:
    arch = SimpleNamespace(max_position_embeddings=100)
    inputs: Any = SimpleNamespace(
        config=config,
        draws=draws,
        student_arch=arch,
        student_layout=Layout(),
        teacher_layout=Layout(),
        sight=SimpleNamespace(student=None),
    )
    return StepPlans(inputs, **options)


def test_a_step_reads_its_rows_once(rows: CountedRows) -> None:
    of_run = config(lmbda=0, teacher_model="t")
    plans = step_plans(of_run, rows, Draws(of_run, rows))
    for step in range(3):
        assert sum(rows.reads.values()) == BATCH * (step + (step > 0)), "the next step was planned ahead"
        plan = plans.plan(step)
        ahead = plans.plan_ahead(step + 1)
        assert ahead is not None
        assert [sample.row for sample in plan.samples] == draw_indices(of_run, rows, step)
    assert set(rows.reads.values()) == {1}


def draw_indices(of_run: RunConfig, rows: CountedRows, step: int) -> list[int]:
    seed, shuffle = of_run.training.seed, of_run.data.shuffle
    return rows.indices(seed, step * BATCH, BATCH, shuffle=shuffle)


def test_sampling_asks_for_the_same_draw(rows: CountedRows) -> None:
    """The student's requests and the teacher's, the step itself, and the next one: 2 to 4 reads a row before."""
    of_run = config(lmbda=0.5, seq_kd=True, teacher_model="t", max_completion_length=20, max_length=100)
    draws = Draws(of_run, rows)
    plans = step_plans(of_run, rows, draws, rollouts=Sampled())
    for step in range(4):
        asked = teacher_requests(of_run, draws[step], step, 100)
        assert teacher_requests(of_run, draws[step], step, 100) == asked
        teacher_requests(of_run, draws[step + 1], step + 1, 100)  # sampled while this step trains
        requests = plans.requests(step)
        assert len(asked) + len(requests) == BATCH
        assert draws[step] == draw_step(of_run, CountedRows([rows._paths[0]], chat_tokenizer(), max_length=100), step)
    assert sum(rows.reads.values()) == BATCH * 5
    assert set(rows.reads.values()) == {1}


def test_what_the_sampler_said_of_its_tokens_arrives(rows: CountedRows) -> None:
    of_run = config(lmbda=0.5, teacher_model="t", max_completion_length=20, max_length=100)
    plans = step_plans(of_run, rows, Draws(of_run, rows), rollouts=Sampled())
    samples = [sample for step in range(4) for sample in plans.plan(step).samples]
    assert {(sample.source, sample.logprobs) for sample in samples} == {("student", (-1.0, -1.0)), ("dataset", None)}
    assert all(sample.completion_mask is None for sample in samples)


def test_draws_of_several_threads(rows: CountedRows) -> None:
    of_run = config(lmbda=0, teacher_model="t")
    draws, found = Draws(of_run, rows), []
    threads = [threading.Thread(target=lambda step=i % 2: found.append((step, draws[step]))) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert dict(found) == {step: draw_step(of_run, rows, step) for step in range(2)}
    assert all(number == 2 for number in rows.reads.values()), "once for the draws, once for this comparison"
    for step in range(4):
        draws[step]
    assert len(draws._kept) == 2
