"""Text from outside reaches the terminal and the log as text: what acts on a terminal, or turns it, is an escape."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd import cli
from megatron_gkd.commands import report
from megatron_gkd.errors import CheckFailedError, RolloutError, RunStoppedError
from megatron_gkd.observe.logging import PACKAGE, get_logger, setup_logging
from megatron_gkd.observe.text import visible

# Clear the screen, set the title, backspace, C1's CSI, turn the order of text, hide, break lines, half of a pair.
ACTS = "a\x1b[2Jb\x1b]0;t\x07c\x08d\x9b1me\u202ef\u2066g\u200bh\u2028i\x7fj\ud800k\rl"
BAD = set(ACTS) - set("abcdefghijklmt[2J]0;1")


def test_characters() -> None:
    assert visible("plain text\nof two lines") == "plain text\nof two lines"
    assert visible("caf\u00e9 \u4e2d\u6587 \U0001f600") == "caf\u00e9 \u4e2d\u6587 \U0001f600"
    assert visible("\x1b[31m\u202e\x9b\t") == r"\x1b[31m\u202e\x9b\t"
    assert not BAD & set(visible(ACTS))
    assert visible("") == ""


@pytest.mark.parametrize("level", ["info", "debug"])
@pytest.mark.parametrize("kind", [RolloutError, RunStoppedError, CheckFailedError])
def test_the_command_line(
    level: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise kind(f"the server answered 400 ({ACTS})")

    monkeypatch.setattr(cli, "prepare", lambda argv: fail)
    assert cli.main(["train", "--log_level", level]) in (1, 2, 75)
    printed = "".join(capsys.readouterr())
    assert not (BAD - {"\n"}) & set(printed)
    assert r"a\x1b[2Jb" in printed


def test_the_log() -> None:
    stream = io.StringIO()
    before = list(logging.getLogger(PACKAGE).handlers)
    setup_logging("info", rank=0, stream=stream)
    try:
        get_logger("test").warning("%s", ACTS)
        try:
            raise RolloutError(ACTS)
        except RolloutError:
            get_logger("test").exception("failed")
    finally:
        for handler in set(logging.getLogger(PACKAGE).handlers) - set(before):
            logging.getLogger(PACKAGE).removeHandler(handler)
    assert not (BAD - {"\n"}) & set(stream.getvalue())
    assert stream.getvalue().count(r"\u202ef") == 2


def test_the_report_of_a_models_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run: Any = type("Run", (), {"directory": tmp_path})()
    monkeypatch.setattr(report, "read_run", lambda directory: run)
    monkeypatch.setattr(report, "summarise", lambda run: {"answer": "x"})
    monkeypatch.setattr(report, "to_text", lambda summary: f"answer: {ACTS}")
    monkeypatch.setattr(report, "run_data", lambda run, summary: {"name": "run"})
    monkeypatch.setattr("megatron_gkd.commands.report.curve.draw_curve", lambda run, path: None)
    report.write_report(tmp_path, num_answers=0)
    assert not (BAD - {"\n"}) & set("".join(capsys.readouterr()))
    assert r"\x1b[2J" in (tmp_path / "report/summary.txt").read_text()
