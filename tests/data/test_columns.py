"""What stands beside a row's text, each kind by the text that is trained on: tools, tool calls, system and history, the
template's variables, marks, nulls of containers; and what is refused, ignored or lost, by its name.

Drawn rows of all kinds at once: test_generated_rows.py. Forms of turns: test_forms.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd import cli
from megatron_gkd.commands.check_data import check_rows
from megatron_gkd.config.flags import parse_run_config
from megatron_gkd.config.run import RunConfig
from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.prompts import Prompt, make_row, read_prompts
from megatron_gkd.data.rows import RowDataset, load_rows
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.errors import ConfigError, DataError
from tests.support.saved_rows import write_saved
from tests.support.tiny_tokenizers import CHATML, chat_tokenizer, plain_tokenizer

END = "<|im_end|>"
# Renders tools, calls, reasoning and enable_thinking; refuses nothing.
FULL = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if documents %}<|im_start|>documents\n{{ documents | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = FULL.replace(
    "assistant\n{% endif %}", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
THINKS = THINKS.replace(  # and repeats in the whole what it opens the assistant's turn with
    "{{ m.role }}\n",
    "{{ m.role }}\n{% if m.role == 'assistant' and enable_thinking is false %}<think></think>{% endif %}",
)
TEXT_CALLS = FULL.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments + '' }}")
USER, ASSISTANT = {"role": "user", "content": "weather?"}, {"role": "assistant", "content": "Rain."}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"town": {"type": "string"}}}}}


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def write(path: Path, *records: Any) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    else:
        write_saved(path, list(records))
    return path


def load(path: Path, *records: Any, template: str = FULL, **options: Any) -> tuple[RowDataset, list[str]]:
    """The rows of records in a file, and their texts; `check data` agrees with them."""
    tokenizer = chat_tokenizer(template)
    rows = load_rows(write(path, *records), tokenizer, max_length=2000, **options)
    told = {"loss_scale": options.get("loss_scale", "last_round"), "variables": options.get("template_kwargs", "{}")}
    assert check_rows(ChatEncoder(tokenizer), rows, [str(path)], **told).problems == []
    return rows, [
        f"{tokenizer.decode(list(row.prompt_ids))}##{tokenizer.decode(list(row.completion_ids or ()))}" for row in rows
    ]


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}{END}\n"


ASKED, ANSWERED = turn("user", "weather?") + "<|im_start|>assistant\n##", f"Rain.{END}"
TOOLS = turn("tools", json.dumps([TOOL]))


@pytest.mark.parametrize(
    "columns",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [json.dumps(TOOL)]},
        {"functions": [TOOL["function"]]},
        {"tool_defs": json.dumps([TOOL["function"]])},
    ],
)
@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ASSISTANT]},
        {"prompt": "weather?", "completion": "Rain."},
        {"conversations": [{"from": "human", "value": "weather?"}, {"from": "gpt", "value": "Rain."}]},
        {"instruction": "weather?", "output": "Rain."},
    ],
)
def test_tools_are_rendered_whatever_the_form(tmp_path: Path, row: Any, columns: Any) -> None:
    rows, texts = load(tmp_path / "d.jsonl", row | columns)
    assert texts == [TOOLS + ASKED + ANSWERED]
    assert rows.warnings() == []


CALLED = f'<call>f {{"town": "Oslo"}}</call>{END}'


@pytest.mark.parametrize(
    "answer",
    [
        {"role": "assistant", "content": "", "tool_calls": [call({"town": "Oslo"})]},
        {"role": "assistant", "content": None, "tool_calls": [call('{"town":"Oslo"}')]},
        {"role": "assistant", "tool_calls": json.dumps([call({"town": "Oslo"})])},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"town": "Oslo"}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"town": "Oslo"}}'},
        {"from": "function_call", "value": '[{"name": "f", "arguments": "{\\"town\\": \\"Oslo\\"}"}]'},
    ],
)
def test_tool_calls_of_every_spelling_are_the_same_tokens(tmp_path: Path, answer: Any) -> None:
    record = (
        {"messages": [USER, answer]}
        if "role" in answer
        else {"conversations": [{"from": "human", "value": "weather?"}, answer]}
    )
    assert load(tmp_path / "d.jsonl", record)[1] == [ASKED + CALLED]


def test_a_template_that_wants_text_is_given_the_authors_text(tmp_path: Path) -> None:
    for given, text in ((' {"town":"Oslo"}', ' {"town":"Oslo"}'), ({"town": "\u00d8"}, '{"town": "\u00d8"}')):
        record = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call(given)]}]}
        _, (found,) = load(tmp_path / "d.jsonl", record, template=TEXT_CALLS)
        assert found == f"{ASKED}<call>f {text}</call>{END}"


@pytest.mark.parametrize("name", ["d.jsonl", "d.parquet", "saved"])
def test_rows_are_the_same_in_every_container(tmp_path: Path, name: str) -> None:
    """Of other rows' keys nothing is seen."""
    records = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call(arguments)]}], "tools": [tool]}
        for arguments, tool in (
            ({"town": "Oslo"}, TOOL),
            ({"amount": 2, "to": "JPY"}, {"type": "function", "x": {"y": 1}}),
        )
    ]
    records.append({"messages": [USER, ASSISTANT], "tools": None})  # type: ignore[dict-item]
    _, texts = load(tmp_path / name, *records)
    assert texts == [
        TOOLS + ASKED + CALLED,
        turn("tools", '[{"type": "function", "x": {"y": 1}}]')
        + ASKED
        + f'<call>f {{"amount": 2, "to": "JPY"}}</call>{END}',
        ASKED + ANSWERED,
    ]


