"""The bytes of a tensor in host memory, for files: read into, or written, without a copy."""

from __future__ import annotations

import ctypes

import torch


def memory_of(tensor: torch.Tensor) -> memoryview:
    """Of a contiguous tensor, which has to stay alive as long as the view is used.

    `Tensor.numpy()` would mark its storage as one that cannot be resized any more, and what is offloaded
    (model/parked.py) is.
    """
    assert tensor.device.type == "cpu", tensor.device
    assert tensor.is_contiguous(), tensor.shape
    if not tensor.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
