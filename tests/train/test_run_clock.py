"""One clock a run: ranks whose machines are on both sides of midnight render the same prompts, and so does a run that
is resumed another day; a run that begins anew has a time of its own.

Rows are streamed, so that every rank renders for itself. What templates see of the time: data/test_clock.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gkd.data.chat import load_tokenizer
from megatron_gkd.data.clock import Clock
from tests.support.checkpoint_runs import FLAGS, checkpoint_of, write_inputs
from tests.support.ranks import run_ranks
from tests.support.runs import command_line, metrics, train_on_this_rank

RUN: dict[str, Any] = FLAGS | dict(
    train_iters=2, save_steps=1, micro_batch_size=4, save_hf=False, streaming=True, pipeline=2, sft_alpha=0
)
EVENING, MORNING = ("2026-11-27T23:59:59", "2026-11-28T00:00:01"), ("2026-11-28T09:00:00",) * 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = write_inputs(tmp_path_factory.mktemp("inputs"))
    for model in (found["model"], found["teacher_model"]):
        tokenizer = load_tokenizer(model)
        assert isinstance(tokenizer.chat_template, str)
        tokenizer.chat_template = "{{ strftime_now('%d') }} {{ strftime_now('%B') }}" + tokenizer.chat_template
        tokenizer.save_pretrained(model)
    return found


def train_at(argv: list[str], times: tuple[str, ...]) -> None:
    """The machine of a rank has the time of its number."""
    now, time = Clock.now, times[dist.get_rank()]
    Clock.now = staticmethod(lambda: Clock(time))  # type: ignore[method-assign]
    try:
        train_on_this_rank(argv)
    finally:
        Clock.now = now  # type: ignore[method-assign]


def run(inputs: dict[str, Any], run_dir: Path, times: tuple[str, ...], **flags: Any) -> Path:
    run_ranks(train_at, command_line(**inputs | RUN | flags, save=run_dir), times, world=2)
    return run_dir


def saved_time(run_dir: Path, step: int) -> str:
    return str(json.loads((checkpoint_of(run_dir, step) / "state.json").read_text())["clock"])


def test_past_midnight_and_the_next_day(inputs: dict[str, Any], tmp_path: Path) -> None:
    whole = run(inputs, tmp_path / "whole", EVENING)
    assert saved_time(whole, 2) == EVENING[0]
    resumed = run(inputs, tmp_path / "resumed", MORNING, load=checkpoint_of(whole, 1))
    assert metrics(resumed, first_step=2) == metrics(whole, first_step=2) != []
    assert saved_time(resumed, 2) == EVENING[0]
    other = run(inputs, tmp_path / "other", ("2027-05-01T09:00:00",) * 2, train_iters=1)
    assert metrics(other)[0]["loss"] != metrics(whole)[0]["loss"], "the template writes the time"
