"""examples/skill: the problems, what is prepared, the cells through the real trainer, the statistics and the page.

Two cells are trained for two steps each in forked processes, and measured. Not covered: cells that sample from the
student (their flags are; train/test_on_policy.py), and that the models learn anything; the study is the evidence.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_gkd.config.flags import parse_run_config, parse_section
from megatron_gkd.config.sample import SampleConfig
from megatron_gkd.data.verify import check_answer, load_verifier
from tests.support.program import run

SKILL = Path(__file__).resolve().parent.parent.parent / "examples" / "skill"
SIZES = {"train": 8, "valid": 4, "test": 4, "teacher": 8}
SHORT = dict(train_iters=2, lr=1e-3, global_batch_size=4, micro_batch_size=4)


@pytest.fixture(autouse=True)
def _on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SKILL))


# ---- problems --------------------------------------------------------------------------------------------------------


def test_problems_are_solved_split_and_repeatable() -> None:
    from problems import COMPLETION_TOKENS, PROMPT_TOKENS, solve, split

    assert solve("8-5+2-9=") == "3;5;-4"
    files = split({"train": 500, "test": 300}, seed=3)
    assert files == split({"train": 500, "test": 300}, seed=3) != split({"train": 500, "test": 300}, seed=4)
    rows = [row for of_file in files.values() for row in of_file]
    assert len({row["prompt"] for row in rows}) == 800, "no problem twice, and none in two files"
    verifier = load_verifier("last_number")
    for row in rows:
        assert len(row["prompt"]) == PROMPT_TOKENS
        assert len(row["completion"]) < COMPLETION_TOKENS
        assert int(row["answer"]) == eval(row["prompt"][:-1])
        check_answer("last_number", row, "row")
        assert verifier(row["completion"], row)
        assert not verifier(f"{row['completion']};{int(row['answer']) + 1}", row)
        assert not verifier("".join(row["completion"].rpartition(";")[:2]) + str(int(row["answer"]) + 1), row)


def test_every_character_is_a_token() -> None:
    from problems import make_tokenizer

    tokenizer = make_tokenizer()
    text = "8-5+2-9=3;5;-4"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id not in ids


# ---- statistics ------------------------------------------------------------------------------------------------------


def tail_of_4(t: float) -> float:
    """P(|T| > t) with 4 degrees of freedom, in closed form."""
    u = t / math.sqrt(1 + t * t / 4)
    return 1 - 2 * (3 / 8 * u * (1 - u * u / 12))


def test_students_distribution() -> None:
    from paired import t_quantile, t_tail

    for t in (0.1, 1.0, 2.0, 5.0, 40.0):
        assert t_tail(t, 1) == pytest.approx(1 - 2 / math.pi * math.atan(t), rel=1e-12)
        assert t_tail(-t, 2) == pytest.approx(1 - t / math.sqrt(2 + t * t), rel=1e-9)
        assert t_tail(t, 4) == pytest.approx(tail_of_4(t), rel=1e-8)
    tables = {1: 12.70620474, 2: 4.30265273, 4: 2.77644511, 9: 2.26215716, 30: 2.04227246}
    for freedom, expected in tables.items():
        assert t_quantile(freedom) == pytest.approx(expected, rel=1e-8)


def test_pairs_by_hand() -> None:
    from paired import interval, paired

    mean, half, n = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (mean, n) == (3.0, 5)
    assert half == pytest.approx(2.77644511 * math.sqrt(2.5 / 5))
    # the seeds differ by much, the methods by little, the same for each of them
    theirs = [10.0, 30.0, 20.0, 50.0, 40.0]
    found = paired([11.0, 32.0, 23.0, 54.0, 45.0], theirs)
    assert found.mean == pytest.approx(3.0)
    assert found.p == pytest.approx(tail_of_4(3 / math.sqrt(0.5)))
    assert found.is_significant
    assert found.half == pytest.approx(half)
    assert not paired([11.0, 28.0, 23.0, 46.0, 45.0], theirs).is_significant
    assert paired(theirs, theirs).p == 1.0
    with pytest.raises(ValueError, match="two seeds"):
        interval([1.0])


# ---- the page --------------------------------------------------------------------------------------------------------


def record(arm: str, seed: int, accuracy: float) -> dict[str, Any]:
    return dict(arm=arm, seed=seed, steps=400, accuracy=accuracy, cpu_s=50.0, nll=0.2, forward_kl=0.1, agreement=0.9)


def test_the_page_says_what_was_found_and_what_was_not(tmp_path: Path) -> None:
    from page import put_into, write_page

    noise = [0.01, -0.01, 0.005, 0.0, -0.005]
    records = [record("sft", seed, 0.55 + noise[seed]) for seed in range(5)]
    records += [record("kd", seed, 0.551 - noise[seed]) for seed in range(5)]
    records += [record("on_policy", seed, 0.60 + noise[seed] + 0.001 * seed) for seed in range(5)]
    models = {"teacher": record("", 0, 0.97)}
    write_page([*records, record("mixed", 0, 0.6)], tmp_path, models)
    page = (tmp_path / "evidence.md").read_text()
    (is_kd_better,) = [line for line in page.splitlines() if "Is KD better than SFT" in line]
    assert is_kd_better.endswith("| not found |")
    (is_sft_worse,) = [line for line in page.splitlines() if "Is on-policy better than SFT?" in line]
    assert "+5.2 +- 0.2" in is_sft_worse
    assert is_sft_worse.endswith("| yes |")
    assert "| Is the mixture better than KD? | | | | not run |" in page, "one seed is no evidence"
    assert "`mixed`" not in page
    assert "| 55.0 +- 1.0 |" in page
    assert "| teacher | | | | | 97.0 | 0.200 | 0.100 | 90.0 |" in page
    into = tmp_path / "docs.md"
    into.write_text("# Title\n\n<!-- RESULTS: begin. A note. -->\nold\n<!-- RESULTS: end -->\n\nMore.\n")
    for _ in range(2):
        put_into(into, tmp_path)
    text = into.read_text()
    assert text.startswith("# Title\n\n<!-- RESULTS: begin. A note. -->\n| arm |")
    assert text.endswith("![Accuracy of every method](docs.svg)\n<!-- RESULTS: end -->\n\nMore.\n")
    assert "old" not in text
    assert "<svg" in (tmp_path / "docs.svg").read_text()


# ---- cells -----------------------------------------------------------------------------------------------------------


class Commands:
    """Carries out `train` in a forked process and `measure` in this one; of `sample` only the flags are read."""

    def __init__(self) -> None:
        self.carried_out: list[list[str]] = []

    def __call__(self, argv: Sequence[str], log: Path) -> int:
        self.carried_out.append(list(argv))
        if argv[0] == "sample":
            config = parse_section(list(argv[1:]), SampleConfig, command="sample")
            config.check()
            Path(config.result_path).write_text("")
            return 0
        if argv[0] == "measure":
            from measure import main

            with log.open("w") as output, contextlib.redirect_stdout(output):
                return main(argv[1:])
        done = run(argv)
        log.write_text(done.stdout + done.stderr)
        return done.returncode


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("skill") / "prepared"
    sys.path.insert(0, str(SKILL))
    try:
        from prepare import prepare

        prepare(out, SIZES, {"teacher": SHORT, "start": SHORT}, Commands())
    finally:
        sys.path.remove(str(SKILL))
    return out


@pytest.mark.slow
def test_what_is_prepared_is_the_same_again_and_is_not_made_twice(prepared: Path, tmp_path: Path) -> None:
    from prepare import prepare

    again, commands = tmp_path / "again", Commands()
    (again / "teacher").mkdir(parents=True)
    (again / "teacher/export.json").write_text("{}")  # one training says enough
    prepare(again, SIZES, {"teacher": SHORT, "start": SHORT}, commands)
    assert [argv[0] for argv in commands.carried_out] == ["train", "sample"]
    names = ["data/train.jsonl", "data/test.jsonl", "random/teacher/model.safetensors", "start/hf/model.safetensors"]
    for name in [*names, "random/student/tokenizer.json"]:
        assert (again / name).read_bytes() == (prepared / name).read_bytes(), name
    random, trained = (prepared / f"{name}/model.safetensors" for name in ("random/student", "start/hf"))
    assert random.read_bytes() != trained.read_bytes()
    prepare(again, SIZES, {"teacher": SHORT, "start": SHORT}, commands)
    assert len(commands.carried_out) == 2
    with pytest.raises(SystemExit, match="other settings"):
        prepare(again, SIZES | {"test": 5}, {"teacher": SHORT, "start": SHORT}, commands)


class Scripted:
    """A model that gives 3/4 to the token that follows the last one, and shares the rest among the others."""

    def __init__(self, follows: dict[int, int], vocab_size: int) -> None:
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self._logits = torch.full((vocab_size, vocab_size), math.log(0.25 / (vocab_size - 1)))
        for token, after in follows.items():
            self._logits[token, after] = math.log(0.75)

    def __call__(self, ids: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self._logits[ids])

    def generate(self, ids: torch.Tensor, *, max_new_tokens: int, **options: Any) -> torch.Tensor:
        for _ in range(max_new_tokens):
            ids = torch.cat([ids, self._logits[ids[:, -1:]].argmax(-1)], 1)
        return ids


def test_what_is_measured_by_hand() -> None:
    """Models of one token's memory: `=` is followed by 3, and 3 by the end; the teacher says 4 in place of 3."""
    from measure import measure
    from problems import make_tokenizer

    tokenizer = make_tokenizer()
    equals, three, four, end = (tokenizer.convert_tokens_to_ids(t) for t in ("=", "3", "4", "<end>"))
    student = Scripted({equals: three, three: end, four: end}, 16)
    teacher = Scripted({equals: four, three: end, four: end}, 16)
    rows = [
        {"prompt": prompt, "completion": answer, "answer": answer} for prompt, answer in (("1+2=", "3"), ("5-1=", "4"))
    ]
    found = measure(student, teacher, tokenizer, rows, 2)
    low, high = 0.25 / 15, 0.75
    assert found["accuracy"] == 0.5, "it says 3 to both"
    assert found["nll"] == pytest.approx(-(3 * math.log(high) + math.log(low)) / 4, rel=1e-6)
    assert found["forward_kl"] == pytest.approx(2 * (high - low) * math.log(high / low) / 4, rel=1e-6)
    assert found["agreement"] == 0.5
    assert found["num_prompts"] == 2


