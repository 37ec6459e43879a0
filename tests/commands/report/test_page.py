"""The page of a run that was really trained: one file that asks for nothing, whose data is that of the run's files, and
that writes anybody's text as text. Comparison, watching, plans. Where a Chromium is installed, what it draws.

Not covered: how it looks (docs/report.png was looked at).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_gkd.cli import main as cli
from megatron_gkd.commands.report import compare, watch, write_report
from megatron_gkd.commands.report.page import embedded
from megatron_gkd.commands.report.page_data import MOST_POINTS, checks, columns, state_of
from megatron_gkd.commands.report.run_record import LOCK, read_run
from megatron_gkd.errors import ConfigError
from tests.support.effort import LIMIT_S
from tests.support.runs import train
from tests.support.trainers import write_pair, write_rows

PLANTED = "<script>document.title='taken'</script><img src=x onerror=alert(1)>"
SVG = "http://www.w3.org/2000/svg"  # the name of a namespace: nothing is fetched by it


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("page")
    student, teacher = write_pair(root, "llama")
    held_out = Path(write_rows(root / "held_out.jsonl", 5, seed=3))
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    rows[0] = {"prompt": PLANTED, "completion": f"water {PLANTED}"}
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = dict(model=student, teacher_model=teacher, dataset=write_rows(root / "rows.jsonl", 12), lmbda=0)
    flags |= dict(eval_dataset=held_out, eval_steps=2, train_iters=4, global_batch_size=4, lr=5e-3, dtype="fp32")
    return train(**flags, report_to="none", device="cpu", save=root / "a run")


@pytest.fixture
def copy(run_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


class Page(HTMLParser):
    """Elements, attributes that name other files, and the text of the scripts."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.text = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.asked_for: list[tuple[str, str]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(self.text)
        self.close()
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked_for += [(name, value or "") for name, value in attrs if name in ("src", "href", "action", "poster")]
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_data_is_that_of_the_run_s_files(run_dir: Path) -> None:
    page = Page(write_report(run_dir, num_answers=0) / "report.html")
    (run,) = page.data["runs"]
    for name, file in (("metrics", "metrics.jsonl"), ("evaluations", "evaluation.jsonl")):
        wanted = rows_of(run_dir / file)
        table = run[name]["columns"]
        assert table.keys() == {key for row in wanted for key in row}
        assert [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)] == wanted
    tokens = rows_of(run_dir / "tokens.jsonl")
    assert [row["step"] for row in tokens] == [0, 2, 4]
    assert run["tables"] == [{name: row[name] for name in ("step", "of", "texts", "samples")} for row in tokens]
    assert run["positions"] == [{name: row[name] for name in ("step", "by_position")} for row in tokens]
    assert run["memory"]["seen"] == [max(row["memory_bytes"][0] for row in tokens)]
    assert [event["kind"] for event in run["events"]] == ["started", "done"]
    assert (run["state"], run["name"]) == ("finished", "a run")
    assert run["config"]["train_iters"] == 4
    assert "seed" not in run["config"]
    after = {row["key"]: row["after"] for row in run["table"]}
    assert after["forward_kl"] == rows_of(run_dir / "evaluation.jsonl")[-1]["forward_kl"]


def test_it_asks_for_nothing_and_runs_nobody_s_markup(run_dir: Path) -> None:
    page = Page(write_report(run_dir, num_answers=0) / "report.html")
    (run,) = page.data["runs"]
    sample = run["tables"][0]["samples"][0]
    assert PLANTED in sample["prompt"], "the text is there, to be shown"
    assert PLANTED in "".join(run["tables"][0]["texts"][str(token)] for token in sample["ids"])
    assert page.tags.count("script") == len(page.scripts) == 2
    assert not page.asked_for
    assert {"link", "img", "iframe", "object", "embed", "base"}.isdisjoint(page.tags)
    assert "<img" not in page.text
    assert "document.title=" not in page.text.replace(page.scripts[0], "")
    code = page.text.replace(page.scripts[0], "").replace(SVG, "")
    for word in ("http://", "https://", "//cdn", "@import", "url(", "innerHTML", "insertAdjacentHTML", "eval("):
        assert word not in code, word
    assert "default-src &#x27;none&#x27;" in page.text


def test_what_would_end_a_script_does_not() -> None:
    value = {"a": "</script><!--<script>&\u2028", "b": "\ud800"}
    text = embedded(value)
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="JSON compliant"):
        embedded({"loss": float("nan")})


