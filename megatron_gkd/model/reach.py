"""The longest sequence that a model was made for, according to its config.json.

    max_position_embeddings, or more under RoPE scaling: `linear` multiplies it by `factor`, `yarn` multiplies
    `original_max_position_embeddings`; for `llama3` max_position_embeddings already includes the scaling.

A longer sequence runs, but its later positions have rotary angles that the model has not seen.
"""

from __future__ import annotations

from pathlib import Path

from megatron_gkd.architecture import Architecture, read_config_json
from megatron_gkd.model.vision_config import FAMILIES


def reach(path: str | Path, arch: Architecture) -> int:
    """The most positions. `arch` is the architecture of the same directory."""
    raw, most = read_config_json(path), arch.max_position_embeddings
    raw = raw if arch.vision is None else FAMILIES[arch.vision.family].decoder_options(raw)
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    factor = scaling.get("factor") or 1.0
    if scaling.get("rope_type", scaling.get("type")) == "linear":
        return max(most, int(most * factor))
    return max(most, int((scaling.get("original_max_position_embeddings") or 0) * factor))
