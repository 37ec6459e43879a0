"""Numbers in environment variables: one rule, and an error that names the variable; never a traceback."""

from __future__ import annotations

import pytest

from megatron_gkd import cli
from megatron_gkd.config.environment import num_threads, number, rank_in_messages
from megatron_gkd.errors import ConfigError


@pytest.mark.parametrize(("text", "wanted"), [("", 1), ("3", 3), ("4,2", 4), (" 2 ", 2)])
def test_threads(monkeypatch: pytest.MonkeyPatch, text: str, wanted: int) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert num_threads() == wanted


def test_threads_that_are_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert num_threads() == 1


@pytest.mark.parametrize("text", ["0", "a", "4,", "4,0", "-1", "1.5"])
def test_threads_that_are_none(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(ConfigError, match=r"OMP_NUM_THREADS is .* it must be a whole number from 1"):
        num_threads()


def test_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N", "7")
    assert number("N", least=7, most=7) == 7
    with pytest.raises(ConfigError, match="N is '7'; it must be a whole number from 0 to 6"):
        number("N", most=6)
    monkeypatch.setenv("N", " ")
    assert number("N") is None


@pytest.mark.parametrize("command", [["sample"], ["train"], ["convert"]])
def test_a_rank_that_is_no_number_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.setenv("RANK", "a")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr(cli, "SILENT_RANK_WAITS_S", 0.0)
    assert rank_in_messages() == 0
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.main(command) == 2
    assert capsys.readouterr().err.startswith("megatron-gkd: error: ")
