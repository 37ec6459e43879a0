"""Triton kernels of the losses, and the rule by which they are chosen.

    dense.py          divergence from a teacher's logits: softmax statistics, divergence sums, gradient
    launch.py         their launches: tensors in, tensors out, the same values as loss/divergence.py
    topk.py           around a sparse teacher: statistics and gradient outside its support, and the selection of a top K
    launch_topk.py    their launches

Chosen where the tensors are on a CUDA device, triton can be imported, and the logits are float32, bfloat16 or float16,
the dense ones where the divergence is one of `FORMS` besides; float64, everything on CPU, and a formula that the
kernels do not have take the torch path. The rule reads only what is alike on all ranks of a group, because it also
decides the chunk size. An error inside a kernel is an error: there is no second attempt on the torch path.

`forced` is for tests: with True the kernels run wherever they can, Triton's interpreter on CPU included; with False
they never do. This file imports neither triton nor the kernels.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

from megatron_gkd.errors import ConfigError
from megatron_gkd.loss import divergence

FORMS = divergence.KERNEL_FORMS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_forced: bool | None = None


def chosen(device: torch.device, *logits_dtypes: torch.dtype) -> bool:
    """Whether the kernels compute the divergence of logits of these dtypes."""
    fits = all(dtype in _DTYPES for dtype in logits_dtypes)
    if _forced is None:
        return fits and device.type == "cuda" and _has_triton()
    if _forced and not (fits and _has_triton()):
        names = ", ".join(str(dtype) for dtype in logits_dtypes)
        raise ConfigError(
            f"the kernels were forced for logits of {names} ({'with' if _has_triton() else 'without'} triton), "
            f"float32, bfloat16 or float16 and an installed triton are needed; use forced(None)"
        )
    return _forced


@contextmanager
def forced(choice: bool | None) -> Iterator[None]:
    """Overrule the choice inside the block; None: the rule."""
    global _forced
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
