"""Names of ModelScope through its own client, against a loopback server; left out where that client is not installed.

Does not cover: the public hub; private repositories.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_gkd.config.hub_names import HubName, Kind, read_name
from megatron_gkd.data.hub import modelscope
from megatron_gkd.data.hub.rows import fetch_rows
from megatron_gkd.data.hub.snapshot import fetch, look_up
from megatron_gkd.errors import ConfigError
from tests.support.modelscope_server import ModelScopeServer

WEIGHTS = bytes(range(256)) * 40
NAMES = ("config.json", "model.safetensors")


def name(text: str, kind: Kind = "model") -> HubName:
    found = read_name(text, kind)
    assert found is not None
    return found


def test_without_the_client_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modelscope, "is_installed", lambda: False)
    with pytest.raises(ConfigError, match=r"MS::O/N is a name of ModelScope, whose client is not installed: "):
        look_up(name("MS::O/N"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScopeServer]:
    pytest.importorskip("modelscope_hub")
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    model, rows = tmp_path / "model", tmp_path / "rows"
    for directory in (model, rows):
        directory.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(WEIGHTS)
    (model / "modeling.py").write_text("raise SystemExit")
    (rows / "train.jsonl").write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(9)))
    with ModelScopeServer({"model/Org/Tiny": model, "dataset/Org/Rows": rows}) as server:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", server.url)
        monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "client"))
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield server


def test_what_is_named_arrives_and_a_pin_asks_for_nothing(hub: ModelScopeServer) -> None:
    listing = look_up(name("MS::Org/Tiny"))
    path = fetch(listing, NAMES, shows=False)
    assert (path / "model.safetensors").read_bytes() == WEIGHTS
    assert sorted(file.name for file in path.iterdir() if not file.name.startswith(".")) == sorted(NAMES)
    assert look_up(name("MS::Org/Tiny")).commit == listing.commit
    hub.log.clear()
    assert fetch(look_up(name("MS::Org/Tiny"), listing.commit), NAMES, shows=False) == path
    assert hub.log == []


def test_rows_are_drawn(hub: ModelScopeServer) -> None:
    asked = name("MS::Org/Rows#4", "dataset")
    found = fetch_rows(asked, look_up(asked), seed=1, shows=False)
    assert len(found.path.read_text().splitlines()) == 4


def test_a_branch_that_moved_is_named_where_the_earlier_files_are_gone(
    hub: ModelScopeServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    listing = look_up(name("MS::Org/Tiny"))
    path = fetch(listing, NAMES, shows=False)
    (hub.repos["model/Org/Tiny"] / "config.json").write_text('{"new": 1}')
    assert look_up(name("MS::Org/Tiny")).commit != listing.commit
    assert fetch(look_up(name("MS::Org/Tiny"), listing.commit), NAMES, shows=False) == path
    monkeypatch.setenv("HF_HOME", str(tmp_path / "another"))
    with pytest.raises(ConfigError, match=r"MS::Org/Tiny has changed on ModelScope since the run began with it"):
        look_up(name("MS::Org/Tiny"), listing.commit)


def test_damage_and_names_that_are_not_there(hub: ModelScopeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        ConfigError, match=r"ModelScope has no model Org/None, or does not show it .*or write HF::Org/None"
    ):
        look_up(name("MS::Org/None"))
    hub.flip.add("model.safetensors")
    with pytest.raises(ConfigError, match=r"Org/Tiny could not be fetched from ModelScope \(FileDownloadError"):
        fetch(look_up(name("MS::Org/Tiny")), NAMES, shows=False)
    hub.flip.clear()
    assert (fetch(look_up(name("MS::Org/Tiny")), NAMES, shows=False) / "model.safetensors").read_bytes() == WEIGHTS
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    fetch(look_up(name("MS::Org/Tiny")), NAMES, shows=False)
    with pytest.raises(ConfigError, match=r"HF_HUB_OFFLINE forbids asking ModelScope"):
        look_up(name("MS::Org/None"))
