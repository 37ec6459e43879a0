"""From a record's columns to (prompt, completion): the forms of a row, in one place.

    form       key column       beside it                                the completion
    messages   `messages`                                                a last turn of the assistant
    prompt     `prompt`         `completion` or `response`               a string, or a list with the assistant's turn
    ShareGPT   `conversations`  `system`                                 a last turn of the model
    Alpaca     `instruction`    `input`, `output`, `system`, `history`   `output`

The key column decides. A record with two of them is refused: which one is meant cannot be known. Null columns count as
absent and other columns are ignored, except that a column which holds another form's completion is refused. Without a
completion a row has a prompt only: its completion has to be sampled.

ShareGPT turns are {"from": ..., "value": ...}. Alpaca's prompt is `instruction`, with `input`, unless it is empty, on
the next line; `history` is a list of (question, answer) pairs before it. With `system` or `history` it becomes chat
turns, which need a chat template; without, it is a string.

Text is what can be written in UTF-8: half a surrogate pair ("\\ud800" in JSON) is refused, for no tokenizer takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_gkd.data.chat import Message
from megatron_gkd.data.files import Columns
from megatron_gkd.errors import DataError

Prompt = str | list[Message]
Pair = tuple[Prompt, str | Message | None]

FORMS = (
    "`messages`, `prompt` with `completion` or `response`, `prompt` alone, `conversations` (ShareGPT), or "
    "`instruction` with `input` and `output` (Alpaca)"
)

_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
}
_COMPLETIONS = ("completion", "response", "output")  # of any form


def prompt_and_completion(record: Columns) -> Pair:
    """Raises DataError for a record of no form, or of two."""
    keys = [name for name in _FORMS if name in record]
    if not keys:
        raise DataError(f"columns {sorted(record)} are not a known form; supported: {FORMS}")
    if len(keys) > 1:
        names = " and ".join(f"`{name}`" for name in keys)
        raise DataError(f"columns {names} are two forms at once; remove or rename all but one of them")
    read, columns = _FORMS[keys[0]]
    for name in _COMPLETIONS:
        if name in record and name not in columns:
            raise DataError(f"`{name}` does not belong beside `{keys[0]}` and would be ignored; remove or rename it")
    return read(record)


def prompt_of(column: str, value: Any) -> Prompt:
    """A column that holds a prompt: a string, or chat turns that end with the user's (or a tool's)."""
    return _text(column, value) if isinstance(value, str) else _ended(column, _turns(column, value))


def form_columns(record: Columns) -> tuple[str, ...]:
    """The columns that hold the record's prompt and completion."""
    key = next(name for name in _FORMS if name in record)
    return (key, *_FORMS[key][1])


def _messages(record: Columns) -> Pair:
    return _split("messages", _turns("messages", record["messages"]))


def _prompt_form(record: Columns) -> Pair:
    given = [name for name in ("completion", "response") if name in record]
    if len(given) == 2:
        raise DataError("both `completion` and `response` are given; keep one of them")
    prompt = prompt_of("prompt", record["prompt"])
    if not given:
        return prompt, None
    completion = record[given[0]]
    if isinstance(completion, str):
        return prompt, _text(given[0], completion)
    answer = _turns(given[0], completion)
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise DataError(
            f"`{given[0]}` has turns of {[turn['role'] for turn in answer]}; it must have one, the assistant's"
        )
    return prompt, answer[0]


def _sharegpt(record: Columns) -> Pair:
    turns: list[Message] = []
    for number, turn in enumerate(_list("conversations", record["conversations"]), start=1):
        entry = _entry("conversations", number, turn, ("from", "value"))
        role = _SHAREGPT_ROLES.get(entry["from"])
        if role is None:
            raise DataError(
                f"`conversations`, turn {number} is from {entry['from']!r}; known are {', '.join(_SHAREGPT_ROLES)}"
            )
        turns.append({"role": role, "content": entry["value"]})
    if "system" in record:
        if turns[0]["role"] == "system":
            raise DataError("a system turn stands in `conversations` and in `system`; keep one of them")
        turns.insert(0, _turn("system", _text("system", record["system"])))
    return _split("conversations", turns)


def _alpaca(record: Columns) -> Pair:
    instruction, more = _text("instruction", record["instruction"]), _text("input", record.get("input", ""))
    prompt = "\n".join(part for part in (instruction, more) if part)
    if not prompt:
        raise DataError("`instruction` and `input` are empty; a prompt must have text")
    completion = None if "output" not in record else _text("output", record["output"])
    turns = []
    if record.get("system", "") != "":
        turns.append(_turn("system", _text("system", record["system"])))
    history = record.get("history", [])
    for number, pair in enumerate(_list("history", history) if history != [] else [], start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise DataError(f"`history`, entry {number} must be a pair: a question and its answer")
        turns.append(_turn("user", _text(f"history`, entry {number}: `question", pair[0])))
        turns.append(_turn("assistant", _text(f"history`, entry {number}: `answer", pair[1])))
    if not turns:
        return prompt, completion
    return [*turns, _turn("user", prompt)], None if completion is None else _turn("assistant", completion)


# Key column -> how it is read, and which columns it reads beside itself.
_FORMS: dict[str, tuple[Callable[[Columns], Pair], tuple[str, ...]]] = {
    "messages": (_messages, ()),
    "prompt": (_prompt_form, ("completion", "response")),
    "conversations": (_sharegpt, ("system",)),
    "instruction": (_alpaca, ("input", "output", "system", "history")),
}


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _split(column: str, turns: list[Message]) -> Pair:
    """A last turn of the assistant is the completion."""
    if turns[-1]["role"] != "assistant":
        return _ended(column, turns), None
    if len(turns) == 1:
        raise DataError(f"`{column}` has the assistant's turn only; a prompt must come before it")
    return turns[:-1], turns[-1]


def _ended(column: str, turns: list[Message]) -> list[Message]:
    if turns[-1]["role"] not in ("user", "tool"):
        raise DataError(
            f"`{column}` ends with a turn of {turns[-1]['role']!r}; a prompt ends with a user's turn (or a tool's)"
        )
    return turns


def _turns(column: str, value: Any) -> list[Message]:
    """Checks a list of chat turns; text content only. Further entries of a turn are the chat template's."""
    return [
        _entry(column, number, turn, ("role", "content")) for number, turn in enumerate(_list(column, value), start=1)
    ]


def _list(column: str, value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise DataError(
            f"`{column}` is a {type(value).__name__}{' without turns' if value == [] else ''}; give a list of turns"
        )
    return value


def _entry(column: str, number: int, turn: Any, needed: tuple[str, str]) -> dict[str, Any]:
    if not isinstance(turn, Mapping):
        raise DataError(
            f"`{column}`, turn {number} is a {type(turn).__name__}; give an object with `{needed[0]}` and `{needed[1]}`"
        )
    entries: dict[str, Any] = {name: entry for name, entry in turn.items() if entry is not None}
    for name in needed:
        if not isinstance(entries.get(name), str):
            found = type(entries[name]).__name__ if name in entries else "missing"
            raise DataError(f"`{column}`, turn {number}: `{name}` is {found}; it must be a string (text only)")
        _text(f"{column}`, turn {number}: `{name}", entries[name])
    return entries


def _text(column: str, value: Any) -> str:
    if not isinstance(value, str):
        raise DataError(f"`{column}` is a {type(value).__name__}; it must be a string")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"`{column}` is not text in UTF-8: {error}") from error
    return value
