"""The directory of checkpoints, without ranks: what counts as complete, what the manifest finds, what is removed when.

Interruptions are played by an error in the middle of the operation. Not covered: loss of power (that fsync reaches the
disk), other file systems.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from megatron_gkd.errors import CheckpointError
from megatron_gkd.train.checkpoint import files


def write(root: Path, step: int, **contents: bytes) -> Path:
    """Save a checkpoint as train/checkpoint/saving.py does."""
    directory = files.writing_path(root, step)
    directory.mkdir(parents=True)
    for name, content in (contents or {"shard": b"weights %d" % step}).items():
        (directory / name).write_bytes(content)
    files.write_manifest(directory, {path.name: files.hash_file(path) for path in directory.iterdir()})
    final = files.checkpoint_path(root, step)
    files.publish(directory, final)
    return final


def steps(root: Path) -> list[int]:
    return [files.step_of(path) for path in files.complete_checkpoints(root)]


def damage(checkpoint: Path, *, read: bool = True) -> str | None:
    return files.find_damage(checkpoint, files.read_manifest(checkpoint), read=read)


def test_a_published_checkpoint_is_whole_and_the_pointer_names_it(tmp_path: Path) -> None:
    for step in (9, 10, 100_000_000):
        checkpoint = write(tmp_path, step)
        assert damage(checkpoint) is None
        assert (tmp_path / "latest").read_text() == checkpoint.name
    assert steps(tmp_path) == [9, 10, 100_000_000]
    assert not list(tmp_path.glob(".*"))


def test_every_kind_of_damage_is_found_and_named(tmp_path: Path) -> None:
    original = write(tmp_path, 1, shard=b"0123456789", state=b"{}")
    for name, change, message, by_size in (
        ("missing", lambda p: p.unlink(), "shard cannot be read .No such file", True),
        ("short", lambda p: p.write_bytes(b"012345678"), "shard has 9 bytes, its manifest says 10", True),
        ("long", lambda p: p.write_bytes(b"01234567890"), "shard has 11 bytes", True),
        ("changed", lambda p: p.write_bytes(b"0123456788"), "shard has changed since it was written", False),
        ("a directory", lambda p: (p.unlink(), p.mkdir()), "shard has", True),
    ):
        copy = tmp_path / name
        shutil.copytree(original, copy)
        change(copy / "shard")
        found = damage(copy)
        assert found is not None
        assert re.search(message, found), found
        assert (damage(copy, read=False) is not None) == by_size


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", '{"version": 1}', '{"version": 2, "files": {}}', '{"version": 1, "files": {"a": {}}}'),
        *('{"version": 1, "files": []}', '{"version": 1, "files": {"../a": {"bytes": 1, "sha256": ""}}}'),
        *('{"version": 1, "files": {"a": {"bytes": "x", "sha256": ""}}}', '{"version": 1, "files": {"a": null}}'),
    ],
)
def test_a_damaged_manifest_is_an_error(tmp_path: Path, text: str) -> None:
    checkpoint = write(tmp_path, 1)
    (checkpoint / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing or damaged"):
        files.read_manifest(checkpoint)


def test_shares_are_even_and_complete() -> None:
    entries = {f"f{i}": files.Entry(size, "") for i, size in enumerate([100, 1, 1, 50, 49, 0, 3])}
    parts = files.shares(entries, 3)
    assert sorted(name for part in parts for name in part) == sorted(entries)
    assert [sum(entry.num_bytes for entry in part.values()) for part in parts] == [100, 52, 52]
    assert files.shares({}, 2) == [{}, {}]


def test_the_newest_complete_one_is_never_deleted(tmp_path: Path) -> None:
    for step in range(1, 6):
        write(tmp_path, step)
    (tmp_path / "step_00000009").mkdir()  # torn: no manifest; it does not count as one that is kept
    files.keep_newest(tmp_path, None)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    files.keep_newest(tmp_path, 2)
    assert steps(tmp_path) == [4, 5]
    files.keep_newest(tmp_path, 1)
    assert steps(tmp_path) == [5]


def test_an_interrupted_deletion_leaves_nothing_that_looks_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write(tmp_path, step)

    def stop(path: Path) -> None:
        os.unlink(path / "shard")
        raise OSError("interrupted")

    monkeypatch.setattr(files.shutil, "rmtree", stop)
    with pytest.raises(OSError, match="interrupted"):
        files.keep_newest(tmp_path, 1)
    monkeypatch.undo()
    assert steps(tmp_path) == [2]
    assert files.checkpoints(tmp_path) == files.complete_checkpoints(tmp_path)
    files.remove_unfinished(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000002"]


@pytest.mark.parametrize("stage", ["manifest", "rename", "pointer"])
def test_an_interrupted_save_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Or, once it is renamed, itself: then only the pointer is behind."""
    write(tmp_path, 1)
    original = Path.rename

    def stop(self: Path, target: Path) -> Path:
        name = {"manifest": "manifest.json", "rename": "step_00000002", "pointer": "latest"}[stage]
        if Path(target).name == name:
            raise OSError("interrupted")
        return original(self, target)

    monkeypatch.setattr(Path, "rename", stop)
    with pytest.raises(OSError, match="interrupted"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert steps(tmp_path) == ([1, 2] if stage == "pointer" else [1])
    assert all(damage(checkpoint) is None for checkpoint in files.complete_checkpoints(tmp_path))
    files.remove_unfinished(tmp_path)
    write(tmp_path, 2 if stage != "pointer" else 3)
    assert (tmp_path / "latest").read_text() == files.complete_checkpoints(tmp_path)[-1].name


def test_a_run_that_goes_on_from_before_sets_later_ones_aside(tmp_path: Path) -> None:
    """Hidden, not deleted, until a limit lets them go when the next one is on disk."""
    for step in (1, 2, 3):
        write(tmp_path, step)
    (tmp_path / "step_00000007").mkdir()
    assert [path.name for path in files.set_aside_after(tmp_path, 1)] == [
        *(".replaced_step_00000002_0", ".replaced_step_00000003_0", ".replaced_step_00000007_0")
    ]
    assert steps(tmp_path) == [1]
    write(tmp_path, 2)
    files.set_aside_after(tmp_path, 1)
    assert (tmp_path / ".replaced_step_00000002_1" / "shard").exists()
    write(tmp_path, 4)
    files.keep_newest(tmp_path, None)
    assert len(list(tmp_path.glob(".replaced_*"))) == 4
    files.keep_newest(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001", "step_00000004"]


def test_a_checkpoint_of_another_run_is_neither_replaced_nor_set_aside(tmp_path: Path) -> None:
    live = write(tmp_path, 5, shard=b"theirs")
    with pytest.raises(CheckpointError, match="step_00000005 is there already, and this run did not write it"):
        write(tmp_path, 5, shard=b"ours")
    assert damage(live) is None
    assert (live / "shard").read_bytes() == b"theirs"
    assert not list(tmp_path.glob(".replaced_*"))


def test_writing_durably_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_durably(path, "a" * 100)
    files.write_durably(path, b"b")
    assert path.read_bytes() == b"b"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be written .Not a directory.*give another --save"):
        files.check_writable(tmp_path / "file" / "checkpoints")
    files.check_writable(tmp_path / "a" / "checkpoints")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "nothing is left"
    (tmp_path / "a").mkdir()
    if os.getuid() != 0:
        (tmp_path / "a").chmod(0o500)
        with pytest.raises(CheckpointError, match="Permission denied"):
            files.check_writable(tmp_path / "a" / "other")


def test_a_full_disk_says_what_is_free(tmp_path: Path) -> None:
    text = files.describe_failure(OSError(28, "No space left on device"), tmp_path)
    assert text.startswith("the disk is full, or a quota is used up (OSError: [Errno 28] No space left on device), ")
    assert text.endswith("GB are free there: make room, or give --save_total_limit")
    of_torch = RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 704 vs 598")
    assert "the disk is full" in files.describe_failure(of_torch, tmp_path)
    assert "this rank's part of the checkpoint needs 12.5 GB" in files.describe_failure(
        of_torch, tmp_path, 12_500_000_000
    )
    assert files.describe_failure(ValueError("x"), tmp_path) == "ValueError: x"


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    """For sha256sum and other programs."""
    content = json.loads((write(tmp_path, 1, a=b"abc") / "manifest.json").read_text())
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content == {"version": 1, "files": {"a": {"bytes": 3, "sha256": digest}}}