@pytest.mark.slow
def test_cells_go_through_the_trainer_once(prepared: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    from arms import sums
    from run import Study, write_results

    setting = sums(prepared)
    flags = {**setting.flags, "global_batch_size": 4, "micro_batch_size": 4}
    setting = replace(setting, steps=2, flags=flags)
    commands, study = Commands(), Study(setting, tmp_path)
    with pytest.raises(SystemExit, match="no cell of kd is finished"):
        study.carry_out("sft_equal_time", 0, commands)
    for _ in range(2):
        study.measure_models(commands)
        for arm in ("sft", "kd"):
            study.carry_out(arm, 0, commands)
    names = [argv[0] for argv in commands.carried_out]
    assert names == ["measure"] * 2 + ["train", "measure"] * 2, "a finished cell is not repeated"
    sft, kd = study.records()
    assert (sft["arm"], kd["arm"]) == ("sft", "kd")
    for found in (sft, kd):
        assert (found["steps"], found["num_prompts"]) == (2, 4)
        assert found["cpu_s"] > 0
        assert found["forward_kl"] > 0
    models = study.models()
    assert len({sft["nll"], kd["nll"], models["start"]["nll"], models["teacher"]["nll"]}) == 4
    assert models["teacher"]["forward_kl"] == 0
    assert study.steps("sft_equal_time") == max(1, round(2 * kd["cpu_s"] / sft["cpu_s"]))
    write_results(study)
    assert [cell["arm"] for cell in json.loads((tmp_path / "results.json").read_text())["cells"]] == ["sft", "kd"]
    (tmp_path / "kd/seed_0.test.txt").unlink()
    assert study.record("kd", 0) is None, "a cell that was not measured is no result"


@pytest.mark.parametrize("name", ["sums", "words"])
def test_every_cell_is_a_run_that_the_trainer_takes(tmp_path: Path, name: str) -> None:
    from arms import ARMS, SETTINGS
    from prepare import as_words

    setting = SETTINGS[name](tmp_path)
    for arm in setting.arms:
        flags = setting.cell(ARMS[arm], 3, tmp_path / arm, setting.steps)
        config = parse_run_config(as_words(**flags), command="train")
        config.validate("train")
        assert (config.training.seed, config.training.train_iters) == (3, setting.steps)
