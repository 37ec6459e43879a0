"""Delivers the export stream's buckets to the ranks that feed sampling engines, each tensor with its owner's checksum.

    for tensors, sums in Delivery(stream, group, to="everyone"):      # or to="writer"
        ...                                                           # repeatable; collective over `group`

Every rank of `group` (all ranks of all replicas of the model) sees the same number of buckets in the same order. To
everyone: the leader of a bucket's owner broadcasts it. To the writer: the leader sends it there, and the other ranks
get empty buckets.

Communication of a pass: the stream's gathering, then per bucket of B tensors and N bytes
    to everyone: two broadcasts over `group`, [B, 2] int64 (checksums) and [N] uint8;
    to the writer: the same two point to point, if the leader is another rank.
Memory in addition to the model: on a leader the bucket and one shard; elsewhere the bucket. Each bucket is a new buffer
that is never overwritten, so its tensors may be kept.

A checksum is that of the tensor on its owner. Whoever loads the tensor verifies it (rollout/vllm/worker.py), so damage
anywhere on the way is detected and the tensor is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist

from megatron_gkd.parallel.together import gathered
from megatron_gkd.weights.checksum import Sums, Tensors, checksum
from megatron_gkd.weights.export import Bucket, HFTensorStream, Owner, views


class Delivery:
    """Iterate on every rank of `group`."""

    def __init__(self, stream: HFTensorStream, group: dist.ProcessGroup, *, to: Literal["everyone", "writer"]) -> None:
        """Communication: one all_gather_object over `group`: who leads what."""
        self._stream, self._group, self._to = stream, group, to
        owners = {bucket.owner for bucket in stream.buckets}
        led = [owner for owner in sorted(owners) if stream.leads(owner)]
        everyone = gathered((led, stream.is_writer), group)
        ranks = [dist.get_global_rank(group, index) for index in range(len(everyone))]
        self._leader: dict[Owner, int] = {owner: r for r, (o, _) in zip(ranks, everyone, strict=True) for owner in o}
        (self._writer,) = (r for r, (_, is_writer) in zip(ranks, everyone, strict=True) if is_writer)
        assert self._leader.keys() == owners, (self._leader, owners)

    def __iter__(self) -> Iterator[tuple[Tensors, Sums]]:
        self._stream.settle()
        for bucket in self._stream.buckets:
            buffer, sums_B2 = self._sent(bucket)
            if self._to == "everyone":
                buffer, sums_B2 = self._broadcast(bucket, buffer, sums_B2)
            else:
                buffer, sums_B2 = self._to_writer(bucket, buffer, sums_B2)
            if buffer is None or sums_B2 is None:
                yield [], {}
                continue
            names = [spec.name for spec in bucket.specs]
            tensors = list(zip(names, views(bucket, buffer), strict=True))
            sums = {name: (pair[0], pair[1]) for name, pair in zip(names, sums_B2.tolist(), strict=True)}
            del buffer, sums_B2
            yield tensors, sums
            del tensors

    def _sent(self, bucket: Bucket) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """On the leader: the bucket's bytes and checksums."""
        buffer = self._stream.gather(bucket)
        if buffer is None:
            return None, None
        sums = [checksum(tensor) for tensor in views(bucket, buffer)]
        return buffer, torch.tensor(sums, dtype=torch.int64, device=buffer.device)

    def _broadcast(
        self, bucket: Bucket, buffer: torch.Tensor | None, sums_B2: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        empty, empty_sums = self._empty(bucket) if buffer is None else (buffer, sums_B2)
        assert empty_sums is not None
        source = self._leader[bucket.owner]
        dist.broadcast(empty_sums, src=source, group=self._group)
        dist.broadcast(empty, src=source, group=self._group)
        return empty, empty_sums

    def _to_writer(
        self, bucket: Bucket, buffer: torch.Tensor | None, sums_B2: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        leader, here = self._leader[bucket.owner], dist.get_rank()
        if leader == self._writer:
            return buffer, sums_B2
        if here == leader:
            assert buffer is not None
            assert sums_B2 is not None
            dist.send(sums_B2, dst=self._writer, group=self._group)
            dist.send(buffer, dst=self._writer, group=self._group)
        elif here == self._writer:
            buffer, sums_B2 = self._empty(bucket)
            dist.recv(sums_B2, src=leader, group=self._group)
            dist.recv(buffer, src=leader, group=self._group)
            return buffer, sums_B2
        return None, None

    def _empty(self, bucket: Bucket) -> tuple[torch.Tensor, torch.Tensor]:
        device = self._stream.device
        return (
            torch.empty(bucket.num_bytes, dtype=torch.uint8, device=device),
            torch.empty(len(bucket.specs), 2, dtype=torch.int64, device=device),
        )
