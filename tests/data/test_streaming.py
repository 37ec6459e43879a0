"""Streamed rows against rows in memory, the rows in the place of bad ones, and checks on access.

A run that streams: tests/train/test_data_flags.py. Damaged input of every kind: test_fuzz.py.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd.data import random_access
from megatron_gkd.data.random_access import open_records
from megatron_gkd.data.rows import load_rows
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.errors import ConfigError, DataError
from tests.support.saved_rows import write_saved
from tests.support.tiny_tokenizers import CHATML, chat_tokenizer, plain_tokenizer

TOKENIZER = plain_tokenizer()
RECORDS = [{"prompt": f"{i} + 3 =", "completion": f" {i + 3}"} for i in range(40)]
BAD = {"question": "?"}


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def stream(*paths: Path, **options: Any) -> StreamedRows:
    return StreamedRows(list(paths), **{"tokenizer": TOKENIZER, "max_length": 100, **options})


def written(kind: str, root: Path, records: list[dict[str, Any]]) -> Path:
    if kind == "jsonl":
        lines = [f"{json.dumps(record)}\r\n" + "\n" * (i % 3) for i, record in enumerate(records)]
        (root / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + "".join(lines).encode())
        return root / "d.jsonl"
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), root / "d.parquet", row_group_size=7)
        return root / "d.parquet"
    return write_saved(root / "saved", records, files=3, batch_rows=4)


KINDS = ["jsonl", "parquet", "saved"]


@pytest.mark.parametrize("kind", KINDS)
def test_streamed_rows_are_the_rows_in_memory(kind: str, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", RECORDS[:5])
    path = written(kind, tmp_path, RECORDS)
    loaded, streamed = load_rows([other, path], TOKENIZER, max_length=100), stream(other, path)
    assert len(streamed) == len(loaded) == 45
    assert streamed.sizes == loaded.sizes == (5, 40)
    for index in random.Random(0).sample(range(45), 45):
        assert streamed[index] == loaded[index]
        assert streamed.place(index) == loaded.place(index)
    assert streamed[-1] == loaded[-1]
    assert streamed.longest >= loaded.longest == max(len(r.prompt_ids) + len(r.completion_ids or ()) for r in loaded)
    with pytest.raises(IndexError, match="row 45 of 45"):
        streamed[45]
    for options in ({"shuffle": True}, {"shuffle": False}):
        assert streamed.indices(3, 40, 20, **options) == loaded.indices(3, 40, 20, **options)


def test_decoded_row_groups_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = open_records(written("parquet", tmp_path, RECORDS))
    assert isinstance(records, random_access._Parquet)
    assert [records[i][0] for i in range(40)] == list(range(1, 41))
    assert len(records._decoded) == 6
    one = records._decoded[0].nbytes
    monkeypatch.setattr(random_access, "CACHE_BYTES", int(2.5 * one))
    records = open_records(written("parquet", tmp_path, RECORDS))
    assert isinstance(records, random_access._Parquet)
    order = random.Random(1).choices(range(40), k=200)
    for index in order:
        assert records[index][1] == RECORDS[index]
        assert sum(table.nbytes for table in records._decoded.values()) <= 2.5 * one
    monkeypatch.setattr(random_access, "CACHE_BYTES", 0)
    assert records[0][1] == RECORDS[0]


def test_large_row_groups_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stream(written("parquet", tmp_path, RECORDS))
    assert "40 records, read while training; of 40 that were checked 40 are usable. The others" in rows.account()
    assert "Row groups" not in rows.account()
    monkeypatch.setattr("megatron_gkd.data.streaming._LARGE_UNIT_BYTES", 10)
    assert "Row groups of up to 0 MB are decoded whole" in rows.account()


# --- rows that cannot be used


@pytest.fixture
def bad_third(tmp_path: Path) -> Path:
    """Every third record is malformed, at the start of the file ten in a row."""
    records: list[Any] = [BAD if i % 3 == 0 or i < 10 else record for i, record in enumerate(RECORDS)]
    return write(tmp_path / "d.jsonl", records)


def test_the_row_in_the_place_of_a_bad_one_depends_on_the_data_alone(bad_third: Path) -> None:
    first, second = (stream(bad_third, on_bad_row="skip") for _ in range(2))
    forwards = [first[i] for i in range(40)]
    backwards = [second[i] for i in reversed(range(40))][::-1]
    assert forwards == backwards == [first[i] for i in range(40)]
    good = [i for i in range(40) if i % 3 and i >= 10]
    whole = load_rows([bad_third], TOKENIZER, max_length=100, on_bad_row="skip")
    assert [forwards[i] for i in good] == list(whole)
    assert set(forwards) == set(whole)
    taken = Counter(first.place(i) for i in range(10))
    assert max(taken.values()) <= 4  # neighbours do not all end at one row
    assert first.summary.dropped == {"malformed": 20}  # each once
    assert "20 dropped as malformed (first: " in first.account()


def test_the_row_in_its_place_comes_from_the_same_data_set(bad_third: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", RECORDS)
    rows = stream(other, bad_third, on_bad_row="skip", weights=[1, 3])
    assert all(rows.place(i).startswith(str(other if i < 40 else bad_third)) for i in range(80))
    drawn = rows.indices(0, 0, 4000, shuffle=True)
    assert sum(i < 40 for i in drawn) == 1000


def test_a_bad_row_stops_with_its_place_when_its_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_gkd.data.streaming.NUM_CHECKED", 4)
    path = write(tmp_path / "d.jsonl", [*RECORDS[:7], BAD, *RECORDS[8:]])
    rows = stream(path)
    assert rows[6] == rows[6] != rows[8]
    with pytest.raises(DataError, match=r"d.jsonl:8: columns \['question'\] .*pass --on_bad_row skip"):
        rows[7]
    with pytest.raises(DataError, match=r"d.jsonl:11: columns"):  # among the checked ones: at once
        stream(write(tmp_path / "d.jsonl", [*RECORDS[:10], BAD, *RECORDS[11:]]))


def test_overlong_rows_follow_the_policy(tmp_path: Path) -> None:
    long = {"prompt": "6789" * 9, "completion": "67"}
    path = write(tmp_path / "d.jsonl", [long, *RECORDS[1:]])
    rows = stream(path, max_length=30)
    assert rows.summary.dropped == {"overlong": 1}
    assert rows.place(0) != f"{path}:1"
    cut = stream(path, max_length=30, overlong="truncate_left")
    assert cut[0] == load_rows([path], TOKENIZER, max_length=30, overlong="truncate_left")[0]
    with pytest.raises(DataError, match=r"d.jsonl:1: .* exceed max_length 30"):
        stream(path, max_length=30, overlong="stop")
    assert all(len(row.prompt_ids) <= 12 for row in stream(path, max_length=30, max_completion_length=18))


def test_nothing_usable_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"none of 5 records .* is usable; 5 dropped as malformed .*d.jsonl:1"):
        stream(write(tmp_path / "d.jsonl", [BAD] * 5), on_bad_row="skip")
    with pytest.raises(DataError, match=r"d.jsonl has no record"):
        stream(write(tmp_path / "d.jsonl", []))
    with pytest.raises(DataError, match="no data set is given"):
        stream()
    monkeypatch.setattr("megatron_gkd.data.streaming.NUM_CHECKED", 1)
    monkeypatch.setattr("megatron_gkd.data.streaming._ATTEMPTS", 20)
    rows = stream(write(tmp_path / "d.jsonl", [RECORDS[0], *[BAD] * 5000]), on_bad_row="skip")
    with pytest.raises(DataError, match=r"20 records drawn in a row cannot be used; .* dropped as malformed"):
        rows[100]


def test_arguments_are_checked(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", RECORDS)
    for options in ({"max_length": 1}, {"on_bad_row": "ignore"}, {"weights": [1, 2]}):
        with pytest.raises(ConfigError):
            stream(path, **options)


# --- what a run asks of its rows


def test_what_a_run_asks_is_checked_at_once_and_on_access(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_gkd.data.streaming.NUM_CHECKED", 4)
    records = [*RECORDS[:7], {"prompt": "2 + 3"}, *RECORDS[8:]]
    rows = stream(write(tmp_path / "d.jsonl", records))
    rows.check_sources(lmbda=1, seq_kd=False)
    assert rows[7].completion_ids is None
    rows.check_sources(lmbda=0.5, seq_kd=False)
    assert rows[6] == rows[6] != rows[8]
    with pytest.raises(DataError, match=r"--lmbda 0.5 with --seq_kd false needs a completion .*d.jsonl:8"):
        rows[7]
    with pytest.raises(DataError, match="evaluation needs a completion"):
        stream(write(tmp_path / "d.jsonl", [{"prompt": "2"}])).require_completions("evaluation")
    with pytest.raises(DataError, match=r"d.jsonl:1: token id \d+ is outside the models' vocabulary of 5"):
        rows.require_ids_below(5)


def test_both_kinds_name_the_row_of_a_token_out_of_the_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", RECORDS)
    loaded = load_rows([path], TOKENIZER, max_length=100)
    for rows in (loaded, stream(path)):
        rows.require_ids_below(loaded.max_token_id + 1)
        with pytest.raises(DataError, match=rf"d.jsonl:\d+: token id {loaded.max_token_id} is outside"):
            rows.require_ids_below(loaded.max_token_id)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_changes_under_the_run_stops_it(kind: str, tmp_path: Path) -> None:
    path = written(kind, tmp_path, RECORDS)
    rows = stream(path)
    file = next(iter(path.glob("*.arrow"))) if path.is_dir() else path
    with file.open("r+b") as opened:
        opened.seek(0, 2)
        opened.write(b"\n")
    with pytest.raises(DataError, match=r"has changed since the run read its index"):
        rows[3]
    file.unlink()
    with pytest.raises(DataError, match=r"cannot be read: No such file"):
        rows[3]


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_tells_data_and_settings_apart(kind: str, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
    path = written(kind, tmp_path / "a", RECORDS)
    other = written(kind, tmp_path / "b", [*RECORDS[:20], {"prompt": "20 + 3 =", "completion": " 24"}, *RECORDS[21:]])
    same = written(kind, tmp_path / "c", RECORDS)
    assert stream(path).fingerprint() == stream(same).fingerprint()
    changed: list[tuple[Path, dict[str, Any]]] = [
        (other, {}),
        (path, {"max_length": 99}),
        (path, {"on_bad_row": "skip"}),
        (path, {"overlong": "truncate_left"}),
        (path, {"max_completion_length": 5}),
        (path, {"weights": [1.0]}),
        (path, {"tokenizer": plain_tokenizer(bos=True)}),
        (path, {"tokenizer": chat_tokenizer(CHATML)}),
    ]
    prints = [stream(path).fingerprint(), *(stream(where, **options).fingerprint() for where, options in changed)]
    assert len(set(prints)) == len(prints)
