"""Moves tensors out of device memory and back, bit for bit.

    weights = Parked(lambda: model.parameters(), device)
    weights.leave()         # now in host memory; the device's memory is free
    weights.come_back()     # as before

A storage moves as a whole. Views of it (parameters in a DDP buffer, `main_grad`) remain valid objects but must not be
read meanwhile. Storages are looked up at each `leave`, because an optimizer that loads a checkpoint gets new ones. Each
has its own host buffer, pinned if the device is a GPU, which is reused.

Each move copies all bytes over the bus. Gradients between two steps need not be kept (`keep=False`): nothing is copied,
and they come back as zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


class Parked:
    """A set of tensors on one device. Both methods may be repeated and do not communicate."""

    def __init__(
        self, tensors: Callable[[], Iterable[torch.Tensor]], device: torch.device, *, keep: bool = True
    ) -> None:
        """Args: tensors: those that move; tensors on another device are skipped."""
        self._tensors, self._device, self._keep = tensors, device, keep
        self._away: list[tuple[torch.UntypedStorage, int]] = []  # with its size in bytes
        self._host: dict[torch.UntypedStorage, torch.Tensor] = {}  # its bytes; two views of a storage have one key

    @property
    def num_bytes(self) -> int:
        """Bytes that are in host memory now."""
        return sum(size for _, size in self._away)

    def leave(self) -> None:
        """Move them to host memory and free the device's."""
        if self._away:
            return
        here = (tensor.untyped_storage() for tensor in self._tensors() if tensor.device.type == self._device.type)
        found = dict.fromkeys(storage for storage in here if storage.nbytes())
        self._host = {storage: host for storage, host in self._host.items() if storage in found}
        for storage in found:
            size = storage.nbytes()
            if self._keep:
                if storage not in self._host:
                    pinned = self._device.type == "cuda"
                    self._host[storage] = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
                self._host[storage].copy_(_bytes_of(storage), non_blocking=True)
            self._away.append((storage, size))
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        for storage, _ in self._away:
            storage.resize_(0)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # engines allocate by another allocator, or in another process

    def come_back(self) -> None:
        """Move them back to the device."""
        for storage, size in self._away:
            storage.resize_(size)
            if self._keep:
                _bytes_of(storage).copy_(self._host[storage], non_blocking=True)
            else:
                _bytes_of(storage).zero_()
        self._away.clear()


def _bytes_of(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
