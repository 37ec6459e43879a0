"""Rows as a file: what is written comes back, nothing else does, and the name says all that decides the rows.

Ranks that share a file: tests/train/test_shared_rows.py.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import time
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from safetensors import safe_open

from megatron_gkd.data import row_file, row_key
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.clock import Clock
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.data.policy import RowPolicy, RowSummary
from megatron_gkd.data.row_file import DamagedRowsError, read_rows, write_rows
from megatron_gkd.data.row_key import read_content, rows_key
from megatron_gkd.data.row_maker import Plugin, RowMaker
from megatron_gkd.data.rows import BATCH_ROWS, RowArrays, RowDataset, load_rows
from megatron_gkd.errors import DataError
from tests.support.corpus import TOKENIZERS, write_corpus
from tests.support.saved_rows import write_saved
from tests.support.tiny_tokenizers import CHATML, chat_tokenizer, plain_tokenizer

OPTIONS: dict[str, Any] = dict(max_length=48, on_bad_row="skip", tag_key="tag")


# --- one row at a time, and many


class OneByOne(ChatEncoder):
    """Each text in a call of its own."""

    def _answer(self, questions: Any) -> list[tuple[int, ...]]:
        return [
            tuple(self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
            for text, special in questions
        ]


def equal(a: RowDataset, b: RowDataset) -> bool:
    arrays = all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a.arrays, b.arrays, strict=True))
    return arrays and (a.tags, a.summary, a.fingerprint()) == (b.tags, b.summary, b.fingerprint())


@pytest.mark.parametrize("name", TOKENIZERS)
def test_batches_give_the_rows_of_one_at_a_time(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokenizer = write_corpus(tmp_path / "d.jsonl", BATCH_ROWS + 100), TOKENIZERS[name]()
    batched = load_rows([path], tokenizer, overlong="truncate_left", **OPTIONS)
    monkeypatch.setattr("megatron_gkd.data.rows.ChatEncoder", OneByOne)
    monkeypatch.setattr("megatron_gkd.data.rows.BATCH_ROWS", 1)
    assert equal(batched, load_rows([path], tokenizer, overlong="truncate_left", **OPTIONS))
    assert batched.summary.num_read > BATCH_ROWS
    assert batched.summary.dropped["malformed"]


@pytest.mark.parametrize(
    ("overlong", "fingerprint"), [("drop", "bc03795196ae3b84"), ("truncate_left", "fac76cd69614553b")]
)
def test_the_fingerprint_of_saved_runs_stays(overlong: Any, fingerprint: str, tmp_path: Path) -> None:
    """As it was when rows were encoded one at a time: a checkpoint is refused with another one."""
    path = write_corpus(tmp_path / "d.jsonl", 1200)
    assert load_rows([path], TOKENIZERS["bytes"](), overlong=overlong, **OPTIONS).fingerprint() == fingerprint


def test_what_is_wrong_first_is_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is read before it is encoded: a bad row still comes before a file that breaks off after it."""
    good, bad = {"prompt": "a", "completion": "b"}, {"completion": "b"}

    def broken(path: str) -> Iterator[tuple[int, Any]]:
        yield from ((line, bad if line == 2 else good) for line in range(1, 9))
        raise DataError(f"{path}: breaks off after 8")

    monkeypatch.setattr("megatron_gkd.data.rows.read_records", broken)
    with pytest.raises(DataError, match=r"d.parquet: breaks off after 8"):
        load_rows(["d.parquet"], chat_tokenizer(), max_length=99, on_bad_row="skip")
    with pytest.raises(DataError, match=r"d.parquet:2: columns"):
        load_rows(["d.parquet"], chat_tokenizer(), max_length=99)
    enough = load_rows(["d.parquet"], chat_tokenizer(), max_length=99, on_bad_row="skip", max_rows=5)
    assert (len(enough), enough.summary.num_read) == (5, 6)


# --- the file


@pytest.fixture
def rows(tmp_path: Path) -> RowDataset:
    (tmp_path / "data").mkdir()
    paths = [write_corpus(tmp_path / "data" / f"{name}.jsonl", 120) for name in "ab"]
    return load_rows(paths, chat_tokenizer(), **OPTIONS)


def paths_of(root: Path) -> list[str]:
    return [str(root / "data" / f"{name}.jsonl") for name in "ab"]


