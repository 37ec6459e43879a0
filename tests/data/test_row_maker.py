"""What a run makes of records before they are rows: functions of the user's, templates, and what is refused of them.

Not covered: whole runs (train/test_ms_swift_scripts.py).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_gkd import cli
from megatron_gkd.commands.report import answers
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.policy import RowPolicy
from megatron_gkd.data.row_key import read_content, rows_key
from megatron_gkd.data.row_maker import RowMaker, check_row_flags, make_row_maker
from megatron_gkd.data.rows import RowDataset, load_rows
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.errors import CheckpointError, ConfigError, DataError
from megatron_gkd.train.alike import start_facts
from megatron_gkd.train.checkpoint import state
from megatron_gkd.train.generate import _records
from tests.support.tiny_tokenizers import chat_tokenizer

EXAMPLE = Path(__file__).resolve().parent.parent.parent / "examples/opsd/opsd_plugin.py"
TOKENIZER = chat_tokenizer()
PROBLEMS: list[dict[str, Any]] = [
    {"problem": "2 + 3?", "solution": "It is 5.", "correct": True},
    {"problem": "2 + 2?", "solution": "It is 5.", "correct": False},
    {"problem": "1 + 3?", "solution": "It is 4.", "messages": [], "conversations": [{"from": "human", "value": "x"}]},
]


def write(path: Path, *records: Any) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def plugin(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def load(path: str, maker: RowMaker | None, **options: Any) -> RowDataset:
    return load_rows([path], TOKENIZER, max_length=1000, maker=maker, **options)


def prompt(*turns: tuple[str, str]) -> tuple[int, ...]:
    return ChatEncoder(TOKENIZER).encode([{"role": role, "content": text} for role, text in turns], None)[0]


# ---- functions -------------------------------------------------------------------------------------------------------


def test_a_function_makes_the_rows(tmp_path: Path) -> None:
    """The example: two rows, the teacher told more, under the same system's turn; a wrong solution is left out."""
    data = write(tmp_path / "d.jsonl", *PROBLEMS)
    rows = load(data, make_row_maker([str(EXAMPLE)], None, None))
    assert (len(rows), rows.summary.dropped) == (2, {"left_out": 1})
    assert rows.place(1) == f"{data}:3"
    system = "Please reason step by step, and put your final answer within \\boxed{}."
    assert rows[0].prompt_ids == prompt(("system", system), ("user", "2 + 3?"))
    told = TOKENIZER.decode(rows[0].teacher_prompt_ids)
    turns = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n2 + 3?\n\n"
    assert told.startswith(f"{turns}Here is a reference solution:\nIt is 5.\n\n")
    assert f"1 dropped as left_out (first: {data}:2: by the function of --external_plugins)" in rows.account()


def test_streamed_rows_are_the_same(tmp_path: Path) -> None:
    maker = make_row_maker([str(EXAMPLE)], None, None)
    data = write(tmp_path / "d.jsonl", *PROBLEMS)
    rows, streamed = load(data, maker), StreamedRows([data], TOKENIZER, max_length=1000, maker=maker)
    assert [streamed[0], streamed[2]] == list(rows)
    assert streamed[1] in rows  # another in place of the one that is left out
    other = replace(maker, plugins=(replace(maker.plugins[0], source=maker.plugins[0].source + "\n"),))
    again = StreamedRows([data], TOKENIZER, max_length=1000, maker=other)
    assert again.fingerprint() != streamed.fingerprint()
    contents = [read_content(data)]
    keys = {rows_key(contents, TOKENIZER, RowPolicy(1000, maker=one)) for one in (None, maker, other)}
    assert len(keys) == 3, "tokenised rows are known by the text of the file"


