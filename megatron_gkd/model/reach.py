"""How long the sequences are that a model was made for, as its config.json says.

    max_position_embeddings, or what its RoPE scaling makes of it: `linear` and `yarn` stretch the positions by `factor`
    (yarn from `original_max_position_embeddings`), `llama3` stands in max_position_embeddings already.

A longer sequence runs, and its later positions are turned by angles that the model has not seen.
"""

from __future__ import annotations

from pathlib import Path

from megatron_gkd.architecture import Architecture, read_config_json
from megatron_gkd.model.vision_config import FAMILIES


def reach(path: str | Path, arch: Architecture) -> int:
    """Most positions. `arch` is what was read, and so checked, from the same directory."""
    raw, most = read_config_json(path), arch.max_position_embeddings
    raw = raw if arch.vision is None else FAMILIES[arch.vision.family].decoder_options(raw)
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    factor = scaling.get("factor") or 1.0
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return max(most, int(most * factor))
    return max(most, int((scaling.get("original_max_position_embeddings") or 0) * factor))
