"""A run whose models and data are named on a hub: one rank of a machine fetches, the commit is recorded and pinned.

Two ranks with caches of their own stand for two machines. Does not cover: the client's behaviour (tests/data/
test_hub.py); several machines on one file system.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_gkd import cli
from megatron_gkd.commands.convert import ConvertConfig
from megatron_gkd.config.checks import CheckDataConfig
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.sample import SampleConfig
from megatron_gkd.data.hub import modelscope
from megatron_gkd.errors import GKDError
from megatron_gkd.train import hub_files
from megatron_gkd.train.checkpoint.state import changed_flags
from megatron_gkd.train.hub_files import (
    Asked,
    asked_by,
    earlier_commits,
    with_hub_files,
    with_local_files,
    with_recorded_files,
)
from megatron_gkd.train.preflight import check_paths
from tests.support.hub_server import HubServer
from tests.support.ranks import run_ranks
from tests.support.runs import command_line, metrics, train
from tests.support.trainers import write_pair, write_rows

FLAGS: dict[str, Any] = dict(
    lmbda=0,
    global_batch_size=4,
    save_steps=1,
    report_to="none",
    device="cpu",
    health_steps=0,
    lr_decay_style="constant",
)
NAMES: dict[str, Any] = dict(model="Org/Student", teacher_model="Org/Teacher", dataset="Org/Rows#6")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    student, teacher = write_pair(root, "qwen3")
    (root / "rows").mkdir()
    write_rows(root / "rows" / "train.jsonl", 9)
    (Path(student) / "pytorch_model.bin").write_bytes(b"x" * 3000)
    (Path(student) / "modeling.py").write_text("raise SystemExit")
    return {"model/Org/Student": Path(student), "model/Org/Teacher": Path(teacher), "dataset/Org/Rows": root / "rows"}


@pytest.fixture
def hub(published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with HubServer(published) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        yield server


def found_here(argv: list[str], homes: list[str], hosts: list[str]) -> tuple[list[str], dict[str, Any]] | str:
    """What this rank has in place of names, or what it says. Args: homes, hosts: of the ranks."""
    rank, before = dist.get_rank(), {name: os.environ.get(name) for name in ("HF_HOME",)}
    name_of_host = socket.gethostname
    os.environ["HF_HOME"], socket.gethostname = homes[rank], lambda: hosts[rank]  # type: ignore[assignment]
    try:
        config = parse_run_config(argv, command="train")
        found = with_hub_files(config, asked_by(config))
        data = found.config.data
        return [found.config.model.model, str(found.config.teacher.teacher_model), *data.dataset], found.record
    except GKDError as error:
        return str(error)
    finally:
        socket.gethostname = name_of_host
        os.environ.update({name: value for name, value in before.items() if value is not None})


def test_one_rank_of_a_machine_fetches_and_only_what_is_needed(hub: HubServer, tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    one, other = run_ranks(found_here, command_line(**NAMES), [home] * 2, ["a", "a"], world=2)
    assert one == other
    (student, teacher, rows), record = one
    assert sorted(os.listdir(student)) == sorted(
        name for name in os.listdir(hub.repos["model/Org/Student"]) if name[-3:] not in ("bin", ".py")
    )
    assert (Path(student).name, Path(teacher).name) == tuple(
        hub.commit(f"model/Org/{n}") for n in ("Student", "Teacher")
    )
    assert hub.fetched().count("model.safetensors") == 2  # of two models
    assert len(Path(rows).read_text().splitlines()) == 6
    assert record["commits"]["hf/model/Org/Student@"] == Path(student).name
    assert record["data sets"]["Org/Rows#6"]["drawn"] == 6


@pytest.mark.parametrize("shared", [False, True], ids=["own caches", "one cache"])
def test_two_machines(hub: HubServer, tmp_path: Path, shared: bool) -> None:
    homes = [str(tmp_path / "home"), str(tmp_path / ("home" if shared else "other"))]
    one, other = run_ranks(found_here, command_line(**NAMES), homes, ["a", "b"], world=2)
    assert hub.fetched().count("model.safetensors") == (2 if shared else 4)
    for mine, its in zip(one[0], other[0], strict=True):
        assert Path(mine).exists()
        assert Path(its).exists()
        assert (mine == its) == shared
    assert all(one[1][key] == other[1][key] for key in ("commits", "data sets"))
    assert not list(Path(homes[0]).rglob(".mark-*"))


def test_a_name_that_is_not_there_is_said_alike_by_all(hub: HubServer, tmp_path: Path) -> None:
    argv = command_line(**{**NAMES, "teacher_model": "Org/None"})
    homes = [str(tmp_path / "home"), str(tmp_path / "other")]
    said = run_ranks(found_here, argv, homes, ["a", "b"], world=2)
    assert said[0] == said[1]
    assert said[0].startswith("Hugging Face's hub has no model Org/None")
    hub.status["model.safetensors"] = 404
    said = run_ranks(found_here, command_line(**NAMES), homes, ["a", "b"], world=2)
    assert said[0] == said[1]
    assert "could not be fetched" in said[0]


def test_a_run_records_its_commits_and_goes_on_without_a_network(
    hub: HubServer, published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch has moved meanwhile. A run with directories has the same numbers."""
    run = train(**FLAGS, **NAMES, train_iters=2, save=str(tmp_path / "run"))
    record = json.loads((run / "hub.json").read_text())
    assert record["commits"]["hf/model/Org/Teacher@"] == hub.commit("model/Org/Teacher")
    asked = parse_run_config(["--config", str(run / "config.yaml")])
    assert asked.model.model == "Org/Student"
    recorded = with_recorded_files(asked, run)
    assert recorded.model.model.endswith(hub.commit("model/Org/Student"))
    assert with_recorded_files(asked, tmp_path) == asked
    rows = Path(hub.repos["dataset/Org/Rows"]) / "train.jsonl"
    text = rows.read_text()
    try:
        rows.write_text("".join(reversed(text.splitlines(keepends=True))))
        hub.log.clear()
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        first = str(run / "checkpoints/step_00000001")
        on = train(**FLAGS, **NAMES, train_iters=2, save=str(tmp_path / "on"), load=first)
    finally:
        rows.write_text(text)
    assert hub.log == []
    assert json.loads((on / "hub.json").read_text()) == record
    assert metrics(on) == metrics(run, first_step=2)
    local = dict(model=str(published["model/Org/Student"]), teacher_model=str(published["model/Org/Teacher"]))
    drawn = next((tmp_path / "home/megatron_gkd/hub/rows").glob("*.jsonl"))
    shutil.copy(drawn, tmp_path / "drawn.jsonl")
    again = train(**FLAGS, **local, dataset=str(tmp_path / "drawn.jsonl"), train_iters=2, save=str(tmp_path / "again"))
    assert metrics(again) == metrics(run)
    assert not (again / "hub.json").exists()