def test_functions_come_one_after_the_other_and_are_given_copies(tmp_path: Path) -> None:
    first = plugin(tmp_path / "a.py", "def make_row(row):\n    row['problem'] += '!'\n    return row\n")
    second = plugin(
        tmp_path / "b.py",
        "from dataclasses import dataclass\n@dataclass\nclass Row:\n    text: str\n"
        "def make_row(row):\n    return {'prompt': Row(row['problem']).text, 'completion': None}\n",
    )
    before = dict(sys.modules), list(sys.path)
    maker, record = make_row_maker([first, second], None, None), {"problem": "a"}
    assert maker is not None
    assert maker.made(record) == {"prompt": "a!"}
    assert record == {"problem": "a"}
    assert sys.path == before[1]
    assert {name for name in sys.modules if name not in before[0]} <= {
        name for name in sys.modules if name.startswith("_gkd_plugin_")
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("def make_row(row):\n    return {'prompt': row['gone']}\n", "make_row: KeyError: 'gone'; correct the row"),
        ("def make_row(row):\n    return [row]\n", "make_row gave a list; it must return the row's columns, or None"),
        ("def make_row(row):\n    return {1: 2}\n", "make_row gave a mapping whose names are not all text"),
        ("def make_row(row):\n    return {'question': 'a'}\n", r"columns \['question'\] are not a known form"),
    ],
)
def test_a_function_that_fails_names_the_row(tmp_path: Path, text: str, said: str) -> None:
    data, file = write(tmp_path / "d.jsonl", *PROBLEMS), plugin(tmp_path / "p.py", text)
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{said}") as caught:
        load(data, make_row_maker([file], None, None))
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"no usable row .* 3 dropped as malformed"):
        load(data, make_row_maker([file], None, None), on_bad_row="skip")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "there is no such file; give a Python file"),
        ("def make_row(row:\n", "cannot be read as Python"),
        (
            "import json\nfrom swift.dataset import RowPreprocessor\n",
            r"line 2 imports swift.dataset, ms-swift's own Python API, which is not here: write a function make_row\(",
        ),
        ("def make(row):\n    return row\n", "has no function make_row: write a function make_row"),
    ],
)
def test_what_is_refused_before_anything_is_executed(tmp_path: Path, text: str | None, said: str) -> None:
    file = str(tmp_path / "p.py") if text is None else plugin(tmp_path / "p.py", "raise SystemExit\n" + text)
    said = said.replace("line 2", "line 3")
    with pytest.raises(ConfigError, match=rf"--external_plugins .*p\.py.*{said}") as caught:
        check_row_flags([file], None, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("make_row = 5\n", "make_row is a int, no function"),
        ("# make_row\n", "AttributeError: .*make_row"),
        ("import nowhere_at_all  # make_row\n", "ModuleNotFoundError: No module named 'nowhere_at_all', when it was"),
        ("raise SystemExit('make_row')\n", "SystemExit: make_row, when it was loaded"),
    ],
)
def test_what_is_refused_when_a_file_is_loaded(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"--external_plugins .*p\.py: {said}"):
        make_row_maker([plugin(tmp_path / "p.py", text)], None, None)


# ---- templates -------------------------------------------------------------------------------------------------------

TOLD = "{prompt} ({{it}} is {solution})"


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"prompt": "2 + 3?", "solution": 5}, [("user", "2 + 3? ({it} is 5)")]),
        (
            {"messages": [{"role": "user", "content": "2 + 3?"}], "system": "Be kind.", "solution": "5"},
            [("system", "Be kind."), ("user", "2 + 3? ({it} is 5)")],
        ),
        (
            {"instruction": "2 + 3?", "output": "5", "history": [["a", "b"]], "solution": "5"},
            [("user", "a"), ("assistant", "b"), ("user", "2 + 3? ({it} is 5)")],
        ),
    ],
)
def test_a_template_stands_in_place_of_the_users_last_turn(
    tmp_path: Path, record: dict[str, Any], turns: list[tuple[str, str]]
) -> None:
    (row,) = load(write(tmp_path / "d.jsonl", record), make_row_maker([], None, TOLD))
    assert row.teacher_prompt_ids == prompt(*turns)
    assert row.prompt_ids == prompt(*turns[:-1], ("user", "2 + 3?"))


def test_templates_of_both_prompts(tmp_path: Path) -> None:
    """Of records with columns of their own, and with two forms of turns; the completion is there for the teacher."""
    maker = make_row_maker([], "{problem}", "{prompt} Told: {solution} {completion}")
    record = PROBLEMS[2] | {"completion": "Four."}
    (row,) = load(write(tmp_path / "d.jsonl", record), maker)
    assert row.prompt_ids == prompt(("user", "1 + 3?"))
    assert row.teacher_prompt_ids == prompt(("user", "1 + 3? Told: It is 4. Four."))
    assert TOKENIZER.decode(row.completion_ids) == "Four.<|im_end|>"


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"prompt": "a"}, "the column `solution`, which --teacher_prompt_template names, is not there"),
        ({"prompt": "a", "solution": ["b"]}, "`solution`, .* is a list, and not text"),
        ({"prompt": "a", "solution": "b", "teacher_prompt": "c"}, "`teacher_prompt` is in the row, and"),
        ({"prompt": "a", "solution": "b", "images": ["c.png"]}, "makes text of a row with images"),
        ({"problem": "a", "solution": "b"}, "are not a known form"),
    ],
)
def test_rows_that_a_template_does_not_fit(tmp_path: Path, record: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=rf"d\.jsonl:1: .*{said}"):
        load(write(tmp_path / "d.jsonl", record), make_row_maker([], None, TOLD))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Think.", "names no column: write {column}"),
        ("\\boxed{}", "has to be the name of a column; a brace that is text is written twice"),
        ("{a:>3}", "has to be the name of a column"),
        ("{a", "expected '}' before end of string; a brace"),
    ],
)
def test_templates_that_cannot_be_meant(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"--prompt_template .*{said}"):
        check_row_flags([], text, None)