def test_nulls_that_somebody_wrote_stay(tmp_path: Path) -> None:
    arguments = {"town": None, "days": [1, None]}
    record = {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [call(arguments)]}]}
    _, (text,) = load(tmp_path / "d.jsonl", record)
    assert text == f'{ASKED}<call>f {{"town": null, "days": [1, null]}}</call>{END}'
    kind = pyarrow.map_(pyarrow.string(), pyarrow.string())
    columns = {"prompt": ["a"], "completion": ["b"], "documents": pyarrow.array([[[("k", None)]]], pyarrow.list_(kind))}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "m.parquet")
    (row,) = load_rows(tmp_path / "m.parquet", chat_tokenizer(FULL), max_length=200)
    assert '[{"k": null}]' in chat_tokenizer().decode(list(row.prompt_ids))


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"messages": [USER, ASSISTANT], "system": "Be brief."}, turn("system", "Be brief.")),
        ({"prompt": "weather?", "response": "Rain.", "system": "Be brief."}, turn("system", "Be brief.")),
        ({"prompt": [USER], "response": [ASSISTANT], "system_prompt": "Be brief."}, turn("system", "Be brief.")),
        ({"prompt": "weather?", "response": "Rain.", "system": ""}, ""),
        (
            {"prompt": "weather?", "response": "Rain.", "history": [["a", "b"]]},
            turn("user", "a") + turn("assistant", "b"),
        ),
    ],
)
def test_system_and_history_are_turns(tmp_path: Path, row: Any, before: str) -> None:
    assert load(tmp_path / "d.jsonl", row)[1] == [before + ASKED + ANSWERED]


ROW = {"prompt": "weather?", "completion": "Rain."}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (ROW | {"images": ["a.png"]}, "`images` is not used: only text is trained on; remove such rows"),
        (ROW | {"labels": [1]}, "`labels` is not used"),
        (ROW | {"input": "x"}, "`input` is not used: it does not belong beside `prompt`"),
        ({"messages": [USER], "history": [["a", "b"]]}, "`history` is not used"),
        ({"prompt": [USER], "history": [["a", "b"]]}, "`history` needs a `prompt` that is a string"),
        (ROW | {"system": "a", "system_prompt": "b"}, "both `system` and `system_prompt`"),
        (ROW | {"system": 5}, "`system` is a int"),
        (ROW | {"tools": [TOOL], "functions": [TOOL]}, "`tools` and `functions` are both given"),
        (ROW | {"tools": {"a": 1}}, "`tools` is a dict; it must be a list of objects"),
        (ROW | {"tools": "f(x)"}, "`tools` is a string that is not JSON"),
        (ROW | {"tools": [5]}, "`tools` has a int"),
        (ROW | {"chat_template_kwargs": [1]}, "`chat_template_kwargs` is a list"),
        (ROW | {"chat_template_kwargs": {"tools": []}}, "`chat_template_kwargs` has 'tools'"),
        (ROW | {"chat_template_kwargs": {"messages": []}}, "`chat_template_kwargs` has 'messages'"),
        (ROW | {"enable_thinking": "no"}, "`enable_thinking` is 'no'; it must be true or false"),
        (ROW | {"enable_thinking": True, "chat_template_kwargs": {"enable_thinking": False}}, "contradict"),
        (ROW | {"weight": 0.5}, "`weight` is 0.5; it must be 0 or 1"),
        (ROW | {"loss_mask": [0, 1]}, r"`loss_mask` is \[0, 1\]; it must be 0 or 1"),
        (ROW | {"train": "yes"}, "`train` is 'yes'"),
        (ROW | {"train": 1, "loss": False}, "`loss` and `train` contradict each other"),
        ({"messages": [USER, ASSISTANT | {"weight": 2}]}, "a turn of 'assistant' in `messages`: `weight` is 2"),
        ({"messages": [USER | {"loss": True}, ASSISTANT]}, "a turn of 'user' in `messages` is marked to carry"),
        ({"messages": [ASSISTANT | {"loss": 1}, USER, ASSISTANT]}, "the first turn is marked to carry the loss"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "`content` is missing"),
        ({"messages": [USER | {"tool_calls": [call({})]}]}, "only the assistant calls tools"),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [call("f(x)")]}]},
            "`arguments` of 'f' is a string that",
        ),
        ({"messages": [USER, {"role": "assistant", "tool_calls": [call("[1]")]}]}, "`arguments` of 'f' are a list"),
        ({"messages": [USER, {"role": "assistant", "tool_calls": ["f"]}]}, "a tool call is not"),
        (
            {"messages": [USER, ASSISTANT | {"loss": 1}, USER, ASSISTANT], "teacher_prompt": "a"},
            "`teacher_prompt` replaces one prompt, and 2 turns carry the loss",
        ),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(tmp_path: Path, row: Any, text: str) -> None:
    with pytest.raises(DataError, match=text):
        load(tmp_path / "d.jsonl", row)


