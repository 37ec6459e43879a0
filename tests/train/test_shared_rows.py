"""Ranks that share one file of tokenised rows: who tokenises, who maps, and what happens when something is wrong.

The file and its name by themselves: tests/data/test_row_file.py. Ranks here are of one machine; a second machine is a
second directory.
"""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gkd.data import rows as rows_module
from megatron_gkd.data.policy import RowPolicy
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.train import shared_rows as module
from megatron_gkd.train.shared_rows import find_directory, shared_rows
from tests.support.checkpoints import tiny_tokenizer
from tests.support.corpus import write_corpus
from tests.support.ranks import one_rank_group
from tests.support.ranks import run_ranks as run_on_ranks

POLICY = RowPolicy(200, on_bad_row="skip", tag_key="tag")


def run_ranks(fn: Callable[..., Any], *args: Any, world: int) -> list[Any]:
    """With time for the first import of transformers on a busy machine."""
    return run_on_ranks(fn, *args, world=world, timeout_s=240)


def start(
    paths: list[str],
    cache_dir: str | None,
    *,
    policy: RowPolicy = POLICY,
    alone: bool = False,
    prepare: Callable[[pytest.MonkeyPatch], None] | None = None,
) -> dict[str, Any]:
    """One start of a run on this rank: what it has, and what it did for it."""
    tokenised: list[int] = []
    messages: list[str] = []
    real = rows_module.tokenise

    def counted(*args: Any, **kwargs: Any) -> Any:
        tokenised.append(dist.get_rank())
        return real(*args, **kwargs)

    handler = logging.Handler()
    handler.emit = lambda record: messages.append(f"{record.levelname} {record.getMessage()}")  # type: ignore[method-assign]
    logger = logging.getLogger("megatron_gkd")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    found: dict[str, Any] = {"error": None, "rows": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "tokenise", counted)
        if prepare is not None:
            prepare(patch)
        try:
            group = one_rank_group() if alone else dist.group.WORLD
            assert group is not None
            rows = shared_rows(paths, tiny_tokenizer(), policy, cache_dir=cache_dir, group=group)
            maps = Path("/proc/self/maps").read_text()
            found["rows"] = [(rows[i], rows.place(i)) for i in range(len(rows))], str(rows.summary), rows.fingerprint()
            found["mapped"] = any(str(file) in maps for file in copies(cache_dir))
        except Exception as error:
            found["error"] = type(error), str(error)
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
    return {**found, "tokenised": len(tokenised), "messages": messages}


def copies(cache_dir: str | None) -> list[Path]:
    return [] if cache_dir in (None, "none") else sorted(Path(str(cache_dir)).glob("*.safetensors"))


def of(results: list[dict[str, Any]], name: str) -> list[Any]:
    return [result[name] for result in results]


@pytest.fixture
def data(tmp_path: Path) -> str:
    return str(write_corpus(tmp_path / "d.jsonl", 60))


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache")


def in_memory(data: str) -> Any:
    rows = rows_module.tokenise([data], tiny_tokenizer(), POLICY)
    return [(rows[i], rows.place(i)) for i in range(len(rows))], str(rows.summary), rows.fingerprint()


def test_one_rank_tokenises_and_all_map(data: str, cache: str) -> None:
    wanted = in_memory(data)
    first = run_ranks(start, [data], cache, world=4)
    assert of(first, "tokenised") == [1, 0, 0, 0]
    assert of(first, "rows") == [wanted] * 4
    assert of(first, "mapped") == [True] * 4
    (file,) = copies(cache)
    assert os.listdir(cache) == [file.name]
    assert any("tokenised in" in text and str(file) in text for text in first[0]["messages"])
    second = run_ranks(start, [data], cache, world=2)
    assert of(second, "tokenised") == [0, 0]
    assert of(second, "rows") == [wanted] * 2
    assert second[0]["messages"] == [f"INFO {data}: {len(wanted[0])} rows, tokenised by an earlier start, from {file}"]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b""])
