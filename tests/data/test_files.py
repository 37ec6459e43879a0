"""Reading JSONL, Parquet and data sets saved on disk: every record with its line, damage told apart from absence."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd.data.files import read_records
from megatron_gkd.errors import DataError
from tests.support.saved_rows import write_saved


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
    with pytest.raises(DataError, match="no such file"):
        read_records("someone/a-data-set")
    with pytest.raises(DataError, match=r"a directory without state.json; give a .jsonl"):
        read_records(tmp_path)
    (tmp_path / "d.jsonl.gz").touch()
    with pytest.raises(DataError, match="a file of another kind"):
        read_records(tmp_path / "d.jsonl.gz")


RECORDS = [{"prompt": f"p{i}", "completion": f"c{i}", "id": i} for i in range(10)]


def test_a_data_set_saved_on_disk_gives_the_same_records_as_jsonl(tmp_path):
    saved = write_saved(tmp_path / "saved", RECORDS, files=3)
    assert list(read_records(saved)) == list(enumerate(RECORDS, start=1))


def test_what_is_wrong_with_a_saved_data_set_is_said(tmp_path):
    several = tmp_path / "both"
    write_saved(several / "train", RECORDS)
    write_saved(several / "test", RECORDS)
    (several / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(DataError, match=r"both: a directory of several data sets; give one of them: .*test, .*train"):
        read_records(several)

    saved = write_saved(tmp_path / "saved", RECORDS, files=2)
    (saved / "data-00001-of-00002.arrow").rename(saved / "other")
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow, named in state.json, is not there"):
        read_records(saved)
    state = json.loads((saved / "state.json").read_text())
    for change, text in (
        ({"_data_files": [{"filename": "../state.json"}]}, "names files outside of the directory"),
        ({"_data_files": 5}, "does not name the Arrow files"),
        ({"_indices_data_files": [{"filename": "x"}]}, "a selection of rows"),
    ):
        (saved / "state.json").write_text(json.dumps(state | change))
        with pytest.raises(DataError, match=text):
            read_records(saved)


@pytest.mark.parametrize("cut", ["in a batch", "between batches"])
def test_a_cut_arrow_file_stops_instead_of_being_short(tmp_path, cut):
    saved = write_saved(tmp_path / "saved", RECORDS)
    (file,) = saved.glob("*.arrow")
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 8 if cut == "between batches" else size // 2)
    with pytest.raises(DataError, match=r"saved: data-00000-of-00001.arrow is (cut short|not a readable Arrow file)"):
        list(read_records(saved))


def test_a_value_that_is_no_text_is_one_bad_row(tmp_path):
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(),
        3,
        [None, pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pyarrow.py_buffer(b"a\xffc")],
    )
    pyarrow.parquet.write_table(pyarrow.table({"prompt": bad}), tmp_path / "d.parquet")
    records = list(read_records(tmp_path / "d.parquet"))
    assert [records[0], records[2]] == [(1, {"prompt": "a"}), (3, {"prompt": "c"})]
    assert "Invalid UTF8" in records[1][1]


def test_what_json_would_lose_or_not_finish_is_a_bad_row(tmp_path):
    lines = [
        '{"prompt": "a", "prompt": "b"}',
        "[" * 100000,
        '{"prompt": ' + "9" * 5000 + "}",
        '{"a": {"b": 1, "b": 2}}',
    ]
    (tmp_path / "d.jsonl").write_text("\n".join(lines))
    problems = [problem for _, problem in read_records(tmp_path / "d.jsonl")]
    texts = ["the key 'prompt' is given twice", "nested too deeply", "Exceeds the limit", "the key 'b' is given twice"]
    assert all(text in problem for text, problem in zip(texts, problems, strict=True))


def test_a_column_twice_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(DataError, match="the column `prompt` is there twice"):
        list(read_records(tmp_path / "d.parquet"))