def test_rows_come_back_from_a_file(rows: RowDataset, tmp_path: Path) -> None:
    path = tmp_path / "key.safetensors"
    write_rows(path, rows, paths_of(tmp_path))
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == [path.name]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for verify in (True, False):
        again = read_rows(path, paths_of(tmp_path), verify=verify)
        assert equal(again, rows)
        assert list(again) == list(rows)
        assert [again.place(i) for i in range(len(rows))] == [rows.place(i) for i in range(len(rows))]
        assert (again.sizes, again.longest, again.max_token_id) == (rows.sizes, rows.longest, rows.max_token_id)
        assert str(again.summary) == str(rows.summary)
        again.weights = rows.weights = (1.0, 2.0)
        assert again.fingerprint() == rows.fingerprint() != rows.unweighted
        rows.weights = ()
    assert set(rows.summary.first_dropped) == {"malformed", "overlong", "completion_overlong"}
    moved = read_rows(path, ["x/a.jsonl", "y/b.jsonl"], verify=False)
    assert moved.place(len(moved) - 1).startswith("y/b.jsonl:")
    assert moved.summary.first_dropped["malformed"].startswith("x/a.jsonl:15: columns ['question']")
    with safe_open(path, "np") as library:
        assert sorted(library.keys()) == sorted(RowArrays._fields)
        assert np.array_equal(library.get_tensor("tokens"), rows.arrays.tokens)


def test_every_damage_is_found(rows: RowDataset, tmp_path: Path) -> None:
    path, paths = tmp_path / "key.safetensors", paths_of(tmp_path)
    write_rows(path, rows, paths)
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        for verify in (True, False):
            with pytest.raises(DamagedRowsError):
                read_rows(path, paths, verify=verify)
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedRowsError, match="bytes, and"):
        read_rows(path, paths, verify=False)
    generator = np.random.default_rng(1)
    found = 0
    for place in [8, 60, *generator.integers(8, len(whole), 60).tolist()]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << int(generator.integers(8))]) + whole[place + 1 :])
        try:
            again = read_rows(path, paths, verify=True)
        except DamagedRowsError:
            found += 1
        else:
            assert equal(again, rows), "a blank after the header, or its like"
    assert found > 55


