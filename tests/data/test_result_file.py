"""The resumable result file: what survives a kill at any moment, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.data.result_file import ResultFile
from megatron_gkd.errors import ConfigError, DataError

ASKED: dict[str, Any] = {"model": "T", "seed": 1, "stop": (1, 2)}


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def begin(path: Path) -> ResultFile:
    result = ResultFile(path, ASKED)
    result.append([{"a": 1}, {"a": "\u00fc"}], records_done=3, counts={"written": 2})
    return result


def test_batches_are_added_and_a_second_start_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert not ResultFile(path, ASKED).resumed
    assert not path.exists()
    begin(path)
    second = ResultFile(path, ASKED)
    assert (second.resumed, second.records_done, second.counts, second.complete) == (True, 3, {"written": 2}, False)
    second.append([{"a": 3}], records_done=5, counts={"written": 3})
    second.append([], records_done=6, counts={"written": 3})
    second.finish()
    assert rows(path) == [{"a": 1}, {"a": "\u00fc"}, {"a": 3}]
    third = ResultFile(path, ASKED)
    assert (third.complete, third.records_done) == (True, 6)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["out.jsonl", "out.jsonl.progress.json"]


@pytest.mark.parametrize("left", [b'{"a": 3}\n{"a"', b'{"a": 3}\n', b"\n", b"\xff\xfe"])
def test_what_was_left_after_the_last_batch_is_cut_off(left: bytes, tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    with path.open("ab") as file:
        file.write(left)
    second = ResultFile(path, ASKED)
    second.append([{"a": 4}], records_done=4, counts={"written": 3})
    assert rows(path) == [{"a": 1}, {"a": "\u00fc"}, {"a": 4}]
    with path.open("ab") as file:
        file.write(left)
    ResultFile(path, ASKED).finish()
    assert rows(path) == [{"a": 1}, {"a": "\u00fc"}, {"a": 4}]


def test_a_kill_between_the_rows_and_the_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    result = begin(path)
    monkeypatch.setattr(result, "_write_progress", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        result.append([{"a": 3}], records_done=9, counts={"written": 3})
    assert len(rows(path)) == 3
    second = ResultFile(path, ASKED)
    assert second.records_done == 3
    second.append([{"a": 3}], records_done=9, counts={"written": 3})
    assert rows(path) == [{"a": 1}, {"a": "\u00fc"}, {"a": 3}]


def test_a_kill_in_the_first_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "out.jsonl"
    result, calls = ResultFile(path, ASKED), []
    write = result._write_progress
    monkeypatch.setattr(result, "_write_progress", lambda: 1 / 0 if calls else (calls.append(1), write()))
    with pytest.raises(ZeroDivisionError):
        result.append([{"a": 0}], records_done=9, counts={"written": 3})
    assert rows(path) == [{"a": 0}]
    begin(path)
    assert rows(path) == [{"a": 1}, {"a": "\u00fc"}]


def test_a_file_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text('{"a": 1')
    with pytest.raises(ConfigError, match=r"has no out\.jsonl\.progress\.json beside it, so it is left alone"):
        ResultFile(path, ASKED)
    assert path.read_text() == '{"a": 1'


def test_other_settings_are_named(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r'another model \("T", now "S"\), and another seed; give another'):
        ResultFile(path, ASKED | {"model": "S", "seed": 2})
    with pytest.raises(ConfigError, match=r"another beam \(null, now 4\); give another"):
        ResultFile(path, ASKED | {"beam": 4})
    assert path.read_bytes() == before


def test_files_that_were_tampered_with(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    begin(path)
    path.write_text("")
    with pytest.raises(DataError, match=r"has 0 bytes, and \d+ were written"):
        ResultFile(path, ASKED)
    path.with_name("out.jsonl.progress.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        ResultFile(path, ASKED)


def test_paths_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no directory"):
        ResultFile(tmp_path / "no" / "out.jsonl", ASKED)
    with pytest.raises(ConfigError, match="is a directory"):
        ResultFile(tmp_path, ASKED)
