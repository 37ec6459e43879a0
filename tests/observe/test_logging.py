"""One format, per-rank levels, no trace on other loggers."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator

import pytest

from megatron_gkd.observe.logging import CLEAR_LINE, PACKAGE, get_logger, setup_logging


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    logger = logging.getLogger(PACKAGE)
    before = (list(logger.handlers), logger.level, logger.propagate)
    yield
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_one_format() -> None:
    stream = io.StringIO()
    setup_logging("info", rank=0, stream=stream)
    get_logger("megatron_gkd.train.loop").info("step %d", 3)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[rank 0\] INFO train\.loop: step 3\n", stream.getvalue())


@pytest.mark.parametrize(
    ("level", "rank", "shown"),
    [
        ("info", 0, ["info", "warning", "error"]),
        ("info", 1, ["warning", "error"]),
        ("debug", 1, ["debug", "info", "warning", "error"]),
        ("error", 1, ["error"]),
        ("warning", 0, ["warning", "error"]),
    ],
)
def test_levels(level: str, rank: int, shown: list[str]) -> None:
    stream = io.StringIO()
    setup_logging(level, rank=rank, stream=stream)
    for name in ("debug", "info", "warning", "error"):
        getattr(get_logger("x"), name)(name)
    assert [line.rsplit(" ", 1)[1] for line in stream.getvalue().splitlines()] == shown


def test_the_rank_is_the_launcher_s(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setenv("RANK", "3")
    setup_logging("warning", stream=stream)
    get_logger("x").warning("w")
    assert "[rank 3]" in stream.getvalue()


def test_setting_up_twice_does_not_say_things_twice() -> None:
    first, second = io.StringIO(), io.StringIO()
    setup_logging("info", rank=0, stream=first)
    setup_logging("info", rank=0, stream=second)
    get_logger("x").info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1


def test_only_the_package_is_set_up() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level)
    stream = io.StringIO()
    setup_logging("debug", rank=0, stream=stream)
    logging.getLogger("transformers").debug("theirs")
    assert (list(root.handlers), root.level) == before
    assert stream.getvalue() == ""


def test_names_below_the_package() -> None:
    assert get_logger("megatron_gkd.data").name == "megatron_gkd.data"
    assert get_logger("tools").name == "megatron_gkd.tools"


def test_a_message_clears_the_progress_line_of_a_terminal() -> None:
    stream = Terminal()
    setup_logging("info", rank=0, stream=stream)
    get_logger("x").info("m")
    assert stream.getvalue().startswith(CLEAR_LINE)


def test_messages_follow_a_replaced_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that was stderr at set-up, and was closed since, is not written to."""
    first, second = io.StringIO(), io.StringIO()
    monkeypatch.setattr("sys.stderr", first)
    setup_logging("info", rank=0)
    first.close()
    monkeypatch.setattr("sys.stderr", second)
    get_logger("here").info("still heard")
    assert second.getvalue().endswith("INFO here: still heard\n")


def test_a_stream_that_cannot_be_written_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    setup_logging("info", rank=0, stream=stream)
    stream.close()
    get_logger("here").info("lost")
    assert "I/O operation on closed file" in capsys.readouterr().err