def test_a_cache_that_was_moved_is_no_change_and_another_commit_is() -> None:
    one = "/a/hub/models--O--T/snapshots/c"
    assert changed_flags({"teacher_model": one}, {"teacher_model": "/b/hub/models--O--T/snapshots/c"}) == {}
    for other in (
        "/a/hub/models--O--T/snapshots/d",
        "/a/hub/models--O--U/snapshots/c",
        "/x/models--O--T/other/c",
        None,
    ):
        assert changed_flags({"teacher_model": one}, {"teacher_model": other}) == {"teacher_model": (one, other)}


def test_pins_are_read_where_a_run_goes_on(tmp_path: Path) -> None:
    (tmp_path / "run/checkpoints/step_1").mkdir(parents=True)
    (tmp_path / "run" / hub_files.RECORD).write_text(json.dumps({"commits": {"hf/model/O/N@": "c"}}))

    def commits(**flags: Any) -> dict[str, str]:
        return earlier_commits(parse_run_config(command_line(model="O/N", **flags)))

    run = str(tmp_path / "run")
    assert commits(save=run) == {}
    pinned = {"hf/model/O/N@": "c"}
    assert (
        commits(load=run) == commits(save=run, auto_resume=True) == commits(load=f"{run}/checkpoints/step_1") == pinned
    )
    (tmp_path / "run" / hub_files.RECORD).write_text("{")
    assert commits(load=run) == {}


def test_a_teacher_behind_a_server_has_its_weights_there() -> None:
    argv = command_line(**{**NAMES, "teacher_model_server": "http://a:1", "gkd_logits_topk": 4})
    config = parse_run_config(argv)
    assert [(item.flag, item.weights) for item in asked_by(config)] == [
        *(("model", True), ("teacher_model", False), ("dataset", True))
    ]
    assert asked_by(config, with_training_data=False) == asked_by(config)[:2]
    assert isinstance(asked_by(config)[0], Asked)


def test_commands_of_one_process_take_the_same_names(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = ["Org/Rows#3"]
    checked = with_local_files(CheckDataConfig(model="Org/Student", dataset=rows), weights=False)
    assert not list(Path(checked.model).glob("*.safetensors"))
    sampled = with_local_files(SampleConfig(model="HF::Org/Student", result_path="r.jsonl", dataset=rows, seed=7))
    assert (Path(sampled.model) / "model.safetensors").is_file()
    assert sampled.dataset != checked.dataset  # drawn by the seed
    converted = with_local_files(ConvertConfig(to="megatron", model="Org/Student", save="m"))
    assert converted.model == sampled.model
    assert with_local_files(converted) is converted


def test_what_needs_no_weights_fetches_none(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = command_line(**{**FLAGS, **NAMES}, tensor_model_parallel_size=2)
    assert cli.main(["check", "train", *flags, "--world_size", "2"]) == 0
    assert "fits 2 ranks" in capsys.readouterr().out
    assert cli.main(["check", "data", "--model", "Org/Student", "--dataset", "Org/Rows#3"]) == 0
    assert cli.main(["check", "train", *command_line(**{**FLAGS, **NAMES, "model": "Org/Rows"})]) == 2
    assert "Hugging Face's hub has no model Org/Rows" in capsys.readouterr().err
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "MS::Org/Student"}, "MS::Org/Student is a name of ModelScope, whose client is not installed"),
        ({"use_hf": False}, "Org/Student is a name of ModelScope, whose client is not installed"),
        ({"dataset": "HF::Rows"}, "--dataset HF::Rows is not a name on a hub"),
        ({"model": "Org/Other"}, "--model Org/Other: there is no such directory here, and Org/Other is not in"),
        ({"dataset": "data/trian"}, "--dataset data/trian: there is no such file or directory here, and data/trian is"),
    ],
)
def test_names_that_are_refused_before_ranks_meet(
    flags: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: dict[str, Path]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(modelscope, "is_installed", lambda: False)
    local = dict(model=str(published["model/Org/Student"]), dataset=str(published["dataset/Org/Rows"] / "train.jsonl"))
    asked = {**FLAGS, **local, "objective": "sft", **({**NAMES, "teacher_model": None} if "use_hf" in flags else {})}
    argv = command_line(**{name: value for name, value in {**asked, **flags}.items() if value is not None})
    config = parse_run_config(argv)
    with pytest.raises(GKDError, match=f"^{message}"):
        check_paths(config, "train")
