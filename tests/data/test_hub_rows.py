"""Which files of a data set's repository are taken, and the rows that are made of them.

Does not cover: the fetching (test_hub.py); what rows mean (test_forms.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd.config.hub_names import read_name
from megatron_gkd.data.files import read_records
from megatron_gkd.data.hub.rows import FoundRows, draw, fetch_rows
from megatron_gkd.data.hub.snapshot import look_up
from megatron_gkd.data.hub.splits import choose_files
from megatron_gkd.errors import DataError
from tests.support.hub_server import HubServer

CONFIGS = """---
license: mit
configs:
- config_name: en
  default: true
  data_files:
  - split: train
    path: en/train-*.parquet
  - split: validation
    path: [en/held/*.parquet]
- config_name: de
  data_files: "de/**"
---
# A data set
"""


@pytest.mark.parametrize(
    ("files", "readme", "subsets", "chosen"),
    [
        ("data.jsonl", None, "", "data.jsonl"),
        ("b.json a.json dataset_infos.json .hidden.json README.md x.py", None, "", "a.json b.json"),
        (
            "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet data/test-00000-of-00001.parquet",
            None,
            "",
            "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet",
        ),
        ("train.jsonl dev.jsonl test.jsonl notes.json", None, "validation", "dev.jsonl"),
        ("train.jsonl dev.jsonl test.jsonl", None, "train test", "train.jsonl test.jsonl"),
        ("trainers.jsonl testament.jsonl", None, "", "testament.jsonl trainers.jsonl"),
        ("train/a.csv train/b.csv train/c.json", None, "", "train/a.csv train/b.csv"),
        ("en/train-0.parquet en/held/0.parquet de/x.parquet", CONFIGS, "", "en/train-0.parquet"),
        ("en/train-0.parquet en/held/0.parquet de/x.parquet", CONFIGS, "validation", "en/held/0.parquet"),
        ("en/train-0.parquet en/held/0.parquet de/a/x.parquet", CONFIGS, "de", "de/a/x.parquet"),
        ("train.jsonl", "---\nlicense: mit\n---\n", "", "train.jsonl"),
        ("train.jsonl", "no front matter", "", "train.jsonl"),
    ],
)
def test_files_of_a_split(files: str, readme: str | None, subsets: str, chosen: str) -> None:
    assert choose_files(files.split(), readme, subsets.split(), "O/N") == chosen.split()


@pytest.mark.parametrize(
    ("files", "readme", "subsets", "message"),
    [
        ("load.py README.md", None, "", r"O/N has no files that are read here \(.*\); scripts of a data set never run"),
        ("train.jsonl test.jsonl", None, "de", r"there is no de; it has .*default with test, train|train, test"),
        (
            "en/train-1.parquet de/y.parquet",
            CONFIGS.replace("default: true", ""),
            "",
            "no split or configuration was named",
        ),
        ("train.jsonl", "---\n: [\n---\n", "", "the front matter of its README.md is not YAML"),
    ],
)
def test_splits_that_are_not_there(files: str, readme: str | None, subsets: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        choose_files(files.split(), readme, subsets.split(), "O/N")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "repository").mkdir()
    with HubServer({"dataset/Org/Rows": tmp_path / "repository"}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield server


ROWS = [{"prompt": f"p{i}", "completion": f"c{i} \u00e9\n"} for i in range(10)]


def publish(hub: HubServer, kind: str, rows: list[dict[str, Any]] = ROWS) -> None:
    """The rows in two files of a kind."""
    root = hub.repos["dataset/Org/Rows"]
    for number, part in enumerate((rows[:4], rows[4:])):
        path = root / f"train-{number}.{kind}"
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), path)
        elif kind == "json":
            path.write_text(json.dumps(part, indent=1))
        elif kind == "csv":
            lines = ["prompt,completion", *(f'{row["prompt"]},"{row["completion"]}"' for row in part)]
            path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in part))


def get(text: str, seed: int = 42) -> FoundRows:
    name = read_name(text, "dataset")
    assert name is not None
    return fetch_rows(name, look_up(name), seed=seed, shows=False)


def read(found: FoundRows) -> list[Any]:
    return [record for _, record in read_records(found.path)]


@pytest.mark.parametrize("kind", ["parquet", "json", "csv", "jsonl"])
def test_all_rows_and_some_of_them(hub: HubServer, kind: str) -> None:
    publish(hub, kind)
    whole, some = get("Org/Rows"), get("Org/Rows#6")
    assert read(whole) == ROWS
    assert read(some) == [ROWS[i] for i in draw(10, 6, seed="42/Org/Rows", text="")]
    assert whole.files == some.files == (f"train-0.{kind}", f"train-1.{kind}")
    assert (whole.indices is None, len(some.indices or "")) == (True, 16)
    assert get("Org/Rows#6") == some
    assert read(get("Org/Rows#6", seed=7)) != read(some)
    assert read(get("Org/Rows#10")) == ROWS


def test_one_file_is_taken_where_it_lies(hub: HubServer) -> None:
    publish(hub, "jsonl")
    (hub.repos["dataset/Org/Rows"] / "train-1.jsonl").unlink()
    found = get("Org/Rows")
    assert "snapshots" in found.path.parts
    assert read(found) == ROWS[:4]


def test_a_draw_is_ascending_without_repetition_and_of_the_seed_alone() -> None:
    drawn = draw(1000, 100, seed="1/a", text="")
    assert drawn == sorted(set(drawn)) == draw(1000, 100, seed="1/a", text="")
    assert drawn != draw(1000, 100, seed="2/a", text="")
    assert drawn[:5] == [1, 11, 13, 19, 36]


def test_more_rows_than_there_are(hub: HubServer) -> None:
    publish(hub, "jsonl")
    with pytest.raises(DataError, match="Org/Rows#11: there are 10 rows; give at most that many behind the #"):
        get("Org/Rows#11")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train.json", "[1, 2", "train.json cannot be read"),
        ("train.csv", "a,b\n1,2,3\n", "a line has more or fewer values"),
    ],
)
def test_files_that_cannot_be_read(hub: HubServer, file: str, text: str, message: str) -> None:
    (hub.repos["dataset/Org/Rows"] / file).write_text(text)
    with pytest.raises(DataError, match=message):
        get("Org/Rows")
    assert not list((Path(hub.repos["dataset/Org/Rows"]).parent / "home/megatron_gkd/hub/rows").glob("*"))


def test_parquet_files_of_other_columns_are_not_joined(hub: HubServer) -> None:
    publish(hub, "parquet")
    table = pyarrow.Table.from_pylist([{"question": "q"}])
    pyarrow.parquet.write_table(table, hub.repos["dataset/Org/Rows"] / "train-1.parquet")
    with pytest.raises(DataError, match="its Parquet files cannot be joined"):
        get("Org/Rows")
