"""Records of a run: what is written, and that a resumed run leaves the record of an uninterrupted one.

wandb is a stand-in with the calls that the writer makes: the package is not needed for the tests.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_gkd.errors import ConfigError
from megatron_gkd.observe.writers import JsonlWriter, TensorBoardWriter, WandbWriter, open_trackers, read_rows


def write(path: Path, steps: range, *, first_step: int | None = None) -> None:
    writer = JsonlWriter(path, first_step=first_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step})
    writer.close()


def test_a_row_is_on_disk_when_write_returns(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "run" / "metrics.jsonl")
    writer.write(1, {"loss": torch.tensor(2.5), "num_tokens": 7})
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.5, "num_tokens": 7}\n'
    writer.close()


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    writer.write(1, {"a": math.nan, "b": math.inf, "c": torch.tensor(-math.inf)})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "a": None, "b": None, "c": None}
    writer.close()


def test_resuming_takes_back_the_steps_that_will_be_written_again(tmp_path: Path) -> None:
    write(tmp_path / "whole.jsonl", range(1, 9))
    write(tmp_path / "resumed.jsonl", range(1, 7))
    write(tmp_path / "resumed.jsonl", range(5, 9), first_step=5)
    assert (tmp_path / "resumed.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["resumed.jsonl", "whole.jsonl"]


def test_a_row_that_a_crash_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 4))
    path.write_text(path.read_text()[:-9])
    assert [row["step"] for row in read_rows(path)] == [1, 2]
    write(path, range(3, 5), first_step=3)
    assert [row["step"] for row in read_rows(path)] == [1, 2, 3, 4]


def test_rows_of_another_kind_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('[1]\n{"loss": 1}\n{"step": 1, "loss": 1}\n')
    assert read_rows(path) == [{"step": 1, "loss": 1}]
    assert read_rows(tmp_path / "none.jsonl") == []


def test_a_new_run_does_not_overwrite_an_old_record(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", range(1, 3))
    with pytest.raises(ConfigError, match="holds an earlier run; give another --save, or --load it"):
        JsonlWriter(tmp_path / "metrics.jsonl")


def test_resuming_without_a_record_starts_one(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", range(3, 5), first_step=3)
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [3, 4]


def scalars(directory: Path) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_tensorboard_reads_the_scalars_back_and_purges_on_resume(tmp_path: Path) -> None:
    for steps, first_step in ((range(1, 5), None), (range(3, 6), 3)):
        writer = TensorBoardWriter(tmp_path, first_step=first_step)
        for step in steps:
            writer.write(step, {"loss": step + (0.5 if first_step else 0.0)})
        writer.close()
    assert scalars(tmp_path) == [(1, 1.0), (2, 2.0), (3, 3.5), (4, 4.5), (5, 5.5)]


class FakeWandb:
    def __init__(self) -> None:
        self.inits: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def init(self, **options: Any) -> FakeWandb:
        self.inits.append(options)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    for first_step in (None, 2):
        writer = WandbWriter(tmp_path, first_step=first_step, config={"beta": 0.5})
        writer.write(1, {"loss": 1.0})
        writer.close()
    ids = [options["id"] for options in fake.inits]
    assert ids[0] == ids[1]
    assert fake.inits[0]["config"] == {"beta": 0.5}
    assert fake.logged == [(1, {"loss": 1.0})] * 2
    assert fake.finished == 2
    WandbWriter(tmp_path)
    assert fake.inits[2]["id"] != ids[0]


def test_tables_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"row": 3, "completion": "a | b\n<i>`c`</i>"}, {"row": 4, "completion": None}]
    fake = FakeWandb()
    fake.Table = lambda columns, data: (columns, data)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    for writer in open_trackers(["tensorboard", "wandb"], tmp_path):
        writer.table(2, "completions", rows)
        writer.close()
    table = (["row", "completion"], [[3, "a | b\n<i>`c`</i>"], [4, None]])
    assert fake.logged == [(2, {"completions": table})]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (event,) = events.Tensors("completions/text_summary")
    assert event.step == 2
    assert event.tensor_proto.string_val[0].decode().splitlines() == [
        "| row | completion |",
        "| --- | --- |",
        "| 3 | a &#124; b<br>&lt;i&gt;&#96;c&#96;&lt;/i&gt; |",
        "| 4 |  |",
    ]


def test_without_wandb_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="needs the package wandb"):
        WandbWriter(tmp_path)


def test_open_trackers_makes_what_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    for name, report_to, files in (
        ("none", ["none"], set()),
        ("tensorboard", ["tensorboard"], {"tensorboard"}),
        ("both", ["tensorboard", "wandb"], {"tensorboard", "wandb_id.txt"}),
    ):
        (tmp_path / name).mkdir()
        for writer in open_trackers(report_to, tmp_path / name, config={}):
            writer.write(1, {"loss": 1.0})
            writer.close()
        assert {path.name for path in (tmp_path / name).iterdir()} == files
    assert fake.logged == [(1, {"loss": 1.0})]
