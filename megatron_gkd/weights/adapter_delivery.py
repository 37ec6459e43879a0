"""Delivers an adapter's whole matrices to all ranks, for engines that hold the base (--vllm_enable_lora). Has the
interface of Delivery (delivery.py).

    for tensors, sums in AdapterDelivery(chunks, arch, groups):     # one layer each; collective over intra_dist_opt

The checksums are the first rank's. If another rank was sent something else, loading it fails and names the tensor.

Communication of a pass: per layer that of `collect` (adapters.py) and one broadcast of the checksums.
Memory: one layer's adapters, and what the engine keeps of the pass: all adapters, on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from megatron_gkd.architecture import Architecture
from megatron_gkd.parallel.together import from_first
from megatron_gkd.weights.adapters import collect
from megatron_gkd.weights.checksum import Sums, Tensors, checksum
from megatron_gkd.weights.chunks import settle


class AdapterDelivery:
    """Iterate on every rank of the model, all replicas; any number of times."""

    def __init__(self, chunks: Sequence[torch.nn.Module], arch: Architecture, groups: Any) -> None:
        self._chunks, self._arch, self._groups = chunks, arch, groups

    def __iter__(self) -> Iterator[tuple[Tensors, Sums]]:
        settle(self._chunks)
        for layer in collect(self._chunks, self._arch, self._groups):
            if layer:
                own = {name: checksum(tensor) for name, tensor in layer.items()}
                yield [*layer.items()], from_first(own, self._groups.intra_dist_opt)