def test_without_a_chat_template_nothing_can_be_given_to_one(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", ROW | {"tools": [TOOL]})
    with pytest.raises(DataError, match="`tools` given, and the tokenizer has no chat template"):
        load_rows(path, plain_tokenizer(), max_length=99)
    with pytest.raises(ConfigError, match="--enable_thinking: the model's chat template is missing"):
        load_rows(write(path, ROW), plain_tokenizer(), max_length=99, template_kwargs='{"enable_thinking": false}')


def test_variables_of_a_row_win_over_those_of_all_rows(tmp_path: Path) -> None:
    off = "<think></think>"
    records = [ROW, ROW | {"chat_template_kwargs": {"enable_thinking": True}}, ROW | {"enable_thinking": False}]
    _, plain = load(tmp_path / "d.jsonl", *records, template=THINKS)
    assert [off in text.partition("##")[0] for text in plain] == [False, False, True]
    _, all_off = load(tmp_path / "d.jsonl", *records, template=THINKS, template_kwargs='{"enable_thinking": false}')
    assert [off in text.partition("##")[0] for text in all_off] == [True, False, True]
    streamed = StreamedRows(
        [tmp_path / "d.jsonl"], chat_tokenizer(THINKS), max_length=200, template_kwargs='{"enable_thinking": false}'
    )
    tokenizer = chat_tokenizer(THINKS)
    assert [off in tokenizer.decode(list(row.prompt_ids)) for row in streamed] == [True, False, True]
    with pytest.raises(ConfigError, match=r"--enable_thinking: the model's chat template does not use this variable"):
        load(tmp_path / "d.jsonl", ROW, template_kwargs='{"enable_thinking": false}')
    comment = "{# enable_thinking #}" + FULL
    with pytest.raises(ConfigError, match="does not use this variable"):
        load(tmp_path / "d.jsonl", ROW, template=comment, template_kwargs='{"enable_thinking": false}')


def test_flags_of_variables() -> None:
    def parse(*argv: str) -> RunConfig:
        return parse_run_config(["--model", "S", *argv])

    assert parse("--enable_thinking", "false").data.template_kwargs == '{"enable_thinking": false}'
    assert parse("--enable_thinking").data.enable_thinking is True
    assert parse("--enable_thinking", "null").data.enable_thinking is None
    both = parse("--chat_template_kwargs", '{"b": [1], "a": "x"}', "--enable_thinking=true").data.template_kwargs
    assert both == '{"b": [1], "a": "x", "enable_thinking": true}'
    for given, text in {
        "x": "must be a JSON object .*Expecting value",
        "[1]": "must be a JSON object",
        '{"tools": []}': "has tools, which the run sets itself: remove it",
    }.items():
        with pytest.raises(ConfigError, match=f"--chat_template_kwargs.* {text}"):
            parse("--chat_template_kwargs", given)
    with pytest.raises(ConfigError, match="contradict"):
        parse("--chat_template_kwargs", '{"enable_thinking": true}', "--enable_thinking", "false")


ROUNDS = [
    USER,
    {"role": "assistant", "content": "one"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "two"},
]


def marked(first: Any, last: Any, column: Any = None) -> dict[str, Any]:
    turns = [dict(turn) for turn in ROUNDS]
    for number, mark in ((1, first), (3, last)):
        turns[number] |= {} if mark is None else mark
    return {"messages": turns} | (column or {})


@pytest.mark.parametrize(
    ("record", "last_round", "every"),
    [
        (marked(None, None), ["two"], ["one", "two"]),
        (marked({"loss": 1}, None), ["one", "two"], ["one", "two"]),
        (marked({"weight": 0}, None), ["two"], ["two"]),
        (marked({"train": True}, {"train": False}), ["one"], ["one"]),
        (marked(None, {"loss_mask": 0.0}), None, ["one"]),
        (marked(None, None, {"weight": 1}), ["two"], ["one", "two"]),
        (marked({"loss": 1}, None, {"loss_mask": False}), None, None),
        ({"prompt": "weather?", "completion": [{"role": "assistant", "content": "two", "loss": 0}]}, None, None),
        ({"prompt": ROUNDS[:3], "completion": "two"}, ["two"], ["one", "two"]),
    ],
)
def test_which_turns_carry_the_loss(tmp_path: Path, record: Any, last_round: Any, every: Any) -> None:
    for loss_scale, wanted in (("last_round", last_round), ("all", every)):
        rows, texts = load(tmp_path / "d.jsonl", {"prompt": "z", "completion": "y"}, record, loss_scale=loss_scale)
        assert [text.partition("##")[2] for text in texts[1:]] == [f"{word}{END}" for word in wanted or []]
        assert rows.summary.dropped == ({} if wanted else {"marked": 1})
        assert rows.summary.num_more == max(len(wanted or []) - 1, 0)
        for text in texts[1:]:  # the earlier turn has what came before it alone
            assert ("one" in text.partition("##")[0]) == text.endswith(f"two{END}") or "messages" not in record


def test_several_turns_are_not_streamed(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", marked({"loss": 1}, None))
    with pytest.raises(DataError, match=r"2 turns carry the loss, .*--streaming true reads one row a record"):
        StreamedRows([path], chat_tokenizer(), max_length=200)
    flags = ["--model", ".", "--teacher_model", ".", "--dataset", "d.jsonl", "--lmbda", "0", "--streaming"]
    cfg = parse_run_config([*flags, "--loss_scale", "all"])
    with pytest.raises(ConfigError, match=r"--loss_scale all makes a row of every turn .*--streaming true"):
        cfg.validate()


def test_max_rows_counts_turns(tmp_path: Path) -> None:
    rows, _ = load(tmp_path / "d.jsonl", *[marked(None, None)] * 3, loss_scale="all", max_rows=3)
    assert len(rows) == rows.summary.num_used == 3


def test_what_the_template_leaves_out_is_counted(tmp_path: Path) -> None:
    answer = ASSISTANT | {"reasoning": "why", "reasoning_content": "because", "thinking": ""}
    records: list[Any] = [
        {"messages": [{"role": "developer", "content": "Be brief."}, USER, answer], "id": 1, "note": "x"},
        {"messages": [USER, answer], "id": 2, "chat_template_kwargs": {"x": 1}, "tools": [], "documents": [{"a": 1}]},
        {"messages": [USER, ASSISTANT | {"reasoning": "why"}], "teacher_prompt": [USER | {"hint": "y"}]},
    ]
    template = FULL.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}")
    rows, texts = load(tmp_path / "d.jsonl", *records, template=template)
    assert texts[0] == f"{ASKED}<think>because</think>{ANSWERED}"
    assert rows.summary.ignored == {"id": 2, "note": 1}
    assert rows.summary.lost == {
        "`reasoning` of assistant turns": 3,
        "the content of developer turns": 1,
        "the template variable `x`": 1,
        "`hint` of user turns (teacher_prompt)": 1,
    }
    assert "columns that mean nothing here, ignored: id (2), note (1)" in rows.account()
    (warning,) = rows.warnings()
    assert "NOT trained on: `hint` of user turns (teacher_prompt) (1), `reasoning` of assistant turns (3)" in warning
    assert load(tmp_path / "d.jsonl", records[1], template=CHATML)[0].summary.lost == {
        "`reasoning` of assistant turns": 1,
        "`reasoning_content` of assistant turns": 1,
        "`documents`": 1,
        "the template variable `x`": 1,
    }
    streamed = StreamedRows([write(tmp_path / "d.jsonl", *records)], chat_tokenizer(template), max_length=300)
    assert streamed.warnings() == rows.warnings()
    assert "ignored: id (2), note (1)" in streamed.account()


def test_of_several_turns_with_a_key_those_that_lose_it_are_counted(tmp_path: Path) -> None:
    """A template that keeps the reasoning of the last turn alone; with all turns trained each is a last one."""
    turns = [{**turn, "reasoning_content": "why"} if turn["role"] == "assistant" else turn for turn in ROUNDS]
    template = FULL.replace("{% if m.reasoning_content %}", "{% if m.reasoning_content and loop.last %}")
    for loss_scale, lost in (("last_round", {"`reasoning_content` of assistant turns": 1}), ("all", {})):
        rows, texts = load(tmp_path / "d.jsonl", {"messages": turns}, template=template, loss_scale=loss_scale)
        assert rows.summary.lost == lost
        assert texts[-1].endswith(f"##<think>why</think>two{END}")


def test_the_teachers_prompt_has_the_tools_of_its_row(tmp_path: Path) -> None:
    rows, _ = load(tmp_path / "d.jsonl", ROW | {"tools": [TOOL], "teacher_prompt": "secret"})
    ids = rows[0].teacher_prompt_ids
    assert ids is not None
    assert chat_tokenizer().decode(list(ids)) == TOOLS + turn("user", "secret") + "<|im_start|>assistant\n"


def test_prompts_for_sampling_have_what_their_rows_have(tmp_path: Path) -> None:
    """Sampled from the prompt that is trained on, and read back with it, without the flags of the first reading."""
    record = marked({"loss": 0}, None) | {"tools": [TOOL], "system": "s", "enable_thinking": False}
    path, encoder = write(tmp_path / "d.jsonl", record, ROW), ChatEncoder(chat_tokenizer(THINKS))
    wanted = load(path, record, ROW, template=THINKS, template_kwargs='{"enable_thinking": false}')[0]
    found = list(read_prompts([str(path)], encoder, variables={"enable_thinking": False}))
    assert [item.ids for item in found if isinstance(item, Prompt)] == [row.prompt_ids for row in wanted]
    written = [make_row(item, "new", {}) for item in found if isinstance(item, Prompt)]
    again, texts = load(tmp_path / "e.jsonl", *written, template=THINKS, loss_scale="all")
    assert [row.prompt_ids for row in again] == [row.prompt_ids for row in wanted]
    assert all(text.endswith(f"##new{END}") for text in texts)


def test_check_data_says_what_training_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    chat_tokenizer(THINKS).save_pretrained(tmp_path / "model")
    data = write(tmp_path / "d.jsonl", marked({"reasoning": "why"}, None) | {"id": 7})
    line = ["check", "data", "--model", str(tmp_path / "model"), "--dataset", str(data), "--loss_scale", "all"]
    assert cli.main([*line, "--enable_thinking", "false"]) == 0
    out = capsys.readouterr().out
    assert "as further turns         1 of them" in out
    assert "ignored column           id (1)" in out
    assert "LOST in the template     `reasoning` of assistant turns (1)" in out
    assert "prompt  | <think></think>" in out
    write(data, marked(None, {"weight": 0.5}))
    assert cli.main([*line, "--on_bad_row", "stop"]) == 2
    assert "`weight` is 0.5" in capsys.readouterr().err


def test_check_data_finds_what_the_rows_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each as a fault in the first reading would lose it."""
    from megatron_gkd.data import forms, policy

    record = marked(None, None) | {"tools": [TOOL], "system": "Be brief."}
    path, encoder = write(tmp_path / "d.jsonl", record, ROW), ChatEncoder(chat_tokenizer(FULL))
    for module, name, broken in (
        (forms, "template_options", lambda record: {}),
        (forms, "_system", lambda record: []),
        (policy, "read_record", lambda *args: forms.Reading(forms.prompt_and_completion(args[0]), (None,) * 9)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, broken)
            if module is policy:
                patched.setattr(forms.Reading, "pairs", lambda self, loss_scale: [self.pair])
            rows = load_rows(path, encoder.tokenizer, max_length=2000, loss_scale="all")
        problems = check_rows(encoder, rows, [str(path)], loss_scale="all").problems
        assert any(f"{path}:1: " in problem for problem in problems)
