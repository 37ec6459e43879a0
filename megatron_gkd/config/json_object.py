"""A flag whose value is a JSON object: names and values that are passed to another library."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from megatron_gkd.errors import ConfigError


def json_object(flag: str, text: str | None, *, example: str, refused: Iterable[str] = ()) -> dict[str, Any]:
    """The object; empty without a value. Raises ConfigError for other JSON, and for names that the run sets itself."""
    if text is None:
        return {}
    asked = f"--{flag} is {text[:200]}; it must be a JSON object such as '{example}'"
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{asked} ({error})") from None
    if not isinstance(values, dict):
        raise ConfigError(asked)
    if taken := sorted(set(refused) & values.keys()):
        names = ", ".join(taken)
        raise ConfigError(f"--{flag} is {text[:200]}; it has {names}, which the run sets itself: remove it")
    return values
