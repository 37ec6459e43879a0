"""Reading JSONL and Parquet: every record with its line, damage told apart from absence."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd.data.files import read_records
from megatron_gkd.errors import DataError, NotBuiltError


def test_jsonl_counts_lines_skips_blank_ones_and_hands_on_bad_ones(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        '\ufeff{"prompt": "\u00e9"}\n\n  \n{"prompt": "b", "id": null}\n{"prompt": \n[1]\n'.encode()
        + b'{"prompt": "\xff"}\n{"prompt": "z"}'
    )
    records = list(read_records(path))
    assert [line for line, _ in records] == [1, 4, 5, 6, 7, 8]
    assert records[0] == (1, {"prompt": "\u00e9"})
    assert records[1] == (4, {"prompt": "b"})
    assert records[5] == (8, {"prompt": "z"})
    assert records[2][1].startswith("not valid JSON in UTF-8")
    assert records[4][1].startswith("not valid JSON in UTF-8")
    assert records[3] == (6, "a JSON list, not an object")


def test_parquet_gives_the_same_records_as_jsonl(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prompt": None},
        {"messages": None, "prompt": "p"},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_records(tmp_path / "d.parquet")) == list(read_records(tmp_path / "d.jsonl"))
    assert list(read_records(tmp_path / "d.parquet"))[1] == (2, {"prompt": "p"})


def test_damaged_parquet_stops(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"PAR1 nothing PAR1")
    with pytest.raises(DataError, match=r"d.parquet: not a readable Parquet file"):
        list(read_records(tmp_path / "d.parquet"))


def test_files_are_checked_at_the_call(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_records(tmp_path / "missing.jsonl")
    with pytest.raises(NotBuiltError, match="--dataset NAME"):
        read_records("someone/a-data-set")
    with pytest.raises(DataError, match=r"a directory; give a .jsonl"):
        read_records(tmp_path)
    (tmp_path / "d.jsonl.gz").touch()
    with pytest.raises(DataError, match="a file of another kind"):
        read_records(tmp_path / "d.jsonl.gz")
