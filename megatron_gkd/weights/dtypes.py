"""Records the dtype of every tensor of a Hugging Face checkpoint beside weights in another format.

A Megatron checkpoint holds one parameter for several Hugging Face tensors, and a model in training has one dtype. So a
conversion records the original dtypes, and converting back restores them:

    {"format": 1, "dtype": "bfloat16", "others": {"model.norm.weight": "float32"}}
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Final

import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.json_file import read_json
from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.hf_files import HFCheckpoint
from megatron_gkd.weights.plan import hf_tensor_shapes
from megatron_gkd.weights.safetensors_format import FLOATS

RECORD_FILE: Final = "hf_dtypes.json"
_NAMES: Final = {str(dtype).removeprefix("torch."): dtype for dtype in FLOATS.values()}


def stored_dtypes(checkpoint: HFCheckpoint, arch: Architecture) -> dict[str, torch.dtype]:
    """The stored dtype of every tensor of the manifest."""
    return {name: checkpoint.dtype(name) for name in hf_tensor_shapes(arch)}


def exact_dtype(dtypes: dict[str, torch.dtype]) -> torch.dtype:
    """The dtype of a model that holds all values exactly: the common one, or float32 for several. Raises
    CheckpointError for float64."""
    found = set(dtypes.values())
    if torch.float64 in found:
        raise CheckpointError("the checkpoint holds float64 tensors, which a model rounds: choose it with --dtype fp32")
    return found.pop() if len(found) == 1 else torch.float32


def write_dtypes(directory: Path, dtypes: dict[str, torch.dtype], arch: Architecture) -> None:
    """Record them in a directory."""
    names = {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
    ((most, _),) = Counter(names.values()).most_common(1)
    record = {"format": 1, "dtype": most, "others": {n: dtype for n, dtype in names.items() if dtype != most}}
    if arch.vision is not None:  # the way back gives the tensors the names that they had
        record["spelling"] = dict(arch.vision.spelling)
    (directory / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def read_dtypes(directory: Path, arch: Architecture) -> dict[str, torch.dtype] | None:
    """The recorded dtypes; None if there is no record."""
    file = directory / RECORD_FILE
    if not file.exists():
        return None
    try:
        record = read_json(file)
        names = {name: record["others"].get(name, record["dtype"]) for name in hf_tensor_shapes(arch)}
        return {name: _NAMES[dtype] for name, dtype in names.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error!r}") from error