def test_runs_are_compared(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(copy, tmp_path / "other" / "run"))
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("beta: 0.5", "beta: 0.25"))
    assert cli(["report", "--compare", str(copy), str(other), "--out", str(tmp_path / "out.html")]) == 0
    assert str(tmp_path / "out.html") in capsys.readouterr().out
    one, two = Page(tmp_path / "out.html").data["runs"]
    assert two["name"] == "other/run"
    assert one["name"].endswith("/run")
    assert one["metrics"] == two["metrics"]
    assert (one["config"].get("beta"), two["config"].get("beta")) == (None, 0.25)
    compare([copy, other], copy / "report/compare.html")
    with pytest.raises(ConfigError, match="not a run directory"):
        compare([copy, tmp_path / "none"], tmp_path / "never.html")
    assert not (tmp_path / "never.html").exists()


@pytest.mark.parametrize(
    "words", [["--compare", "A"], ["A", "B"], ["--watch", "--compare", "A", "B"], ["A", "--out", "x"]]
)
def test_flags_that_do_not_go_together(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(["report", *words])
    assert "error:" in capsys.readouterr().err


def test_a_run_is_watched_until_nobody_is_at_work_in_it(copy: Path) -> None:
    shutil.rmtree(copy / "hf")
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(lines[0])
    (copy / LOCK).write_text("{}")
    seen = []

    def sleep(seconds: float) -> None:
        page = Page(copy / "report/report.html").data
        seen.append((page["refresh_s"], page["runs"][0]["metrics"]["columns"]["step"]))
        with (copy / "metrics.jsonl").open("a") as file:
            file.write(lines[len(seen)])
        if len(seen) == 2:
            (copy / LOCK).unlink()

    watch(copy, every_s=7.0, sleep=sleep)
    assert seen == [(7.0, [1]), (7.0, [1, 2])]
    last = Page(copy / "report/report.html").data
    assert (last["refresh_s"], last["runs"][0]["metrics"]["columns"]["step"]) == (None, [1, 2, 3])
    assert last["runs"][0]["state"] == "stopped"


def test_states(copy: Path) -> None:
    from megatron_gkd.train.run_lock import LOCK as LOCK_OF_TRAINING

    assert LOCK == LOCK_OF_TRAINING
    shutil.rmtree(copy / "hf")
    assert state_of(read_run(copy)) == ("stopped", "4 of 4 steps; it has not ended as a run ends")
    with (copy / "events.jsonl").open("a") as file:
        file.write('{"step": 3, "time": "", "kind": "failed", "text": "TrainingError: the teacher is frozen"}\n')
    assert state_of(read_run(copy)) == ("failed", "4 of 4 steps; TrainingError: the teacher is frozen")
    named = {check["name"]: (check["status"], check["text"]) for check in checks(read_run(copy), {})}
    assert named["starts that failed"] == ("warn", "1, below")
    assert named["loss"] == ("ok", "finite in every logged step")
    (copy / LOCK).write_text("{}")
    assert state_of(read_run(copy))[0] == "running"


def test_planned_memory_stands_beside_what_was_seen(copy: Path) -> None:
    plan = [{"rank": 0, "student_stage": 0, "teacher_stage": 0, "peak_bytes": [{"student": 5}], "needed_bytes": 9}]
    (copy / "plan.json").write_text(json.dumps(plan))
    (run,) = Page(write_report(copy, num_answers=0) / "report.html").data["runs"]
    assert run["memory"]["planned"] == plan
    assert run["memory"]["kind"] == "cpu"
    for damage in ("[{}]", "{", '{"rank": 0}'):
        (copy / "plan.json").write_text(damage)
        with pytest.raises(ConfigError, match=r"plan\.json"):
            read_run(copy)


def test_long_runs_are_drawn_as_means_of_equal_groups() -> None:
    rows = [
        {"step": step, "loss": float(step), "rare": None if step % 2 else 1.0} for step in range(1, 2 * MOST_POINTS)
    ]
    table = columns(rows)
    assert table["each"] == 2
    assert table["columns"]["step"][:3] == [2, 4, 6]
    assert table["columns"]["step"][-1] == 2 * MOST_POINTS - 1
    assert table["columns"]["loss"][:3] == [1.5, 3.5, 5.5]
    assert table["columns"]["rare"][0] == 1.0
    assert columns([]) == {"each": 1, "columns": {}}


BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_a_browser_draws_it(run_dir: Path, tmp_path: Path) -> None:
    page = write_report(run_dir, num_answers=0) / "report.html"
    command = [
        str(BROWSER),
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += ["--virtual-time-budget=3000", "--enable-logging=stderr", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    drawn = done.stdout
    for heading in ("Result", "By place in the completion", "Health", "Time and memory", "Completions", "Settings"):
        assert f">{heading}</h2>" in drawn
    assert drawn.count('role="img"') >= 8
    assert "<title>a run</title>" in drawn, "the planted script did not run"
    assert "&lt;script&gt;document.title" in drawn, "it is shown"
