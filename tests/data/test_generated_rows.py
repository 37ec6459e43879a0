"""Drawn rows: every form in every container under several templates, with keys and columns that mean something, with
some that mean nothing, and with some that must be refused. Each row trains on exactly what its conversation says, or is
refused by name; what is not used of it is named with the right count. None is silent.

A conversation is drawn first, as turns, tools and variables, and its text is rendered by jinja alone, without the
package and without transformers. Then it is written down in a form and a container, and read. So nothing of the reading
is used to say what is right.

Not drawn, since no reader could tell: what a container changes when it is written (the order of keys, integers beside
fractions of one field). Each file with columns begins with a row that has all keys, in their order.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import pyarrow
import pyarrow.parquet
import pytest

from megatron_gkd.commands.check_data import check_rows
from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.prompts import Prompt, read_prompts
from megatron_gkd.data.rows import load_rows
from megatron_gkd.data.streaming import StreamedRows
from megatron_gkd.errors import DataError
from tests.data.test_columns import FULL, TEXT_CALLS, THINKS
from tests.support.effort import count
from tests.support.saved_rows import write_saved
from tests.support.tiny_tokenizers import CHATML, chat_tokenizer

NUM_ROWS, ROWS_PER_FILE = count(150, 2600), 6
END = "<|im_end|>"
TEMPLATES = {
    "chatml": CHATML,
    "full": FULL,
    "thinks": THINKS,
    "text calls": TEXT_CALLS,
    "no system": FULL.replace("for m in messages %}", "for m in messages if m.role != 'system' %}"),
    "last reasoning": FULL.replace("if m.reasoning_content %}", "if m.reasoning_content and loop.last %}"),
}
FORMS = ("messages", "conversations", "prompt turns", "prompt", "instruction")
CONTAINERS = ("jsonl", "parquet", "saved")
MARKS = ("loss", "loss_mask", "loss_scale", "weight", "train")
WORDS = ("What is 2 + 3?", "Hello", "\n\n", "\u00e9\U0001f600", "The answer is 5.", " ", "Thank you!", "x")
ARGUMENTS = {"town": "Oslo", "amount": 2, "to": "JPY", "days": [1, 2]}
TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"town": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "g", "parameters": {"properties": {"days": {"items": "integer"}}}}},
]
REFUSED: dict[str, Any] = {
    **dict(images=["a.png"], videos=["a"], audios=["a"], labels=[1], input_ids=[5], weight=0.5),
    **dict(loss_mask=[1, 0], enable_thinking="no", tools="f(x)", chat_template_kwargs="x"),
}
MEANS_NOTHING = {"id": 7, "source": "web", "extra": "y"}


@dataclass
class Style:
    """How one file writes things down: a container has one type for each field."""

    form: str
    container: str
    template: str
    loss_scale: str
    variables: dict[str, Any]
    arguments_as_text: bool
    tools_as: str
    variables_as: str
    mark: str
    flag: Any  # int or bool


@dataclass
class Drawn:
    """A conversation, and what is beside it."""

    turns: list[dict[str, Any]]
    marks: dict[int, int] = field(default_factory=dict)
    mark: int | None = None
    tools: list[Any] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None

    def pairs(self, style: Style) -> list[tuple[list[Any], Any]]:
        """The turns before each completion, and the completion."""
        if self.mark == 0:
            return []
        last, found = len(self.turns) - 1, []
        for number, turn in enumerate(self.turns):
            carries = self.marks.get(number, style.loss_scale == "all" or number == last)
            if turn["role"] == "assistant" and number and carries:
                found.append((self.turns[:number], turn))
        return found if self.turns[-1]["role"] == "assistant" else [*found, (self.turns, None)]

    def options(self, style: Style) -> dict[str, Any]:
        return {**style.variables, **self.variables, **({"tools": self.tools} if self.tools else {})}


def words(rng: random.Random) -> str:
    return "".join(rng.choice(WORDS) for _ in range(rng.randint(1, 4)))


def draw_style(rng: random.Random) -> Style:
    template = rng.choice(list(TEMPLATES))
    thinks = template == "thinks" and rng.random() < 0.5
    return Style(
        rng.choice(FORMS),
        rng.choice(CONTAINERS),
        template,
        rng.choice(["last_round", "all"]),
        {"enable_thinking": rng.random() < 0.5} if thinks else {},
        rng.random() < 0.5,
        rng.choice(["tools", "tools text", "functions", "tool_defs"]),
        rng.choice(["chat_template_kwargs", "chat_template_kwargs text", "enable_thinking"]),
        rng.choice(MARKS),
        rng.choice([int, bool]),
    )


def draw(rng: random.Random, style: Style, *, everything: bool) -> Drawn:
    """A conversation that the form can hold; `everything`: with all keys."""

    def now(share: float) -> bool:
        return everything or rng.random() < share

    turns = [{"role": "system", "content": f"Be brief. {words(rng)}"}] if now(0.3) else []
    by_turn = style.form in ("messages", "conversations", "prompt turns")
    for _ in range(2 if everything else rng.randint(1, 3)):
        turns.append({"role": "user", "content": words(rng)})
        if by_turn and now(0.3):
            kept = {name: value for name, value in ARGUMENTS.items() if now(0.5)} or {"town": "Bergen"}
            if style.container == "jsonl" or style.arguments_as_text:  # a null that somebody wrote
                kept |= {"town": None} if not everything and rng.random() < 0.3 else {}
            call = {"type": "function", "function": {"name": "f", "arguments": kept}}
            turns.append({"role": "assistant", "content": "", "tool_calls": [call]})
            turns.append({"role": "tool", "content": words(rng)})
        turns.append({"role": "assistant", "content": words(rng)})
        for key in ("reasoning_content", "reasoning", "name") if by_turn and now(0.3) else ():
            if now(0.5):
                turns[-1][key] = f"because {words(rng)}"
    drawn = Drawn(turns)
    if not everything and rng.random() < 0.15:
        turns.pop()  # a prompt alone
    if by_turn:
        spoken = [n for n, turn in enumerate(turns) if turn["role"] == "assistant" and n > 0]
        drawn.marks = {n: rng.randint(0, 1) for n in spoken if now(0.2)}
    drawn.mark = 1 if everything else rng.choice([None, None, None, 0, 1])
    drawn.tools = TOOLS if everything else rng.choice([None, TOOLS[:1], TOOLS[1:], TOOLS])
    if now(0.3):
        drawn.variables = {"enable_thinking": rng.random() < 0.5}
        if style.variables_as != "enable_thinking" and now(0.3):
            drawn.variables["v"] = 5
    drawn.beside = {name: value for name, value in MEANS_NOTHING.items() if now(0.2)}
    return drawn


def write_down(drawn: Drawn, style: Style, rng: random.Random) -> dict[str, Any]:
    """The record of a conversation."""
    turns = [dict(turn) for turn in drawn.turns]
    for number, mark in drawn.marks.items():
        turns[number][style.mark] = style.flag(mark)
    for turn in turns:
        if "tool_calls" in turn and style.arguments_as_text:
            (call,) = turn["tool_calls"]
            text = json.dumps(call["function"]["arguments"], ensure_ascii=False)
            turn["tool_calls"] = [{**call, "function": {**call["function"], "arguments": text}}]
    record: dict[str, Any] = dict(drawn.beside)
    if turns[0]["role"] == "system" and (style.form in ("prompt", "instruction") or rng.random() < 0.5):
        record[rng.choice(["system", "system_prompt"])] = turns.pop(0)["content"]
    if style.form == "messages":
        record["messages"] = [openai(turn, rng) for turn in turns]
    elif style.form == "conversations":
        record["conversations"] = [sharegpt(turn) for turn in turns]
    elif style.form == "prompt turns":
        answer = turns.pop() if turns[-1]["role"] == "assistant" else None
        record["prompt"] = [openai(turn, rng) for turn in turns]
        if answer is not None:
            record[rng.choice(["completion", "response"])] = [openai(answer, rng)]
    else:
        answer = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
        question = turns.pop()["content"]
        pairs = [[turns[n]["content"], turns[n + 1]["content"]] for n in range(0, len(turns), 2)]
        record |= {"history": pairs} if pairs else {}
        if style.form == "prompt":
            record["prompt"] = question
            record |= {} if answer is None else {rng.choice(["completion", "response"]): answer}
        else:
            head, line, tail = question.partition("\n")
            whole = not line or not head or not tail
            record |= {"instruction": question} if whole else {"instruction": head, "input": tail}
            record |= {} if answer is None else {"output": answer}
    if drawn.tools:
        bare = [tool["function"] for tool in drawn.tools]
        given = drawn.tools if style.tools_as.startswith("tools") else bare
        record[style.tools_as.split()[0]] = json.dumps(given) if "text" in style.tools_as else given
    if drawn.variables:
        name, text = style.variables_as.split()[0], "text" in style.variables_as
        value = drawn.variables["enable_thinking"] if name == "enable_thinking" else drawn.variables
        record[name] = json.dumps(value) if text else value
    if drawn.mark is not None:
        record[style.mark] = style.flag(drawn.mark)
    return record


def openai(turn: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    rest = {name: value for name, value in turn.items() if name != "content"}
    return rng.choice([turn, rest, {**rest, "content": None}])


def sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    rest = {name: value for name, value in turn.items() if name not in ("role", "content", "tool_calls")}
    if "tool_calls" in turn:
        return {"from": "function_call", "value": json.dumps(turn["tool_calls"][0]["function"])} | rest
    return {"from": names.get(turn["role"], turn["role"]), "value": turn["content"]} | rest


# --- what is right, by jinja alone


class Renderer:
    def __init__(self, name: str) -> None:
        environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
        self._template = environment.from_string(TEMPLATES[name])
        self._text_calls = name == "text calls"

    def __call__(self, turns: list[Any], opens: bool, options: dict[str, Any]) -> str:
        messages = json.loads(json.dumps(turns))
        for call in [call for turn in messages for call in turn.get("tool_calls", ())] if self._text_calls else ():
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return self._template.render(messages=messages, add_generation_prompt=opens, **{"tools": None} | options)

    def row(self, pair: tuple[list[Any], Any], options: dict[str, Any]) -> tuple[str, str | None]:
        """The prompt's text and the completion's."""
        turns, answer = pair
        prompt = self(turns, True, options)
        if answer is None:
            return prompt, None
        whole = self([*turns, answer], False, options)
        assert whole.startswith(prompt)
        return prompt, whole[len(prompt) : whole.rindex(END) + len(END)]

    def lost(self, drawn: Drawn, style: Style) -> Counter[str]:
        """What no row of the conversation shows, by name."""
        options = drawn.options(style)
        shown: set[Any] = set()
        names: dict[Any, str] = {}
        for pair in drawn.pairs(style):
            whole = [*pair[0], *([] if pair[1] is None else [pair[1]])]
            for number, turn in enumerate(whole):
                for key in turn.keys() - {"role"}:
                    if not turn[key] or (key == "content" and not turn[key].strip()):
                        continue
                    other = {k: v for k, v in turn.items() if k != key} | ({"content": ""} if key == "content" else {})
                    changed = [*whole[:number], other, *whole[number + 1 :]]
                    what = "the content" if key == "content" else f"`{key}`"
                    names[number, key] = f"{what} of {turn['role']} turns"
                    opens = pair[1] is None
                    if self(changed, opens, options) != self(whole, opens, options):
                        shown.add((number, key))
            for name in [*(["tools"] if drawn.tools else []), *drawn.variables]:
                names["", name] = "`tools`" if name == "tools" else f"the template variable `{name}`"
                others = {k: v for k, v in options.items() if k != name}
                if (
                    self.row(pair, others) != self.row(pair, options)
                    if pair[1]
                    else (self(pair[0], True, others) != self(pair[0], True, options))
                ):
                    shown.add(("", name))
        return Counter(name for thing, name in names.items() if thing not in shown)


# --- one file


def write(path: Path, records: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
        return path
    columns = dict.fromkeys(name for record in records for name in record)
    records = [{name: record.get(name) for name in columns} for record in records]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        write_saved(path, records)
    return path


def refuse_one(drawn: list[Drawn], records: list[Any], style: Style, rng: random.Random) -> None:
    """Put into one record what must be refused. A column of another type needs a file without types."""
    at = rng.randrange(len(records))
    name = rng.choice(list(REFUSED))
    types_clash = any(name in record for record in records)
    if types_clash and style.container != "jsonl":
        return
    records[at][name], drawn[at].refused = REFUSED[name], name


def check_file(path: Path, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    style = draw_style(rng)
    drawn = [draw(rng, style, everything=number == 0) for number in range(ROWS_PER_FILE)]
    records = [write_down(one, style, rng) for one in drawn]
    if rng.random() < 0.4:
        refuse_one(drawn, records, style, rng)
    path = write(path / {"jsonl": "d.jsonl", "parquet": "d.parquet", "saved": "saved"}[style.container], records)
    tokenizer, render = chat_tokenizer(TEMPLATES[style.template]), Renderer(style.template)
    variables, options = json.dumps(style.variables), dict(max_length=10**5, on_bad_row="skip")
    encoder = ChatEncoder(tokenizer)
    rows = load_rows(path, tokenizer, loss_scale=style.loss_scale, template_kwargs=variables, **options)  # type: ignore[arg-type]

    wanted: list[tuple[str, tuple[str, str | None]]] = []
    lost, ignored, refused = Counter[str](), Counter[str](), [one for one in drawn if one.refused]
    for number, one in enumerate(drawn, start=1):
        if one.refused:
            continue
        wanted += [(f"{path}:{number}", render.row(pair, one.options(style))) for pair in one.pairs(style)]
        lost += render.lost(one, style)
        ignored.update(list(one.beside))
    found = [(rows.place(n), texts(tokenizer, rows[n])) for n in range(len(rows))]
    assert found == wanted
    assert rows.summary.lost == lost
    assert rows.summary.ignored == ignored
    assert rows.summary.dropped.get("malformed", 0) == len(refused)
    for one in refused:
        assert f"`{one.refused}`" in rows.summary.first_dropped["malformed"]
    checked = check_rows(encoder, rows, [str(path)], loss_scale=style.loss_scale, variables=variables)
    assert checked.problems == []
    check_other_readers(path, drawn, style, encoder, list(rows))
    return Counter(
        trained=sum(bool(one.pairs(style)) and not one.refused for one in drawn),
        refused=len(refused),
        lost=lost.total(),
        ignored=ignored.total(),
        left_out=sum(not one.pairs(style) for one in drawn),
    )


def check_other_readers(path: Path, drawn: list[Drawn], style: Style, encoder: ChatEncoder, rows: list[Any]) -> None:
    """Streaming has the same rows, and sampling the same prompts."""
    if style.loss_scale == "last_round" and all(len(one.pairs(style)) == 1 and not one.refused for one in drawn):
        streamed = StreamedRows(
            [path], encoder.tokenizer, max_length=10**5, template_kwargs=json.dumps(style.variables)
        )
        assert list(streamed) == rows
    render = Renderer(style.template)
    for one, item in zip(drawn, read_prompts([str(path)], encoder, variables=style.variables), strict=True):
        if one.refused:
            assert not isinstance(item, Prompt)
            continue
        assert isinstance(item, Prompt)
        turns = one.turns[:-1] if one.turns[-1]["role"] == "assistant" else one.turns
        assert encoder.decode(item.ids) == render(turns, True, one.options(style))


def texts(tokenizer: Any, row: Any) -> tuple[str, str | None]:
    completion = row.completion_ids
    return tokenizer.decode(list(row.prompt_ids)), None if completion is None else tokenizer.decode(list(completion))


def test_every_drawn_row_is_right_or_named(tmp_path: Path) -> None:
    outcomes = Counter[str]()
    for seed in range(-(-NUM_ROWS // ROWS_PER_FILE)):
        (folder := tmp_path / str(seed)).mkdir()
        try:
            outcomes += check_file(folder, seed)
        except BaseException:
            print(f"seed {seed}")
            raise
    assert outcomes["trained"] + outcomes["refused"] + outcomes["left_out"] >= NUM_ROWS, outcomes
    assert min(outcomes.values()) >= NUM_ROWS // 50, outcomes  # every outcome is drawn


def test_a_json_file_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "d.json"
    path.write_text(json.dumps([{"prompt": "a", "completion": "b"}]))
    with pytest.raises(DataError, match=r"d.json: a file of another kind; give a .jsonl file"):
        load_rows(path, chat_tokenizer(), max_length=99)
