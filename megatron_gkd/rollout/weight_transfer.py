"""Transfers a bucket of weights to a server's workers, which are told by `/collective_rpc` to fetch it.

    shm     same machine: a safetensors file per bucket in /dev/shm, readable by this user only, in a private directory
            (owned.py); the worker is told DIRECTORY/FILE, never a path
    group   another machine: a broadcast in a process group of this rank and the workers (weight_group.py)

In both, a bucket is in flight while the caller prepares the next: at most two exist at a time, and a failure is raised
by the next call at the latest (`send` or `finish`). The checksums go with the request, and the worker verifies them.
Files are always removed: after each bucket, in `cancel`, in `close`, and after a kill by the next run.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import torch

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.owned import SHM_ROOT, private_directory
from megatron_gkd.rollout.weight_group import (
    Backend,
    as_bytes,
    flatten,
    make_group,
    own_address,
    serve_store,
    start_broadcast,
)
from megatron_gkd.weights.checksum import Sums, Tensors
from megatron_gkd.weights.safetensors_format import TensorSpec, write_header

Answer = concurrent.futures.Future[Any]
Call = Callable[[str, list[Any], str], Answer]  # starts a method of all workers: its name, arguments, and description

SHM_PREFIX: Final = "gkd-weights"
_ALIGNMENT: Final = 64
_POLL_S: Final = 0.0005


class Transfer(Protocol):
    """A way to transfer weights to the workers; used by one thread."""

    def send(self, tensors: Tensors, sums: Sums) -> None:
        """Transfer a bucket. Raises the previous bucket's error, too."""

    def finish(self) -> None:
        """Wait until the workers have taken everything."""

    def cancel(self) -> None:
        """Drop what is in flight, after a failure. Does not raise."""

    def close(self) -> None:
        """Clean up. Idempotent; does not raise."""


class ShmTransfer:
    """Files in shared memory. Tensors are copied straight into the mapped file."""

    def __init__(self, call: Call, *, root: str = SHM_ROOT) -> None:
        self._call = call
        self.directory = private_directory(SHM_PREFIX, root)
        self._under_way: tuple[Answer, str] | None = None
        self._num_buckets = 0

    def send(self, tensors: Tensors, sums: Sums) -> None:
        path = os.path.join(self.directory, f"bucket{self._num_buckets}.safetensors")
        self._num_buckets += 1
        try:
            write_safetensors(path, tensors)
            self.finish()  # the bucket before this one
            self._under_way = (self._call("gkd_bucket_file", [_name(path), dict(sums)], _what(tensors)), path)
        except BaseException:
            _remove(path)
            raise

    def finish(self) -> None:
        if self._under_way is not None:
            (answer, path), self._under_way = self._under_way, None
            try:
                answer.result()
            finally:
                _remove(path)

    def cancel(self) -> None:
        with contextlib.suppress(Exception, concurrent.futures.CancelledError):
            self.finish()

    def close(self) -> None:
        if self._under_way is not None:
            self._under_way[0].cancel()
            self._under_way = None
        shutil.rmtree(self.directory, ignore_errors=True)


class GroupTransfer:
    """Broadcasts of one flat buffer per bucket. The group is made with the first bucket, and again after a failure."""

    def __init__(
        self,
        call: Call,
        *,
        server_host: str,
        num_workers: int,
        backend: Backend,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self._call, self._num_workers, self._timeout_s = call, num_workers, timeout_s
        self._backend, self._device = backend, device
        self._address = own_address(server_host, 1)
        self._store = serve_store(timeout_s)
        self._group: Any = None
        self._num_groups = 0
        self._under_way: Answer | None = None

    def send(self, tensors: Tensors, sums: Sums) -> None:
        flat, layout = flatten(tensors, self._device)
        self.finish()
        if self._group is None:
            self._join()
        self._under_way = self._call("gkd_bucket_group", [layout, flat.numel(), dict(sums)], _what(tensors))
        work = start_broadcast(self._group, flat)
        while not work.is_completed():
            if self._under_way.done() and self._under_way.exception() is not None:
                break  # a worker did not come to the broadcast; `finish` says why
            time.sleep(_POLL_S)
        else:
            work.wait()
            return
        self._group = None
        self.finish()

    def finish(self) -> None:
        if self._under_way is not None:
            answer, self._under_way = self._under_way, None
            answer.result()

    def cancel(self) -> None:
        self._group = None  # the next update makes a new one: this one may be out of step
        with contextlib.suppress(Exception, concurrent.futures.CancelledError):
            self.finish()

    def close(self) -> None:
        if self._under_way is not None:
            self._under_way.cancel()
            self._under_way = None
        self._group = None

    def _join(self) -> None:
        self._num_groups += 1
        key = f"group{self._num_groups}"
        arguments = [self._address, self._store.port, key, 1 + self._num_workers, self._backend, self._timeout_s]
        answer = self._call("gkd_group_join", arguments, "join the process group for weights")
        try:
            self._group = make_group(
                self._store,
                rank=0,
                size=1 + self._num_workers,
                backend=self._backend,
                address=self._address,
                key=key,
                timeout_s=self._timeout_s,
            )
        except RuntimeError as error:
            if answer.done():
                answer.result()
            raise RolloutError(
                f"no process group for weights with the server's {self._num_workers} workers, which must reach this "
                f"machine at {self._address}, port {self._store.port}: {str(error).splitlines()[0]}"
            ) from error
        answer.result()


def write_safetensors(path: str, tensors: Tensors) -> None:
    """A safetensors file that only its owner can read. The tensors are copied into it directly (one copy, from any
    device)."""
    in_order = sorted(tensors, key=lambda item: -item[1].element_size())  # so that all are aligned
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in in_order]
    header = write_header(specs, alignment=_ALIGNMENT)
    num_bytes = len(header) + sum(spec.num_bytes for spec in specs)
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(header)
        os.posix_fallocate(handle, 0, num_bytes)  # a full /dev/shm is an error here, not a SIGBUS below
    rest = torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)[len(header) :]
    for spec, (_, tensor) in zip(specs, in_order, strict=True):
        rest[: spec.num_bytes].copy_(as_bytes(tensor))
        rest = rest[spec.num_bytes :]


def can_be_read_by(call: Call, *, root: str = SHM_ROOT) -> bool:
    """Whether every worker sees this process's files in shared memory: it is on the same machine and in the same
    container."""
    directory = private_directory(SHM_PREFIX, root)
    try:
        token, path = os.urandom(16).hex(), os.path.join(directory, "token")
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(token)
        answers = call("gkd_read_token", [_name(path)], "look for a file in shared memory").result()
        return all(answer == token for answer in answers["results"])
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _name(path: str) -> str:
    """A file's name as workers are told it: its directory's name and its own."""
    return os.path.join(os.path.basename(os.path.dirname(path)), os.path.basename(path))


def _what(tensors: Tensors) -> str:
    return f"take {len(tensors)} tensors from {tensors[0][0]} on" if tensors else "take an empty bucket"


def _remove(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)
