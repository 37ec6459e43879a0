"""The flags that give a chat template its variables: `--chat_template_kwargs` (JSON) and `--enable_thinking`.

They hold for all rows; a row's own columns win (data/columns.py). Both are made into one JSON text, in the order given,
which is part of what tokenised rows are known by.
"""

from __future__ import annotations

import json
from typing import Any, Final

from megatron_gkd.config.schema import setting
from megatron_gkd.errors import ConfigError

_EXAMPLE: Final = '{"enable_thinking": false}'
# What the renderer itself, or a column, gives a template: no variable of this name would reach it as it was meant.
RESERVED: Final = frozenset(
    (
        *("messages", "conversation", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "raise_exception", "strftime_now"),
    )
)


def kwargs_setting() -> Any:
    """The field of --chat_template_kwargs."""
    return setting(
        None,
        "Variables of the chat template for all rows, as a JSON object; a column `chat_template_kwargs` of a row wins.",
    )


def thinking_setting() -> Any:
    """The field of --enable_thinking."""
    return setting(
        None, "The same for the variable enable_thinking, which chat templates of reasoning models have; null: not set."
    )


def template_kwargs(given: str | None, enable_thinking: bool | None) -> str:
    """Both flags as the JSON of an object, "{}" without them. Raises ConfigError."""
    asked = f"--chat_template_kwargs is {given}; it must be a JSON object such as '{_EXAMPLE}'"
    try:
        variables = {} if given is None else json.loads(given)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{asked} ({error})") from None
    if not isinstance(variables, dict):
        raise ConfigError(asked)
    for name in variables:
        if name in RESERVED:
            raise ConfigError(f"{asked}, and {name} is not a variable that can be given; remove it")
    if enable_thinking is not None and variables.setdefault("enable_thinking", enable_thinking) != enable_thinking:
        raise ConfigError("--enable_thinking and --chat_template_kwargs contradict each other; keep one of them")
    return json.dumps(variables)
