"""Keeps the weights of frozen model chunks in host memory, except while they are used.

    weights = HostWeights(chunks, device)      # now in host memory; the device's is free
    with weights:                              # one copy of everything to the device, one buffer per dtype
        ...forward passes...

Frozen weights never change, so nothing is copied back. Between uses a parameter is an empty tensor; entering restores
its shape. Host memory holds one pinned buffer per dtype, so that the copy runs at the speed of the bus. Buffers of the
modules (rotary frequencies) stay on the device.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_gkd.observe.logging import get_logger

logger = get_logger(__name__)


class HostWeights:
    """A context manager that can be used repeatedly, but not nested."""

    def __init__(self, chunks: Sequence[torch.nn.Module], device: torch.device) -> None:
        """Move the weights to host memory. Raises AssertionError for a parameter that is trained."""
        parameters = list(dict.fromkeys(p for chunk in chunks for p in chunk.parameters()))
        assert not any(p.requires_grad for p in parameters), "only frozen weights can be copied one way"
        self._device = device
        before = _allocated(device)
        self._parts: list[tuple[torch.Tensor, list[tuple[torch.nn.Parameter, torch.Size]]]] = []
        for dtype in dict.fromkeys(p.dtype for p in parameters):
            members = [p for p in parameters if p.dtype == dtype]
            host = torch.empty(sum(p.numel() for p in members), dtype=dtype, pin_memory=device.type == "cuda")
            for piece, parameter in zip(host.split([p.numel() for p in members]), members, strict=True):
                piece.copy_(parameter.detach().reshape(-1))
            self._parts.append((host, [(p, p.shape) for p in members]))
        self._release()
        self.num_bytes = sum(host.nbytes for host, _ in self._parts)
        logger.info(
            "teacher's weights: %.1f MB in host memory; device memory %.1f -> %.1f MB",
            self.num_bytes / 1e6,
            before / 1e6,
            _allocated(device) / 1e6,
        )

    def __enter__(self) -> None:
        for host, members in self._parts:
            on_device = torch.empty_like(host, device=self._device, pin_memory=False)
            on_device.copy_(host, non_blocking=True)
            pieces = on_device.split([shape.numel() for _, shape in members])
            for (parameter, shape), piece in zip(members, pieces, strict=True):
                parameter.data = piece.view(shape)
        logger.debug("teacher's weights on the device: %.1f MB allocated", _allocated(self._device) / 1e6)

    def __exit__(self, *_: object) -> None:
        self._release()
        logger.debug("teacher's weights in host memory: %.1f MB allocated", _allocated(self._device) / 1e6)

    def _release(self) -> None:
        for host, members in self._parts:
            for parameter, _ in members:
                parameter.data = torch.empty(0, dtype=host.dtype, device=self._device)


def _allocated(device: torch.device) -> int:
    """Bytes allocated to tensors on the device; on a CPU, the process's resident set size."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096
