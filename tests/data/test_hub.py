"""Files of a hub against a loopback server: what is asked, what arrives, what is noticed.

Does not cover: ranks (tests/train/test_hub_files.py), the public hub, private repositories with a token.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gkd.config.hub_names import HubName, read_name
from megatron_gkd.data.hub.listing import Listing, kept_listing, verified_files
from megatron_gkd.data.hub.snapshot import fetch, look_up
from megatron_gkd.errors import ConfigError
from tests.support.hub_server import HubServer

WEIGHTS = bytes(range(256)) * 40
NAMES = ("config.json", "model.safetensors")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    root = tmp_path / "repository"
    (root / "data").mkdir(parents=True)
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(WEIGHTS)
    (root / "modeling.py").write_text("raise SystemExit")
    (root / "data" / "[a]*.json").write_text("[]")
    return root


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with HubServer({"model/Org/Tiny": repository}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield server


def name(text: str = "Org/Tiny") -> HubName:
    found = read_name(text, "model")
    assert found is not None
    return found


def get(names: tuple[str, ...] = NAMES, pin: str | None = None) -> Path:
    return fetch(look_up(name(), pin), names, shows=False)


def test_what_is_named_arrives_and_nothing_else(hub: HubServer, repository: Path) -> None:
    path = get((*NAMES, "data/[a]*.json"))
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()) == [
        *("config.json", "data/[a]*.json", "model.safetensors")
    ]
    assert path.name == hub.commit("model/Org/Tiny")
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(hub.fetched()) == ["config.json", "data/[a]*.json", "model.safetensors"]


def test_a_second_start_asks_for_the_revision_alone_and_a_pinned_one_for_nothing(hub: HubServer) -> None:
    path = get()
    hub.log.clear()
    assert get() == path
    assert [(method, part) for method, part, _ in hub.log] == [("GET", "/api/models/Org/Tiny")]
    hub.log.clear()
    assert get(pin=path.name) == path
    assert fetch(look_up(name(f"Org/Tiny@{path.name}")), NAMES) == path
    assert hub.log == []


def test_a_pin_keeps_the_commit_when_the_branch_moves(hub: HubServer, repository: Path) -> None:
    path = get()
    (repository / "config.json").write_text('{"new": 1}')
    assert get() != path
    assert get(pin=path.name) == path
    assert (path / "config.json").read_text() == "{}"


def test_offline_takes_what_was_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = get(("config.json",))
    hub.log.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get(("config.json",)) == path
    with pytest.raises(ConfigError, match=r"model\.safetensors is not \(whole\) in .*HF_HUB_OFFLINE forbids fetching"):
        get()
    with pytest.raises(ConfigError, match=r"Org/Other is not in .*, and HF_HUB_OFFLINE forbids asking Hugging Face's"):
        look_up(name("Org/Other"))
    assert hub.log == []


def test_offline_takes_what_another_program_fetched(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compared with the hashes that the hub's client names its blobs by."""
    from huggingface_hub import snapshot_download

    home = Path(os.environ["HF_HOME"])
    path = Path(snapshot_download("Org/Tiny", cache_dir=home / "hub", endpoint=hub.url))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get() == path
    other = home.parent / "other"
    home.rename(other)
    monkeypatch.setenv("HF_HOME", str(other))
    (other / "megatron_gkd").rename(other / "away")
    blob = (other / "hub/models--Org--Tiny/snapshots" / path.name / "model.safetensors").resolve()
    blob.write_bytes(WEIGHTS[:-1] + b"x")
    with pytest.raises(ConfigError, match=r"model.safetensors is not"):
        get()


def test_a_connection_that_breaks_goes_on(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    hub.cut["model.safetensors"] = 5000
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS
    assert "bytes=4096-" in [part for _, path, part in hub.log if path.endswith("model.safetensors")]


def test_a_start_that_failed_goes_on_with_the_files_that_are_missing(hub: HubServer) -> None:
    hub.status["model.safetensors"] = 404
    with pytest.raises(
        ConfigError,
        match=r"Org/Tiny at revision .*, which is not a path here, could not be fetched .*what has arrived is kept",
    ):
        get()
    hub.status.clear()
    hub.log.clear()
    get()
    assert hub.fetched() == ["model.safetensors"]


def test_what_a_killed_process_left_is_removed_after_a_day(hub: HubServer) -> None:
    blobs = get(("config.json",)).parent.parent / "blobs"
    for file, age_s in (("old.incomplete", 2e5), ("new.incomplete", 0.0)):
        (blobs / file).write_text("x")
        os.utime(blobs / file, (time.time() - age_s,) * 2)
    get()
    assert [path.name for path in blobs.glob("*.incomplete")] == ["new.incomplete"]


def test_a_byte_that_changes_on_the_way_is_noticed_and_fetched_again(
    hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    hub.flip["model.safetensors"] = 1
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.fetched().count("model.safetensors") == 2


def test_a_file_that_arrives_damaged_twice_is_an_error_and_not_taken_later(hub: HubServer) -> None:
    hub.flip["model.safetensors"] = 2
    with pytest.raises(ConfigError, match=r"model.safetensors in .* is not what the hub lists, twice"):
        get()
    assert (get() / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("change", ["cut", "gone"])
def test_a_file_that_is_no_longer_whole_is_fetched_again(hub: HubServer, change: str) -> None:
    path = get()
    blob = (path / "model.safetensors").resolve()
    blob.write_bytes(WEIGHTS[:100]) if change == "cut" else blob.unlink()
    hub.log.clear()
    assert (get(pin=path.name) / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.fetched() == ["model.safetensors"]


def test_a_file_is_compared_once(hub: HubServer) -> None:
    """So a start costs no reading of 140 GB; a change on the disk that keeps the size is the disk's matter."""
    path = get()
    listing = kept_listing("model", "Org/Tiny", path.name)
    assert isinstance(listing, Listing)
    assert verified_files(listing) == {*NAMES}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ("Org/None", "Hugging Face's hub has no model Org/None, or does not show it .*HF_TOKEN, or write MS::Org/None"),
        ("Org/Tiny@v7", "Hugging Face's hub has the model Org/Tiny, and no revision v7 of it"),
        ("Org/Gated", "gives the model Org/Gated only to those who have accepted its terms"),
    ],
)
def test_names_that_cannot_be_had(hub: HubServer, asked: str, message: str) -> None:
    hub.status["model/Org/Gated"] = 403
    with pytest.raises(ConfigError, match=message) as caught:
        look_up(name(asked))
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    path = get()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        ConfigError,
        match=r"Org/Tiny, which is not a path here, could not be fetched .*http://127.0.0.1:9; .*give a path",
    ):
        get()
    assert get(pin=path.name) == path


def test_a_disk_without_room(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_gkd.data.hub import snapshot

    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda _: _Usage)
    with pytest.raises(ConfigError, match=r"needs 0 MB, and .* has 0 MB left: make room, or set HF_HOME"):
        get()


class _Usage:
    free = 10
