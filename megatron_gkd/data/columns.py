"""The columns beside a record's turns, equal for all forms: a known column is used, or refused by name.

    system, system_prompt, history           turns before the others (forms.py)
    tools, functions, tool_defs, documents   given to the chat template with the turns
    chat_template_kwargs, enable_thinking    variables of the chat template: the row's own win over the flags'
    loss, loss_mask, loss_scale,             marks, also of a turn: 0 or 1 (false or true), whether it carries the loss;
      weight, train                          other weights are refused
    images, videos, audios, labels, ...      refused where they hold something: training would go on without them

Any other column is ignored, and said to be. A column that is null, or "", [] or {} where it would hold tools, variables
or turns, says nothing. Tools may be JSON text, whole or one by one; `functions` and `tool_defs` may hold bare ones.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any, Final

from megatron_gkd.config.template_flags import RESERVED
from megatron_gkd.errors import DataError

MARKS: Final = ("loss", "loss_mask", "loss_scale", "weight", "train")
_TOOLS: Final = ("tools", "functions", "tool_defs")
_MEDIA: Final = ("images", "image", "videos", "video", "audios", "audio")
_TURNS: Final = ("input", "history")
_REFUSED: Final = {
    **dict.fromkeys(_MEDIA, "only text is trained on; remove such rows"),
    **dict.fromkeys(("labels", "input_ids"), "tokens are made of the text here; remove or rename the column"),
    **dict.fromkeys(_TURNS, "it does not belong beside `{form}`; write it into the turns, or rename it"),
}
_OWN: Final = ("teacher_prompt", "sampling")  # `sampling`: notes of `megatron-gkd sample`, for people


def refuse_lost(record: Mapping[str, Any], form: str, used: Collection[str]) -> None:
    """Raise DataError for a column that means something and would be lost. `used`: by the form."""
    for name, why in _REFUSED.items():
        if name not in used and record.get(name) not in (None, "", [], {}):
            raise DataError(f"`{name}` is not used: {why.format(form=form)}")


def ignored_columns(record: Mapping[str, Any], used: Collection[str]) -> tuple[str, ...]:
    """The columns that mean nothing here."""
    known = {*used, *_REFUSED, *_TOOLS, *MARKS, *_OWN, "documents", "chat_template_kwargs", "enable_thinking"}
    return tuple(name for name in record if name not in known)


def template_options(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the chat template is given beside the turns: `tools`, `documents`, and its variables by name."""
    options: dict[str, Any] = {}
    given = [name for name in _TOOLS if not _says_nothing(record.get(name))]
    if len(given) > 1:
        raise DataError(f"{' and '.join(f'`{name}`' for name in given)} are both given; keep one of them")
    if given:
        options["tools"] = _tools(given[0], record[given[0]])
    if not _says_nothing(record.get("documents")):
        options["documents"] = _objects("documents", record["documents"])
    return options | _variables(record)


def mark_of(entries: Mapping[str, Any], where: str = "") -> bool | None:
    """Whether a row, or a turn, is marked to carry the loss; None: it is not marked. Raises DataError for a weight."""
    found: dict[str, bool] = {}
    for name in MARKS:
        value = entries.get(name)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"{where}`{name}` is {value!r:.60}; it must be 0 or 1 (false or true), whether this carries the loss: "
                "other weights are not supported"
            )
        found[name] = bool(value)
    if len(set(found.values())) > 1:
        raise DataError(f"{where}{' and '.join(f'`{name}`' for name in found)} contradict each other; keep one of them")
    return next(iter(found.values()), None)


def parse_json(what: str, text: str) -> Any:
    """JSON in a column, in which no key is given twice. Raises DataError."""
    try:
        return json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{what} is a string that is not JSON ({error}): {text!r:.60}") from None


def _variables(record: Mapping[str, Any]) -> dict[str, Any]:
    value = record.get("chat_template_kwargs")
    value = parse_json("`chat_template_kwargs`", value) if isinstance(value, str) and value else value
    if not isinstance(value, Mapping) and not _says_nothing(value):
        raise DataError(f"`chat_template_kwargs` is a {type(value).__name__}; it must be an object, or its JSON")
    variables = dict(value or {})
    for name in variables:
        if name in RESERVED:
            raise DataError(f"`chat_template_kwargs` has {name!r}, which is not the row's to say; remove it")
    thinking = record.get("enable_thinking")
    if thinking is not None:
        if not isinstance(thinking, bool):
            raise DataError(f"`enable_thinking` is {thinking!r:.60}; it must be true or false")
        if variables.setdefault("enable_thinking", thinking) != thinking:
            raise DataError("`enable_thinking` and `chat_template_kwargs` contradict each other; keep one of them")
    return variables


def _tools(name: str, value: Any) -> list[Any]:
    tools = _objects(name, value)
    if name == "tools":
        return tools
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools
    ]


def _objects(name: str, value: Any) -> list[Any]:
    value = parse_json(f"`{name}`", value) if isinstance(value, str) else value
    if not isinstance(value, list):
        raise DataError(f"`{name}` is a {type(value).__name__}; it must be a list of objects, or its JSON")
    items = [parse_json(f"`{name}`", item) if isinstance(item, str) else item for item in value]
    for item in items:
        if not isinstance(item, Mapping):
            raise DataError(f"`{name}` has a {type(item).__name__}; each entry must be an object, or its JSON")
    return items


def _says_nothing(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | Mapping) and not value) or value in ("[]", "{}", "null")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a key is given twice")
    return entries