# ---- check data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["function", "templates"])
def test_check_data_reads_the_same_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str], by: str) -> None:
    TOKENIZER.save_pretrained(tmp_path / "model")
    data = write(tmp_path / "d.jsonl", *(record | {"completion": "Five."} for record in PROBLEMS))
    flags = [
        "--prompt_template",
        "{problem}",
        "--teacher_prompt_template",
        "{prompt} {solution}",
        "--loss_scale",
        "all",
    ]
    if by == "function":
        made = "def make_row(row):\n    return {'messages': [{'role': 'system', 'content': 's'}, {'role': 'user', "
        made += "'content': row['problem']}, {'role': 'assistant', 'content': 'ok'}], 'teacher_prompt': 'told'}\n"
        flags = ["--external_plugins", plugin(tmp_path / "p.py", made)]
    line = ["check", "data", "--model", str(tmp_path / "model"), "--dataset", data, *flags]
    assert cli.main(line) == 0
    printed = capsys.readouterr().out
    assert "rows used                3" in printed
    assert "WRONG" not in printed
    assert ("told" if by == "function" else "It is 5.") in printed


# ---- whoever else has to know ----------------------------------------------------------------------------------------


def test_a_resume_with_another_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state.dist, "get_world_size", lambda: 1)

    def described(text: str, folder: str, **flags: Any) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = plugin(tmp_path / folder / "rows.py", text)
        config = RunConfig.from_flat({"model": "S", "external_plugins": [file]} | flags)
        return dict(state.describe_run(config, None, "cpu").config)

    text = "def make_row(row):\n    return row\n"
    saved = described(text, "a")
    assert not state.changed_flags(saved, described(text, "b")), "the same file at another place"
    for other, said in (
        (described(text + "\n", "b"), r"--external_plugins rows\.py \(\w{12}\) \(saved\) -> rows\.py \(\w{12}\)"),
        (described(text, "b", teacher_prompt_template="{a}"), r"--teacher_prompt_template null \(saved\) -> {a}"),
        (described(text, "b", prompt_template="{a}"), r"--prompt_template null \(saved\) -> {a}"),
    ):
        with pytest.raises(CheckpointError, match=said):
            state.refuse_changed_flags(tmp_path, state.changed_flags(saved, other))


@pytest.mark.parametrize("command", ["train", "plan", "check train", "check data"])
def test_every_command_refuses_a_file_before_it_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    (tmp_path / "config.json").write_text("{}")
    data = write(tmp_path / "d.jsonl", *PROBLEMS)
    given = ["--model", str(tmp_path), "--dataset", data, "--external_plugins", "nowhere.py"]
    given += [] if command == "check data" else ["--save", str(tmp_path / "run"), "--lmbda", "0", "--device", "cpu"]
    assert cli.main([*command.split(), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error: --external_plugins nowhere.py: there is no such file; give a Python file, and write a" in line
    assert not (tmp_path / "run").exists()


def test_ranks_compare_the_file_and_a_verifier_is_given_what_it_made(tmp_path: Path) -> None:
    file = plugin(
        tmp_path / "p.py", "def make_row(row):\n    return row | {'prompt': 'a', 'answer': row['solution']}\n"
    )
    config = RunConfig.from_flat({"model": str(tmp_path), "external_plugins": [file]})
    before = start_facts(config, config)[f"--external_plugins {file}"]
    maker = make_row_maker([file], None, None)
    data = write(tmp_path / "d.jsonl", *PROBLEMS)
    assert [record["answer"] for record in _records([f"{data}:3", f"{data}:1"], maker)] == ["It is 4.", "It is 5."]
    Path(file).write_text(Path(file).read_text() + "\n")
    assert start_facts(config, config)[f"--external_plugins {file}"] != before
    with pytest.raises(ConfigError, match="made by --external_plugins, and a report executes nothing"):
        answers._held_out(SimpleNamespace(config=config), TOKENIZER, 1)  # type: ignore[arg-type]
