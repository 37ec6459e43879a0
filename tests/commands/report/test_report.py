"""The report of a run directory, written here as training writes it, around tiny real models.

Checked: numbers of the table, answers against a plain greedy loop, runs without evaluation, unfinished runs, damage,
directories that are no run. Not covered: that train/ writes what is read here; the quick start's own test does.
"""

import json
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gkd.cli import main as cli
from megatron_gkd.commands.report import curve, main, write_report
from megatron_gkd.commands.report.curve import smooth
from megatron_gkd.commands.report.run_record import read_run
from megatron_gkd.commands.report.summary import describe_layout, describe_loss, summarise
from megatron_gkd.config.flags import parse_run_config, to_yaml
from megatron_gkd.config.run import RunConfig
from megatron_gkd.errors import ConfigError, DataError, GKDError
from megatron_gkd.observe.writers import read_rows

ROOT = Path(__file__).resolve().parent.parent.parent.parent
BEFORE = {
    "step": 0,
    "forward_kl": 4.0,
    "reverse_kl": 5.0,
    "jsd": 0.5,
    "nll": 6.0,
    "agreement": 0.125,
    "num_tokens": 1234,
}
AFTER = {"step": 4, "forward_kl": 1.0, "reverse_kl": 2.0, "jsd": 0.25, "nll": 3.0, "agreement": 0.5, "num_tokens": 1234}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny teacher, student and rows: the offline variant of the quick start."""
    base = tmp_path_factory.mktemp("models") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples/quickstart"))
        import cut_student
        import make_tiny

        assert make_tiny.main(["--out", str(base), "--num_train", "8", "--num_held_out", "4"]) == 0
        cut_student.cut(base / "teacher", base / "student", [0, 3])
        cut_student.cut(base / "teacher", base / "exported", [0, 1])
    return base


def write_run(
    directory: Path,
    models: Path,
    *flags: str,
    evaluations: tuple[dict[str, Any], ...] = (BEFORE, AFTER),
    exported: bool = True,
) -> Path:
    directory.mkdir()
    arguments = ["--model", models / "student", "--teacher_model", models / "teacher", "--train_iters", "4"]
    arguments += ["--dataset", models / "data/train.jsonl", "--eval_dataset", models / "data/held_out.jsonl"]
    arguments += ["--beta", "0", "--lmbda", "0", "--save", directory]
    cfg = parse_run_config([*map(str, arguments), *flags])
    (directory / "config.yaml").write_text(to_yaml(cfg))
    rows = [{"step": i, "loss": 5.0 - i, "num_tokens": 100 * i, "step_time_s": 2.0} for i in range(1, 5)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if evaluations:
        (directory / "evaluation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in evaluations))
    if exported:
        (directory / "hf").symlink_to(models / "exported")
    return directory


def test_numbers_answers_and_files(tmp_path: Path, models: Path, capsys: pytest.CaptureFixture[str]):
    run = write_run(tmp_path / "run", models)
    assert cli(["report", str(run), "--num_answers", "2", "--max_new_tokens", "5"]) == 0
    printed, said = capsys.readouterr()
    for who in ("teacher", "student before", "student after"):
        assert f"answers of {who}, at most 5 tokens" in said
    text = (run / "report/summary.txt").read_text(encoding="utf-8")
    assert text in printed
    assert "finished, 4 of 4 steps" in text
    for row in (
        ["forward", "KL,", "nats/token", "4.0000", "1.0000", "x", "0.25"],
        ["JSD,", "nats/token", "0.5000", "0.2500", "x", "0.50"],
        ["top-1", "agreement", "12.5%", "50.0%", "+37.5", "points"],
        ["training", "8.0", "s,", "1,000", "completion", "tokens,", "125.0", "tokens/s"],
    ):
        assert row in [line.split() for line in text.splitlines()], text
    summary = json.loads((run / "report/summary.json").read_text(encoding="utf-8"))
    assert (summary["before"], summary["after"]) == (BEFORE, AFTER)
    assert (summary["training_s"], summary["num_tokens"], summary["tokens_per_s"]) == (8.0, 1000, 125.0)
    assert summary["answer_notes"] == []
    held_out = [json.loads(line)["messages"] for line in (models / "data/held_out.jsonl").read_text().splitlines()]
    for answer, (question, solution) in zip(summary["answers"], held_out[:2], strict=True):
        assert (answer["prompt"], answer["reference"]) == (question["content"], solution["content"])
        for who, path in (("teacher", "teacher"), ("student before", "student"), ("student after", "exported")):
            assert answer[who] == greedy(models / path, question, 5)


def test_a_run_that_began_on_the_data_and_went_on_with_its_own_samples(tmp_path: Path, models: Path):
    between = {**BEFORE, "step": 2, "forward_kl": 2.0, "agreement": 0.25}
    run = write_run(tmp_path / "run", models, evaluations=[BEFORE, between, AFTER])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows[2:]:
        row["source/student/num_samples"] = 8
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert cli(["report", str(run), "--num_answers", "0"]) == 0
    lines = [line.split() for line in (run / "report/summary.txt").read_text().splitlines()]
    assert ["before", "step", "2", "after", "change"] in lines
    assert ["forward", "KL,", "nats/token", "4.0000", "2.0000", "1.0000", "x", "0.25"] in lines
    assert ["top-1", "agreement", "12.5%", "25.0%", "50.0%", "+37.5", "points"] in lines
    assert json.loads((run / "report/summary.json").read_text())["supervised"] == between


def greedy(path: Path, question: dict[str, str], max_new_tokens: int) -> str:
    """The same answer by hand: the whole sequence again for every token, no cache, no generate()."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template([question], add_generation_prompt=True)["input_ids"]
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_the_picture_is_a_readable_png(tmp_path: Path, models: Path):
    out = write_report(write_run(tmp_path / "run", models), num_answers=0)
    data = (out / "curve.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 2 * height > 600


def test_nothing_of_the_picture_covers_a_curve():
    """The legend is outside of its panel, and a line near 100 % is not the panel's edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    divergences, agreement = figure.subplots(1, 2)
    rows = tuple({**AFTER, "step": step, "agreement": 0.99} for step in range(3))
    curve._draw_divergences(divergences, rows)
    curve._draw_agreement(agreement, rows)
    canvas.draw()
    legend = divergences.get_legend()
    assert legend is not None
    assert not legend.get_window_extent().overlaps(divergences.get_window_extent())
    assert agreement.get_ylim()[1] > 1.1 * 99


def test_without_evaluation_or_export(tmp_path: Path, models: Path):
    run = write_run(tmp_path / "run", models, "--train_iters", "9", evaluations=(), exported=False)
    out = write_report(run, num_answers=1, max_new_tokens=2)
    text = (out / "summary.txt").read_text()
    assert "NOT FINISHED" in text
    assert "4 of 9 steps" in text
    assert "No evaluation" in text
    assert "no answers of student after" in text
    assert (out / "curve.png").stat().st_size > 5000


def test_a_run_that_has_written_nothing_yet(tmp_path: Path, models: Path):
    run = write_run(tmp_path / "run", models, evaluations=(BEFORE,), exported=False)
    (run / "metrics.jsonl").unlink()
    text = (write_report(run, num_answers=0) / "summary.txt").read_text()
    assert "0 of 4 steps" in text
    assert "4.0000" in text


def test_models_that_moved_are_noted(tmp_path: Path, models: Path):
    run = write_run(tmp_path / "run", models)
    config = (run / "config.yaml").read_text().replace(str(models / "teacher"), "gone/teacher")
    (run / "config.yaml").write_text(config)
    assert "no answers of teacher: no model at gone/teacher" in (
        (write_report(run, num_answers=1, max_new_tokens=2) / "summary.txt").read_text()
    )


def test_running_twice_gives_the_same_report(tmp_path: Path, models: Path):
    run = write_run(tmp_path / "run", models)
    first = (write_report(run, num_answers=1, max_new_tokens=3) / "summary.json").read_bytes()
    assert (write_report(run, num_answers=1, max_new_tokens=3) / "summary.json").read_bytes() == first


def test_steps_that_were_not_logged_count(tmp_path: Path, models: Path):
    run = write_run(tmp_path / "run", models, "--logging_steps", "2")
    rows = [{"step": i, "loss": 1.0, "num_tokens": 100, "step_time_s": 2.0} for i in (2, 4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    summary = summarise(read_run(run))
    assert (summary["training_s"], summary["num_tokens"], summary["tokens_per_s"]) == (8.0, 400, 50.0)


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_a_directory_that_is_no_run(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="not a run directory"):
        main([str(tmp_path / name)])
    assert cli(["report", str(tmp_path / name)]) == 2
    assert "not a run directory" in capsys.readouterr().err
    assert not (tmp_path / name / "report").exists()


def test_a_cut_off_last_line_is_left_out_and_damage_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_rows(path, strict=True) == []
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_rows(path, strict=True) == [{"step": 1}]
    for damage in (b'{"ste\n{"step": 3}', b"[]", b'{"loss": 1}', b'{"step": 1, "\xff": 2}'):
        path.write_bytes(b'{"step": 1}\n' + damage + b"\n")
        with pytest.raises(DataError, match=r"metrics\.jsonl:2 is not"):
            read_rows(path, strict=True)
    assert issubclass(DataError, GKDError)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--beta", "0", "--lmbda", "0"], "forward KL (beta 0), full vocabulary; completions: the data set's"),
        (["--beta", "1", "--lmbda", "1"], "reverse KL (beta 1), full vocabulary; completions: the student's samples"),
        (
            ["--beta", "0.5", "--lmbda", "0.25", "--seq_kd", "--gkd_logits_topk", "8", "--sft_alpha", "2"],
            "generalized JSD (beta 0.5), teacher's top 8, + 2 x cross entropy; "
            "completions: 25% student samples, else the teacher's samples",
        ),
    ],
)
def test_the_loss_in_words(flags: list[str], text: str):
    cfg = parse_run_config(["--model", "s", "--teacher_model", "t", "--dataset", "d.jsonl", *flags])
    assert describe_loss(cfg) == text


def test_smoothing_keeps_ends_and_means():
    assert smooth([1.0, 2.0, 6.0, 2.0, 1.0], 3) == pytest.approx([1.0, 3.0, 10 / 3, 3.0, 1.0])
    assert smooth([5.0], 9) == [5.0]


def test_the_layout_in_words() -> None:
    flags = dict(model="S", dataset=["d"], dtype="fp32", tensor_model_parallel_size=2)
    for more, words in (
        ({}, "student TP 2 x PP 1, teacher TP 2 x PP 1, fp32"),
        (dict(context_parallel_size=4), "student TP 2 x CP 4 x PP 1, teacher TP 2 x CP 4 x PP 1, fp32"),
        (
            dict(context_parallel_size=4, teacher_context_parallel_size=1, teacher_pipeline_model_parallel_size=2),
            "student TP 2 x CP 4 x PP 1, teacher TP 2 x PP 2, fp32",
        ),
    ):
        run: Any = SimpleNamespace(config=RunConfig.from_flat(flags | more))
        assert describe_layout(run) == words
