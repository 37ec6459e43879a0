"""The precisions of a model, by the names that flags give them. No torch, so that flags are parsed without it."""

from __future__ import annotations

from typing import Final, Literal

Dtype = Literal["fp32", "bf16", "fp16"]
LONG_NAMES: Final = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # in torch, vLLM and config.json