def test_a_damaged_file_is_made_again(damage: Callable[[bytes], bytes], data: str, cache: str) -> None:
    wanted = in_memory(data)
    made, _ = run_ranks(start, [data], cache, world=2)
    (file,) = copies(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    again = run_ranks(start, [data], cache, world=2)
    assert of(again, "tokenised") == [1, 0]
    assert of(again, "rows") == [wanted] * 2 == [made["rows"]] * 2
    assert any(text.startswith("WARNING") and "is damaged" in text for text in again[0]["messages"])
    assert file.read_bytes() == whole


def test_a_file_that_changed_with_its_size_and_times_is_tokenised_again(data: str, cache: str) -> None:
    run_ranks(start, [data], cache, world=2)
    then = os.stat(data)
    content = Path(data).read_bytes()
    Path(data).write_bytes(content.replace(b"Hello", b"Jello"))
    os.utime(data, ns=(then.st_atime_ns, then.st_mtime_ns))
    wanted = in_memory(data)
    changed = run_ranks(start, [data], cache, world=2)
    assert of(changed, "tokenised") == [1, 0]
    assert of(changed, "rows") == [wanted] * 2
    assert len(copies(cache)) == 2


def changes_while_tokenised(patch: pytest.MonkeyPatch) -> None:
    tokenise = module.tokenise

    def slow(paths: list[str], *args: Any, **kwargs: Any) -> Any:
        rows = tokenise(paths, *args, **kwargs)
        with open(paths[0], "a") as file:
            file.write('{"prompt": "one more"}\n')
        return rows

    patch.setattr(module, "tokenise", slow)


def test_a_file_that_changes_while_it_is_tokenised_stops_every_rank(data: str, cache: str) -> None:
    results = run_ranks(start_with_changes, data, cache, world=2)
    text = f"{data} changed while it was tokenised; start again when it is complete"
    assert of(results, "error") == [(DataError, text)] * 2
    assert copies(cache) == []


def start_with_changes(data: str, cache: str) -> dict[str, Any]:
    return start([data], cache, prepare=changes_while_tokenised)


def test_a_bad_row_stops_every_rank_with_one_message(data: str, cache: str) -> None:
    policy = RowPolicy(200)
    first, second = of(run_ranks(start_on, [data], cache, policy, world=2), "error")
    assert first == second
    assert first[0] is DataError
    assert first[1].startswith(f"{data}:15: columns ['question'] are not a known form")
    assert first[1].endswith("correct the row, or pass --on_bad_row skip")
    assert copies(cache) == []
    missing = of(run_ranks(start_on, [data + ".jsonl"], cache, policy, world=2), "error")
    assert missing[0] == missing[1]
    assert "there is no such file" in missing[0][1]


def start_on(paths: list[str], cache: str, policy: RowPolicy) -> dict[str, Any]:
    return start(paths, cache, policy=policy)


def test_without_a_directory_every_rank_tokenises(data: str) -> None:
    results = run_ranks(start, [data], "none", world=2)
    assert of(results, "tokenised") == [1, 1]
    assert of(results, "rows") == [in_memory(data)] * 2
    assert of(results, "messages") == [[], []]


def test_a_directory_that_was_asked_for_must_be_writable(data: str, tmp_path: Path) -> None:
    """Below a file, since tests may run as a user who may write anywhere."""
    (tmp_path / "file").write_text("")
    results = run_ranks(start, [data], str(tmp_path / "file/below"), world=2)
    assert of(results, "tokenised") == [0, 0]
    text = (
        f"--data_cache_dir {tmp_path}/file/below (or GKD_DATA_CACHE_DIR) cannot be written: Not a directory; give "
        "another directory, or none: every rank then tokenises the data"
    )
    assert of(results, "error") == [(ConfigError, text)] * 2


def start_by_default(data: str, home: str) -> dict[str, Any]:
    os.environ.pop("GKD_DATA_CACHE_DIR", None)
    os.environ["HF_HOME"] = home  # a call of run_ranks gives every rank its environment anew
    return start([data], None)


def test_a_default_directory_that_cannot_be_written_is_a_warning(data: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = run_ranks(start_by_default, data, str(tmp_path / "file/below"), world=2)
    assert of(results, "tokenised") == [1, 1]
    assert of(results, "rows") == [in_memory(data)] * 2
    (warning,) = results[0]["messages"]
    place = tmp_path / "file/below/megatron_gkd"
    assert warning.startswith(f"WARNING {data}: the tokenised rows cannot be kept in {place} (Not a directory)")
    assert "every rank of this machine tokenises for itself" in warning
    assert results[1]["messages"] == [], "one rank says it"


def disk_is_full(patch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(module, "write_rows", full)


def start_on_a_full_disk(data: str, cache: str) -> dict[str, Any]:
    return start([data], cache, prepare=disk_is_full)


def test_a_disk_that_is_full_at_the_end_loses_no_work(data: str, cache: str) -> None:
    results = run_ranks(start_on_a_full_disk, data, cache, world=2)
    assert of(results, "tokenised") == [1, 1]
    assert of(results, "rows") == [in_memory(data)] * 2
    (warning,) = results[0]["messages"]
    assert "No space left on device" in warning


def start_alone(data: str, cache: str) -> dict[str, Any]:
    return start([data], cache, alone=True)


def test_two_runs_that_start_at_once(data: str, cache: str) -> None:
    """Four runs of one rank each, with nothing that orders them."""
    wanted = in_memory(data)
    results = run_ranks(start_alone, data, cache, world=4)
    assert of(results, "error") == [None] * 4
    assert of(results, "rows") == [wanted] * 4
    assert of(results, "mapped") == [True] * 4
    assert len(os.listdir(cache)) == 1


def start_on_two_machines(root: str) -> dict[str, Any]:
    """Every rank has the data and the directory under the same names, as machines have that share nothing."""
    os.chdir(f"{root}/{dist.get_rank()}")
    try:
        return start(["d.jsonl"], "cache")
    finally:
        os.chdir(root)


def test_each_machine_tokenises_and_their_rows_must_agree(tmp_path: Path) -> None:
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
        write_corpus(tmp_path / str(rank) / "d.jsonl", 40)
    results = run_ranks(start_on_two_machines, str(tmp_path), world=2)
    assert of(results, "tokenised") == [1, 1]
    assert results[0]["rows"] == results[1]["rows"] is not None
    write_corpus(tmp_path / "1/d.jsonl", 41)
    with open(tmp_path / "1/d.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "more"}) + "\n")
    results = run_ranks(start_on_two_machines, str(tmp_path), world=2)
    assert [error[0] for error in of(results, "error")] == [DataError] * 2
    assert of(results, "error")[0] == of(results, "error")[1]
    assert "d.jsonl: rank 1 has other rows than rank 0" in results[0]["error"][1]


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GKD_DATA_CACHE_DIR", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def place(given: str | None) -> Any:
        found = find_directory(given)
        return None if found is None else (str(found.path), found.asked)

    assert place(None) == (str(Path.home() / ".cache/huggingface/megatron_gkd"), False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert place(None) == ("/x/huggingface/megatron_gkd", False)
    monkeypatch.setenv("HF_HOME", "/h")
    assert place(None) == ("/h/megatron_gkd", False)
    monkeypatch.setenv("GKD_DATA_CACHE_DIR", "/g")
    assert place(None) == ("/g", True)
    assert place("~/c") == (str(Path.home() / "c"), True)
    assert place("none") is None
    monkeypatch.setenv("GKD_DATA_CACHE_DIR", "none")
    assert place(None) is None
