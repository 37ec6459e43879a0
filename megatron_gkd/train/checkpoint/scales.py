"""The scales and histories of delayed scaling (model/delayed_scaling.py) of all layers, in one safetensors file: 20
bytes for each linear layer and row of its history. The ranks of a stage have the same, so the first of each stage gives
them, and any layout takes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file, save

from megatron_gkd.model.delayed_scaling import histories, is_delayed, restore_histories
from megatron_gkd.train.student import Student

SCALES_FILE: Final = "fp8.safetensors"


def own_scales(student: Student | None) -> dict[str, torch.Tensor]:
    """What this rank gives to the file."""
    if student is None or not is_delayed(student.config) or student.groups.tp_dp_cp.rank():
        return {}
    return histories(student.models)


def pack_scales(of_ranks: Sequence[Mapping[str, torch.Tensor]]) -> bytes:
    """The file; empty where there is nothing for it."""
    scales = {name: tensor.contiguous() for given in of_ranks for name, tensor in given.items()}
    return save(scales) if scales else b""


def restore_scales(path: Path, student: Student | None) -> list[str]:
    """Read the file, if it is there, into the student's layers. Returns those that begin anew; none where the student
    has no delayed scaling."""
    if student is None or not is_delayed(student.config):
        return []
    return restore_histories(student.models, load_file(path) if path.exists() else {})
