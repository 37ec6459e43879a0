"""Where a completion ends: at the token that ends a turn, and at those that the model's generation config names."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.errors import ConfigError


def stop_tokens(model: str | Path, encoder: ChatEncoder) -> tuple[int, ...]:
    """Token ids, ascending, of a model's directory. Raises ConfigError where its generation_config.json is damaged."""
    path = Path(model) / "generation_config.json"
    named = None
    if path.is_file():
        try:
            named = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{path} cannot be read ({error}); copy it from the model again, or remove it") from error
    ids = named if isinstance(named, list) else [] if named is None else [named]
    if not all(type(token) is int for token in ids):
        raise ConfigError(f"{path} has eos_token_id {named!r}; a token id or a list of them is needed")
    return tuple(sorted({encoder.end_of_turn_id, *ids}))
