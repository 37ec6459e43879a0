"""A second, independent reading of a record, with which `check data` compares its rows.

Nothing of forms.py, columns.py, turns.py or chat.py is used. The record has been accepted already, so nothing is
validated again. The rest is implemented a second time, as simply as possible: which turns there are, what the template
gets beside them, and which of them are trained on. If a rule changes in only one of the two readings, `check data`
fails.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

_MARKS = ("loss", "loss_mask", "loss_scale", "weight", "train")
_SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"} | {
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}


class Conversation(NamedTuple):
    """One row: the turns before the completion, the completion, and the variables of the template."""

    turns: list[dict[str, Any]]
    answer: dict[str, Any] | None
    options: dict[str, Any]
    text_only: bool  # prompt and completion were strings, with no turn before them


def read_again(
    record: Mapping[str, Any], *, loss_scale: str, variables: Mapping[str, Any], text_arguments: bool
) -> list[Conversation]:
    """The rows that a record stands for; turns have marks no more, and tool calls their arguments as the template wants
    them, as text or as objects."""
    said, text_only = _turns_and_form(record, text_arguments)
    said, text_only = _with_images(said, record), text_only and not _num_images(record)
    if _mark(record) == 0:
        return []
    is_answered = said[-1]["role"] == "assistant"
    trained = [
        number
        for number, turn in enumerate(said)
        if number > 0
        and turn["role"] == "assistant"
        and (_mark(turn) or (_mark(turn) is None and (loss_scale == "all" or number == len(said) - 1)))
    ]
    bare = [{name: value for name, value in turn.items() if name not in _MARKS} for turn in said]
    options = {**variables, **_options(record)}
    rows = [Conversation(bare[:number], bare[number], options, text_only) for number in trained]
    return rows if is_answered else [*rows, Conversation(bare, None, options, text_only)]


def teachers_turns(prompt: Any, turns: list[dict[str, Any]], *, text_arguments: bool) -> list[dict[str, Any]]:
    """The turns of a column `teacher_prompt`. `turns`: the row's own."""
    if isinstance(prompt, str):
        last = max(number for number, turn in enumerate(turns) if turn["role"] == "user")
        return [{**turn, "content": prompt} if number == last else turn for number, turn in enumerate(turns)]
    turns = [_message(turn, text_arguments) for turn in prompt]
    return [{name: value for name, value in turn.items() if name not in _MARKS} for turn in turns]


def _turns_and_form(record: Mapping[str, Any], as_text: bool) -> tuple[list[dict[str, Any]], bool]:
    before = [{"role": "system", "content": record[n]} for n in ("system", "system_prompt") if record.get(n)]
    if "messages" in record:
        return [*before, *(_message(turn, as_text) for turn in record["messages"])], False
    if "conversations" in record:
        return [*before, *(_spoken(turn, as_text) for turn in record["conversations"])], False
    for question, reply in record.get("history") or []:
        before += [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]
    if "instruction" in record:
        question = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
        answer = record.get("output")
    else:
        question, answer = record["prompt"], record.get("completion", record.get("response"))
    text_only = not before and isinstance(question, str)
    if isinstance(question, str):
        said = [*before, {"role": "user", "content": question}]
    else:
        said = [*before, *(_message(turn, as_text) for turn in question)]
    if isinstance(answer, str):
        said.append({"role": "assistant", "content": answer})
    elif answer is not None:
        said.append(_message(answer[0], as_text))
    return said, text_only and not isinstance(answer, list)


def _num_images(record: Mapping[str, Any]) -> int:
    column = record.get("images") or record.get("image") or []
    return len(column) if isinstance(column, list) else 1


def _with_images(said: list[dict[str, Any]], record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Turns in which each `<image>` is a part of its own; without any, the images stand first in the user's turn."""
    number, image = _num_images(record), {"type": "image"}
    if not number or any(isinstance(turn.get("content"), list) for turn in said):
        return said
    if not any("<image>" in turn["content"] for turn in said):
        first = next(index for index, turn in enumerate(said) if turn["role"] == "user")
        said[first] = {**said[first], "content": "<image>" * number + said[first]["content"]}
    found = []
    for turn in said:
        pieces: list[dict[str, str]] = []
        for place, text in enumerate(turn["content"].split("<image>")):
            pieces += ([image] if place else []) + ([{"type": "text", "text": text}] if text else [])
        found.append({**turn, "content": pieces} if image in pieces else turn)
    return found


def _message(turn: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    message = {name: value for name, value in turn.items() if value is not None}
    calls = message.pop("tool_calls", None) or []
    if message.get("function_call"):
        calls = [{"type": "function", "function": message["function_call"]}]
    message.pop("function_call", None)
    if calls:
        calls = json.loads(calls) if isinstance(calls, str) else calls
        message["tool_calls"] = [_call(call, as_text) for call in calls]
        message.setdefault("content", "")
    return message


def _spoken(turn: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    speaker, value = turn["from"], turn["value"]
    rest = {name: entry for name, entry in turn.items() if name not in ("from", "value")}
    message = {"role": _SPEAKERS.get(speaker, speaker), "content": value} | rest
    if speaker == "function_call":
        calls = json.loads(value)
        calls = calls if isinstance(calls, list) else [calls]
        calls = [c if "function" in c else {"type": "function", "function": c} for c in calls]
        message |= {"content": "", "tool_calls": calls}
    return _message(message, as_text)


def _call(call: Mapping[str, Any], as_text: bool) -> dict[str, Any]:
    if "function" in call:
        return dict(call) | {"function": _call(call["function"], as_text)}
    arguments = call.get("arguments") or {}
    if as_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        arguments = json.loads(arguments)
    return dict(call) | {"arguments": arguments}


def _options(record: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for column in ("tools", "functions", "tool_defs"):
        if tools := _parsed(record.get(column)):
            tools = [_parsed(tool) for tool in tools]
            wrap = column != "tools"
            options["tools"] = [
                {"type": "function", "function": t} if wrap and "name" in t and "function" not in t else t
                for t in tools
            ]
    if documents := _parsed(record.get("documents")):
        options["documents"] = [_parsed(document) for document in documents]
    if record.get("enable_thinking") is not None:
        options["enable_thinking"] = record["enable_thinking"]
    return options | (_parsed(record.get("chat_template_kwargs")) or {})


def _parsed(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) and value else value


def _mark(entries: Mapping[str, Any]) -> int | None:
    marks = [int(entries[name]) for name in _MARKS if entries.get(name) is not None]
    return marks[0] if marks else None
