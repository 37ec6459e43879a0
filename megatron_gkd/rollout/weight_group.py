"""A process group of one trainer rank and the workers of a server on other machines, independent of all other groups.

    rank 0: the trainer rank that pushes      ranks 1 .. n: the server's workers      collectives: broadcast from 0

It is constructed directly as a backend over a TCP store that rank 0 serves. Neither side's default process group takes
part or is changed, so vLLM and the trainer may have any worlds. Gloo for host memory, NCCL for CUDA.

NCCL has not been run yet.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]  # exported, but not by name

from megatron_gkd.parallel.layout import round_up
from megatron_gkd.weights.checksum import Tensors

Backend = Literal["gloo", "nccl"]
_ALIGNMENT = 64  # bytes


def serve_store(timeout_s: float) -> TCPStore:
    """The rendezvous store of the ranks, on a free port of this process (`store.port`)."""
    return TCPStore(
        "localhost", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), use_libuv=True
    )


def join_store(host: str, port: int, timeout_s: float) -> TCPStore:
    """The same store, from another process."""
    return TCPStore(
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=timeout_s), use_libuv=True
    )


def make_group(
    store: TCPStore, *, rank: int, size: int, backend: Backend, address: str, key: str, timeout_s: float
) -> Any:
    """The group; returns when all ranks have joined. `address` is this rank's address, which the others can reach;
    `key` is new for every group on one store."""
    timeout = timedelta(seconds=timeout_s)
    prefixed = PrefixStore(key, store)
    if backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(prefixed, rank, size, options)
    gloo: Any = dist.ProcessGroupGloo
    gloo_options = gloo._Options()
    gloo_options._devices = [gloo.create_device(hostname=address)]
    gloo_options._timeout = timeout
    return gloo(prefixed, rank, size, gloo_options)


def start_broadcast(group: Any, flat: torch.Tensor) -> Any:
    """Communication: broadcast of `flat` (bytes, overwritten on ranks other than 0) from rank 0; returns the work."""
    options = dist.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return group.broadcast([flat], options)


def own_address(peer_host: str, peer_port: int) -> str:
    """This machine's address for connections to the peer. Nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(peer_host, peer_port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def flatten(tensors: Tensors, device: torch.device) -> tuple[torch.Tensor, list[list[Any]]]:
    """(bytes [n], rows of name, dtype, shape, first byte), with each tensor aligned."""
    layout: list[list[Any]] = []
    end = 0
    for name, tensor in tensors:
        layout.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), end])
        end += round_up(tensor.nbytes, _ALIGNMENT)
    flat = torch.zeros(end, dtype=torch.uint8, device=device)
    for (_, tensor), (_, _, _, start) in zip(tensors, layout, strict=True):
        raw = as_bytes(tensor)
        flat[start : start + raw.numel()].copy_(raw)
    return flat, layout


def unflatten(flat: torch.Tensor, layout: Sequence[Sequence[Any]]) -> list[tuple[str, torch.Tensor]]:
    """The tensors, as views of the buffer."""
    tensors = []
    for name, dtype_name, shape, start in layout:
        dtype = getattr(torch, dtype_name)
        num_bytes = torch.Size(shape).numel() * dtype.itemsize
        tensors.append((name, flat[start : start + num_bytes].view(dtype).view(shape)))
    return tensors


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)
