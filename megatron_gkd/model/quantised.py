"""Weights that are stored in fp8 (`--fp8_param_gather`): parameters of the student's linear layers are Transformer
Engine's QuantizedTensor, with the type, shape and device of the plain weight whose place they take.

    real_value(parameter)     the numbers that the forward pass multiplies with, as a plain tensor of its type
    writable(parameter)       plain memory to write a weight into, then
    take(parameter, written)  round it into the parameter

Everything that reads a weight (exports, pushes, checkpoints, checksums) reads `real_value`: so engines sample from the
student that is trained, up to one rounding to its type, and an export is what was evaluated. Main weights are the
optimizer's, and in its part of a checkpoint; they begin with what was written, not with what it was rounded to: what
Transformer Engine keeps of a new parameter for them (`get_high_precision_init_val`) is the memory that is written into.

A plain tensor goes through all three as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fp8_utils import is_float8tensor


def is_quantised(tensor: Any) -> bool:
    """Whether it is a tensor that is stored in fp8, whatever its type says."""
    return isinstance(tensor, torch.Tensor) and bool(is_float8tensor(tensor))


def real_value(parameter: torch.Tensor) -> torch.Tensor:
    """Without a graph; not to be written to."""
    found: Any = parameter.detach()
    plain: torch.Tensor = found.dequantize(dtype=parameter.dtype) if is_quantised(parameter) else found
    return plain


def writable(parameter: Any) -> torch.Tensor:
    """Of a quantised parameter on the CPU: rounding needs all of it at once, and so do its main weights."""
    kept: torch.Tensor | None = parameter
    if is_quantised(parameter):
        kept = parameter.get_high_precision_init_val() if hasattr(parameter, "get_high_precision_init_val") else None
    return torch.empty(parameter.shape, dtype=parameter.dtype) if kept is None else kept


@torch.no_grad()
def take(parameter: torch.Tensor, written: torch.Tensor) -> None:
    """`written`: what `writable` gave."""
    if is_quantised(parameter):
        parameter.copy_(written.to(parameter.device))
