"""One turn of a conversation, in OpenAI's or ShareGPT's format, from JSON or from a container with columns.

    content       text; for an assistant's turn with tool calls it may be null or missing, which is no text: ""
    tool_calls    a list of {"function": {"name": ..., "arguments": ...}}; arguments are an object or its JSON text, as
                  OpenAI writes it, and are given to the template as `Arguments`: an object that keeps its text
    function_call the older form, {"name": ..., "arguments": ...}: one tool call
    ShareGPT      {"from": ..., "value": ...}; one from `function_call` holds the JSON of a call or of several

Further entries of a turn are the chat template's (left_out.py says which it does not use). Text is what can be written
in UTF-8: half a surrogate pair ("\\ud800" in JSON) is refused, for no tokenizer takes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from megatron_gkd.data.columns import parse_json
from megatron_gkd.errors import DataError

SHAREGPT_ROLES: Final = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    "function_call": "assistant",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}


class Arguments(dict[str, Any]):
    """A tool call's arguments: an object for templates that write it as JSON, and `text` for those that want text."""

    def __init__(self, entries: Mapping[str, Any], text: str | None = None) -> None:
        super().__init__(entries)
        self.text = json.dumps(entries, ensure_ascii=False) if text is None else text


def read_turn(column: str, number: int, turn: Any) -> dict[str, Any]:
    """A turn with `role` and `content`. Raises DataError."""
    where = f"`{column}`, turn {number}"
    entries = _entries(where, turn, ("role", "content"))
    _read_calls(where, entries)
    if entries.get("role") == "assistant" and "tool_calls" in entries:
        entries.setdefault("content", "")
    for name in ("role", "content"):
        _check_text(where, name, entries)
    return entries


def read_sharegpt_turn(column: str, number: int, turn: Any) -> dict[str, Any]:
    """A turn with `from` and `value` as one with `role` and `content`. Raises DataError."""
    where = f"`{column}`, turn {number}"
    entries = _entries(where, turn, ("from", "value"))
    for name in ("from", "value"):
        _check_text(where, name, entries)
    said_by, value = entries.pop("from"), entries.pop("value")
    if said_by not in SHAREGPT_ROLES:
        raise DataError(f"{where} is from {said_by!r}; known are {', '.join(SHAREGPT_ROLES)}")
    for name in ("role", "content"):
        if name in entries:
            raise DataError(f"{where} has `{name}` beside `from` and `value`; remove it")
    message = {"role": SHAREGPT_ROLES[said_by], "content": value, **entries}
    if said_by == "function_call":
        if "tool_calls" in message or "function_call" in message:
            raise DataError(f"{where} is a call and has others beside it; keep one of them")
        calls = parse_json(f"{where}: `value` of a function_call", value)
        bare = calls if isinstance(calls, list) else [calls]
        calls = [{"type": "function", "function": call} if _is_bare(call) else call for call in bare]
        message |= {"content": "", "tool_calls": calls}
    _read_calls(where, message)
    return message


def check_utf8(column: str, value: str) -> str:
    """The text, which a tokenizer can take. Raises DataError."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"`{column}` is not text in UTF-8: {error}") from error
    return value


def with_text_arguments(message: Mapping[str, Any]) -> dict[str, Any]:
    """The turn for a template that wants the arguments of its calls as text."""
    calls = []
    for call in message.get("tool_calls", ()):
        holder = call.get("function", call)
        given = holder.get("arguments")
        holder = {**holder, "arguments": given.text} if isinstance(given, Arguments) else holder
        calls.append({**call, "function": holder} if "function" in call else holder)
    return {**message, "tool_calls": calls} if calls else dict(message)


def _entries(where: str, turn: Any, needed: tuple[str, str]) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(f"{where} is a {type(turn).__name__}; give an object with `{needed[0]}` and `{needed[1]}`")
    return {name: entry for name, entry in turn.items() if entry is not None}


def _check_text(where: str, name: str, entries: Mapping[str, Any]) -> None:
    if not isinstance(entries.get(name), str):
        found = type(entries[name]).__name__ if name in entries else "missing"
        raise DataError(f"{where}: `{name}` is {found}; it must be a string (text only)")
    check_utf8(f"{where[1:]}: `{name}", entries[name])


def _read_calls(where: str, entries: dict[str, Any]) -> None:
    """Puts the calls of a turn in one form."""
    older, calls = entries.pop("function_call", None), entries.pop("tool_calls", None)
    calls = parse_json(f"{where}: `tool_calls`", calls) if isinstance(calls, str) and calls else calls
    if older:
        if calls:
            raise DataError(f"{where} has `tool_calls` and `function_call`; keep one of them")
        calls = [{"type": "function", "function": older}]
    if not calls:
        return
    if entries.get("role") != "assistant":
        raise DataError(f"{where} has tool calls and is of {entries.get('role')!r}; only the assistant calls tools")
    if not isinstance(calls, list):
        raise DataError(f"{where}: `tool_calls` is a {type(calls).__name__}; it must be a list")
    entries["tool_calls"] = [_call(where, call) for call in calls]


def _is_bare(call: Any) -> bool:
    """`{"name": ...}` without the `function` around it, which templates expect."""
    return isinstance(call, Mapping) and "name" in call and "function" not in call


def _call(where: str, call: Any) -> dict[str, Any]:
    holder = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(holder, Mapping) or not isinstance(holder.get("name"), str):
        raise DataError(f'{where}: a tool call is not {{"function": {{"name": ..., "arguments": ...}}}}: {call!r:.60}')
    given = holder.get("arguments")
    text = given if isinstance(given, str) else None
    entries = parse_json(f"{where}: `arguments` of {holder['name']!r}", text) if text else given or {}
    if not isinstance(entries, Mapping):
        raise DataError(f"{where}: `arguments` of {holder['name']!r} are a {type(entries).__name__}, not an object")
    read = {**holder, "arguments": Arguments(entries, text or None)}
    return {**call, "function": read} if "function" in call else read