def test_a_file_is_written_once(rows: RowDataset, tmp_path: Path) -> None:
    path, paths = tmp_path / "key.safetensors", paths_of(tmp_path)
    write_rows(path, rows, paths)
    first = path.stat()
    write_rows(path, rows, paths)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_a_file_system_without_links(
    number: int, rows: RowDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    write_rows(tmp_path / "key.safetensors", rows, paths_of(tmp_path))
    assert equal(read_rows(tmp_path / "key.safetensors", paths_of(tmp_path), verify=True), rows)


def test_a_full_disk_leaves_nothing(rows: RowDataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    (tmp_path / "cache").mkdir()
    with pytest.raises(OSError, match="No space left"):
        write_rows(tmp_path / "cache/key.safetensors", rows, paths_of(tmp_path))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_writer_left_is_removed_after_a_day(rows: RowDataset, tmp_path: Path) -> None:
    old, new = tmp_path / ".a.host.1.2.unfinished", tmp_path / ".b.host.1.2.unfinished"
    for file, age_s in ((old, 25 * 3600), (new, 3600)):
        file.write_bytes(b"?")
        os.utime(file, (time.time() - age_s,) * 2)
    write_rows(tmp_path / "key.safetensors", rows, paths_of(tmp_path))
    assert (old.exists(), new.exists()) == (False, True)


def anonymous_bytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def test_a_file_is_mapped_and_not_copied(tmp_path: Path) -> None:
    number, length = 1000, 16_000
    tokens = np.arange(number * length, dtype=np.int32) % 1000
    borders = np.arange(2 * number + 1, dtype=np.int64) * (length // 2)
    places = np.stack([np.zeros(number, np.int64), np.arange(1, number + 1)], axis=1).reshape(-1)
    none, zeros = np.full(number, -1, np.int32), np.zeros(number + 1, np.int64)
    arrays = RowArrays(borders, places, zeros, tokens, np.array([], np.int32), none, np.zeros(number, np.int8))
    path = tmp_path / "key.safetensors"
    write_rows(path, RowDataset(["d.jsonl"], arrays, (), RowSummary(num_read=number, num_used=number)), ["d.jsonl"])
    del tokens, arrays
    before = anonymous_bytes()
    rows = read_rows(path, ["d.jsonl"], verify=True)
    assert rows.max_token_id == 999, "all of it was read"
    assert rows[number - 1].num_tokens == length
    assert rows.longest == length
    assert anonymous_bytes() - before < path.stat().st_size / 4
    assert not rows.arrays.tokens.flags.writeable
    assert str(path) in Path("/proc/self/maps").read_text()


# --- the name


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "d.jsonl", 20)


POLICY = RowPolicy(48)


def key(*paths: Path, tokenizer: Any = None, policy: RowPolicy = POLICY) -> str:
    return rows_key([read_content(path) for path in paths], tokenizer or chat_tokenizer(), policy)


def test_the_name_is_the_same_wherever_the_same_data_lie(data: Path, tmp_path: Path) -> None:
    first = key(data)
    os.utime(data, (1, 1))
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(data, tmp_path / "elsewhere/other.jsonl")
    assert first == key(data) == key(tmp_path / "elsewhere/other.jsonl")
    chat_tokenizer().save_pretrained(tmp_path / "tokenizer")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "moved")
    one, other = (load_tokenizer(tmp_path / name) for name in ("tokenizer", "moved"))
    other("truncated before", truncation=True, max_length=2, padding="max_length")  # state that no call here sees
    assert key(data, tokenizer=one) == key(data, tokenizer=other)


def test_the_name_tells_apart_what_gives_other_rows(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.jsonl"
    shutil.copy(data, copy)
    keys = {"first": key(data), "two": key(data, copy)}
    then = data.stat()
    data.write_bytes(data.read_bytes().replace(b"Hello", b"Jello", 1))
    os.utime(data, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert (data.stat().st_size, data.stat().st_mtime_ns) == (then.st_size, then.st_mtime_ns)
    keys |= {"changed in place": key(data), "order": key(data, copy), "other order": key(copy, data)}
    for name, tokenizer in TOKENIZERS.items():
        if name != "chatml":
            keys[name] = key(data, tokenizer=tokenizer())
    keys["special token"] = key(data, tokenizer=chat_tokenizer(extra=("<new>",)))
    keys["template"] = key(data, tokenizer=chat_tokenizer(CHATML + " "))
    images = ImageTokens("llava", 5, (), (), 4, None, "{}")
    changes: list[dict[str, Any]] = [
        *(dict(maker=RowMaker((Plugin("p.py", source),))) for source in ("a", "b")),
        *(dict(images=images), dict(images=images, teacher_images=replace(images, per_tile=2))),
        *(dict(max_length=49), dict(max_completion_length=8), dict(on_bad_row="skip"), dict(overlong="stop")),
        *(dict(max_rows=7), dict(tag_key="tag"), dict(loss_scale="all"), dict(one_row=True), dict(prompt_only="drop")),
        *(dict(template_kwargs=f'{{"v": {value}}}') for value in ("true", '{"a": 1, "b": 2}', '{"b": 2, "a": 1}')),
    ]
    assert {name for change in changes for name in change} == set(RowPolicy.__dataclass_fields__) - {"clock"}
    keys |= {str(change): key(data, policy=replace(POLICY, **change)) for change in changes}
    parquet = tmp_path / "d.parquet"
    shutil.copy(data, parquet)
    keys["kind"] = rows_key([read_content(parquet)], chat_tokenizer(), POLICY)
    monkeypatch.setattr(row_key, "_code_digest", lambda: "another version")
    keys["code"] = key(data)
    assert len(set(keys.values())) == len(keys), sorted(keys.items(), key=lambda item: item[1])


def test_a_template_that_writes_the_date_is_tokenised_again_the_next_day(data: Path) -> None:
    """And not in the same day, nor with a template that writes none."""
    dated, timed = (chat_tokenizer(f"{{{{ strftime_now({what}) }}}}{CHATML}") for what in ("'%d %b %Y'", "'%' ~ 'd'"))
    policies = [
        replace(POLICY, clock=Clock(time))
        for time in ("2026-11-27T09:00:00", "2026-11-27T23:59:59", "2026-11-28T09:00:00")
    ]
    for tokenizer, different in ((dated, 2), (timed, 3), (chat_tokenizer(), 1)):
        assert len({key(data, tokenizer=tokenizer, policy=policy) for policy in policies}) == different
    assert key(data) == key(data, policy=policies[0])


def test_content_counts_records(tmp_path: Path) -> None:
    records = [{"prompt": "a"}] * 7
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(record) for record in records))  # the last without its end
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "d.parquet", row_group_size=3)
    saved = write_saved(tmp_path / "saved", records, files=2, batch_rows=2)
    for path in (tmp_path / "d.jsonl", tmp_path / "d.parquet", saved):
        assert read_content(path).num_records == 7, path
    (file, *_) = sorted(saved.glob("*.arrow"))
    before = read_content(saved).digest
    file.write_bytes(file.read_bytes().replace(b"a", b"b", 1))
    assert read_content(saved).digest != before
    with pytest.raises(DataError, match="there is no such file"):
        read_content(tmp_path / "none.jsonl")


def test_the_fingerprint_is_the_hash_of_the_bytes(rows: RowDataset) -> None:
    """As arrays of the standard library gave it."""
    digest = hashlib.sha256()
    a = rows.arrays
    for code, numbers in zip(
        "iqbiqi", (a.tokens, a.borders, a.prompt_only, a.teacher_tokens, a.teacher_borders, a.tag_index), strict=True
    ):
        digest.update(len(numbers).to_bytes(8, "little") + array(code, numbers.tolist()).tobytes())
    digest.update("".join(map(repr, rows.tags)).encode())
    assert rows.fingerprint() == digest.hexdigest()[:16]
    assert row_file._checksum("", a) != row_file._checksum(" ", a)


def test_a_plain_tokenizer_has_a_name_too(data: Path) -> None:
    assert key(data, tokenizer=plain_tokenizer()) == key(data, tokenizer=plain_tokenizer())
