"""The tokens that end a sampled completion: the one that ends every completion of the training data, and those in the
model's generation_config.json.

A student's export lists all of them in its generation_config.json (`generation_changes`). Otherwise, where the template
ends turns with a token that the source's file does not list, transformers would not stop after the answer.

Only a missing file lists none. A damaged file, or one that lists a token outside the model's vocabulary, is an error:
with a stop token lost, every completion would silently run to its limit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from megatron_gkd.architecture import read_architecture, read_config_json
from megatron_gkd.config.json_file import read_json, shown, whole_number
from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.errors import CheckpointError

GENERATION_CONFIG: Final = "generation_config.json"
_MOST: Final = 1000


def stop_tokens(model: str | Path, encoder: ChatEncoder) -> tuple[int, ...]:
    """Token ids, ascending, for a model's directory. Raises CheckpointError."""
    return tuple(sorted({encoder.end_of_turn_id, *_named(Path(model))}))


def generation_changes(model: str | Path, stop_ids: Sequence[int]) -> dict[str, Any]:
    """Keys to set in an export's generation_config.json so that it lists all of `stop_ids`; {} if it already does.
    Without the file, transformers reads the tokens from config.json.

    Raises CheckpointError.
    """
    model = Path(model)
    named, changes = _named(model), dict[str, Any]()
    if not os.path.lexists(model / GENERATION_CONFIG):
        config = read_config_json(model)
        eos = config.get("eos_token_id")
        named = [token for token in (eos if isinstance(eos, list) else [eos]) if type(token) is int]
        changes = {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}
    missing = [token for token in stop_ids if token not in named]
    return changes | {"eos_token_id": [*named, *missing]} if missing else {}


def _named(model: Path) -> list[int]:
    """`eos_token_id`: absent, null, a token or a list of them."""
    path = model / GENERATION_CONFIG
    if not os.path.lexists(path):
        return []
    try:
        content = read_json(path)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {shown(content)}, not an object")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}), so where completions end is not known: copy the file again, or remove "
            "it where the end of a turn is the only stop token"
        ) from error
    named = content.get("eos_token_id")
    if named is None:
        return []
    tokens = named if isinstance(named, list) else [named]
    most = read_architecture(model).vocab_size - 1
    try:
        if len(tokens) > _MOST:
            raise ValueError(f"{len(tokens)} tokens are too many")
        return [whole_number(token, most) for token in tokens]
    except ValueError as error:
        raise CheckpointError(f"{path}: eos_token_id must name tokens of the model's vocabulary: {error}") from None
