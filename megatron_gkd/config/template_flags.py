"""The flags that give a chat template its variables: `--chat_template_kwargs` (JSON) and `--enable_thinking`.

They hold for all rows; a row's own columns take precedence (data/columns.py). Both become one JSON text, in the given
order, which is part of the key of tokenised rows (data/row_key.py).
"""

from __future__ import annotations

import json
from typing import Any, Final

from megatron_gkd.config.json_object import json_object
from megatron_gkd.config.schema import setting
from megatron_gkd.errors import ConfigError

# Set by the renderer itself or by a column: a variable of this name would not reach the template as intended.
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
    example = '{"enable_thinking": false}'
    variables = json_object("chat_template_kwargs", given, example=example, refused=RESERVED)
    if enable_thinking is not None and variables.setdefault("enable_thinking", enable_thinking) != enable_thinking:
        raise ConfigError("--enable_thinking and --chat_template_kwargs contradict each other; keep one of them")
    return json.dumps(variables)
