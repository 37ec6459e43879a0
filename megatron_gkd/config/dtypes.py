"""The precisions of a model, by their names in flags. No torch, so that flags are parsed without it.

One default for all commands and scripts: bf16 on CUDA, where fp32 is slow and large, and fp32 on a CPU.
"""

from __future__ import annotations

from typing import Final, Literal

Dtype = Literal["fp32", "bf16", "fp16"]
DtypeChoice = Literal["auto", "fp32", "bf16", "fp16"]
LONG_NAMES: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # as in torch, vLLM and config.json


def chosen(dtype: DtypeChoice, device_kind: str) -> Dtype:
    """What `auto` means on "cuda" or on "cpu"."""
    if dtype != "auto":
        return dtype
    return "bf16" if device_kind == "cuda" else "fp32"
