"""Conversion by NVIDIA's megatron-bridge, for families that are not in our map. Optional; imported on use.

The package needs Transformer Engine, so a GPU, and its own versions of other libraries; no requirements file here lists
it. It writes and reads ITS checkpoint format (a directory of iterations).

Families in our map are refused. The library has silently converted some of them wrongly (llama3 and yarn RoPE, a
dropped o_proj bias, padded vocabularies), and our map is checked against transformers. The library's results are not
checked: not by tests, which never import it, and not by --check.

Written from its source (AutoBridge.import_ckpt and export_ckpt, 0.6); never run here.
"""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Literal

from megatron_gkd.architecture import SUPPORTED_MODEL_TYPES, read_config_json
from megatron_gkd.errors import CheckpointError, ConfigError
from megatron_gkd.weights.hf_files import has_safetensors
from megatron_gkd.weights.hf_writer import check_destination

MODULE: Final = "megatron.bridge"


def convert_with_megatron_bridge(
    to: Literal["megatron", "hf"], model: str | Path, save: str | Path, *, hf_config: str | Path | None
) -> None:
    """One process. `hf_config`, with to="hf": the Hugging Face directory that the Megatron checkpoint came from."""
    model, save = Path(model), Path(save)
    if to == "hf" and hf_config is None:
        raise ConfigError(
            "--bridge megatron_bridge --to hf needs --hf_config, the Hugging Face directory that the model came from"
        )
    source = model if to == "megatron" else Path(str(hf_config))
    _check_source(source, needs_weights=to == "megatron")
    check_destination(save)
    bridge = _auto_bridge()
    save.parent.mkdir(parents=True, exist_ok=True)
    temporary = save.parent / f".{save.name}.incomplete"
    shutil.rmtree(temporary, ignore_errors=True)  # of an interrupted conversion to the same place
    try:
        if to == "megatron":
            bridge.import_ckpt(str(source), str(temporary), trust_remote_code=False)
        else:
            loaded = bridge.from_hf_pretrained(str(source), trust_remote_code=False)
            loaded.export_ckpt(str(model), str(temporary), show_progress=False, strict=True)
        check_destination(save)
        os.rename(temporary, save)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_source(path: Path, *, needs_weights: bool) -> None:
    raw = read_config_json(path)
    if raw.get("model_type") in SUPPORTED_MODEL_TYPES:
        raise ConfigError(
            f"{path}: {raw['model_type']} is in this package's own map, which is checked: leave out --bridge"
        )
    if raw.get("auto_map"):
        raise CheckpointError(f"{path}: config.json asks for remote code (auto_map), which is never run")
    if needs_weights and not has_safetensors(path):
        raise CheckpointError(f"{path} has no safetensors; pickled weights are never opened (unpickling runs code)")


def _auto_bridge() -> Any:
    if find_spec(MODULE) is None:
        raise ConfigError(
            "--bridge megatron_bridge: the package megatron-bridge is not installed; it needs Transformer Engine and a "
            "GPU, in an environment of its own. Families that need no bridge: " + ", ".join(SUPPORTED_MODEL_TYPES)
        )
    try:
        from megatron.bridge import AutoBridge
    except ImportError as error:
        raise ConfigError(f"--bridge megatron_bridge: megatron-bridge cannot be imported here: {error}") from error
    return AutoBridge
