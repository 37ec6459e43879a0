"""The progress line: text, ETA, terminals and files."""

from __future__ import annotations

import io
import os

import pytest

from megatron_gkd.observe.progress import WINDOW, Progress, describe_phases, took


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_line_of_a_file() -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress(100, stream=stream, clock=clock) as progress:
        clock.now_s = 5.2
        progress.update(10, loss=2.34512, tokens_per_step=0.52 * 1234.4)
    assert stream.getvalue() == "step 10/100 | loss 2.3451 | 1,234 tokens/s | 0.52 s/step | ETA 0:00:47\n"


def test_lengths_and_phases_stand_at_its_end() -> None:
    stream = io.StringIO()
    phases = {"plan": 0.1, "teacher": 2.4, "teacher_samples": 0.5, "student": 7.0}
    Progress(9, stream=stream, clock=Clock()).update(1, length=79.6, phases=phases)
    assert stream.getvalue() == "step 1/9 | 80 tokens/completion | student 70%, teacher 24%, teacher samples 5%\n"
    assert describe_phases({"plan": 0.0}) == ""
    assert [took(seconds) for seconds in (0.4, 1.0, 12.34)] == ["", "", " (in 12.3 s)"]


def test_a_resumed_run_counts_its_own_steps_only() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = Progress(100, done_steps=90, stream=stream, clock=clock)
    clock.now_s = 4.0
    progress.update(92)
    assert stream.getvalue() == "step 92/100 | 2.00 s/step | ETA 0:00:16\n"


def test_the_speed_is_that_of_the_last_updates() -> None:
    clock = Clock()
    progress = Progress(1000, stream=io.StringIO(), clock=clock)
    clock.now_s = 500.0  # a slow first step
    progress.update(1)
    for step in range(2, WINDOW + 2):
        clock.now_s += 1.0
        progress.update(step)
    assert "| 1.00 s/step |" in progress.line(WINDOW + 1)


def test_both_speeds_are_means_over_the_same_updates() -> None:
    """One slow step with few tokens: the line does not show its speed beside the mean time of the others."""
    clock = Clock()
    progress = Progress(1000, stream=io.StringIO(), clock=clock)
    for step in range(1, 3 * WINDOW):
        slow = step == 3 * WINDOW - 1
        clock.now_s += 20.0 if slow else 1.0
        progress.update(step, tokens_per_step=10 if slow else 1000)
    mean_s, mean_tokens = (20 + WINDOW - 2) / (WINDOW - 1), (10 + 1000 * (WINDOW - 2)) / (WINDOW - 1)
    line = progress.line(3 * WINDOW - 1)
    assert f"| {mean_tokens / mean_s:,.0f} tokens/s | {mean_s:.2f} s/step |" in line


def test_before_any_time_has_passed_there_is_no_eta() -> None:
    progress = Progress(10, stream=io.StringIO())
    assert progress.line(0) == "step 0/10"


def test_a_terminal_s_line_is_rewritten_within_its_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.get_terminal_size", lambda *args, **kwargs: os.terminal_size((60, 5)))
    stream, clock = Terminal(), Clock()
    with Progress(100, done_steps=10, stream=stream, clock=clock) as progress:
        progress.doing("teacher_samples")
        clock.now_s = 1.0
        progress.update(11, loss=1.0, length=80)
        progress.doing("student")
    first, *_, told, at_work, end = stream.getvalue().replace("\n", "\r").rstrip("\r").split("\r")[1:]
    assert first.startswith("step 10/100 |#         |")
    assert "now: teacher samples" in stream.getvalue()
    assert told.startswith("step 11/100 |#1        | now: teacher samples | loss 1.0000")
    assert at_work.startswith("step 11/100 |#1        | now: student | loss 1.0000 | 1.00 ")
    assert (len(told), len(at_work)) == (59, 59)
    assert end.startswith("step 11/100 |#1        | loss 1.0000 | 1.00 s/step | E")
    assert stream.getvalue().endswith("\n")


def test_a_file_is_not_told_what_the_run_is_at() -> None:
    stream = io.StringIO()
    with Progress(9, stream=stream) as progress:
        progress.doing("student")
    assert stream.getvalue() == ""


def test_other_ranks_say_nothing() -> None:
    stream = io.StringIO()
    with Progress(10, enabled=False, stream=stream) as progress:
        progress.update(1, loss=1.0)
    assert stream.getvalue() == ""


def test_what_is_fast_is_counted_by_the_second() -> None:
    clock = Clock()
    progress = Progress(1_000_000, unit="row", stream=io.StringIO(), clock=clock)
    clock.now_s = 30.0
    progress.update(60_000)
    assert progress.line(60_000) == "row 60000/1000000 | 2,000 rows/s | ETA 0:07:50"
