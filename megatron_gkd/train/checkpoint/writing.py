"""Writes the sharded state of all ranks in megatron-core's `torch_dist` format, in three parts, so that the middle one
can run beside training:

    plan      which rank writes which shard; collective          (the training loop waits)
    write     this rank's shards into its file; no communication (any thread)
    finish    `.metadata`, `common.pt`, `metadata.json` on the first rank

megatron-core's own writer (0.16) runs the middle part in processes that it forks from the rank, and returns their
results through a manager process that it starts on each rank and never ends: 270 MB per rank, seconds to start, and if
a rank is killed, orphans that keep writing into a directory that the restarted run has begun anew (0.19 needs
nvidia-resiliency-ext for it by default). A thread dies with its rank. torch's writer, which is used here, releases
Python's lock while it writes.

The files are the same: `__RANK_0.distcp`, read by megatron-core, Megatron-LM and `megatron-gkd convert`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult

from megatron_gkd.parallel.together import gathered_first, on_first
from megatron_gkd.weights.safe_files import write_unsharded


class ShardWriter:
    """One save of a sharded state dict into an empty directory.

    Communication (WORLD): the constructor gathers plans and broadcasts the result; the methods do not communicate.
    """

    def __init__(self, state: dict[str, Any], directory: Path, *, copy: bool) -> None:
        """Plan. `copy`: copy this rank's shards to host memory now, so that the model may change."""
        # The common part is the first rank's; comparing it would only warn of ranks without a student.
        sharded, self._common = save_preprocess(state, True, lambda common: {})
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        self._planner = _Planner(flatten_state_dict=False)
        self._planner.set_up_planner(mcore_to_pyt_state_dict(by_key, False), is_coordinator=dist.get_rank() == 0)
        plan = self._planner.create_local_plan()
        self._metadata = self._plan_of_all(plan)
        self._plan = dataclasses.replace(plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))
        # Without a copy, shards on a GPU are fetched one after the other while the file is written.
        self._writer = FileSystemWriter(directory, thread_count=1, per_thread_copy_ahead=0 if copy else 10_000_000)
        self._directory = directory
        self.num_bytes = sum(_num_bytes(item) for item in plan.items)  # that this rank writes, about
        if copy:
            self._planner.copy(plan.items)

    def _plan_of_all(self, plan: SavePlan) -> Metadata | None:
        """The metadata of the whole checkpoint, on the first rank."""
        plans = gathered_first(plan)
        kept: list[Metadata] = []

        def merge() -> None:
            assert plans is not None
            kept.append(self._planner.create_global_plan(plans)[1])

        on_first(merge)
        return kept[0] if kept else None

    def write(self) -> list[WriteResult]:
        """This rank's shards, flushed to disk."""
        if not self._plan.items:
            return []
        results: list[WriteResult] = self._writer.write_data(self._plan, self._planner).wait()
        self._planner.drop_copies()
        return results

    def finish(self, results: list[list[WriteResult]]) -> None:
        """On the first rank: what makes the shards a checkpoint."""
        assert self._metadata is not None
        self._writer.finish(self._metadata, results)
        write_unsharded(self._common, self._directory)


def _num_bytes(item: WriteItem) -> int:
    data = item.tensor_data
    return 0 if data is None else data.chunk.sizes.numel() * data.properties.dtype.itemsize


class _Planner(MCoreSavePlanner):
    """Returns copies of shards where they exist."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._copies: dict[Any, Any] = {}

    def copy(self, items: list[WriteItem]) -> None:
        for item in items:
            found = super().resolve_data(item)
            if item.type != WriteItemType.BYTE_IO:
                found = found.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
            self._copies[item.index] = found

    def drop_copies(self) -> None:
        self._copies.clear()

    def resolve_data(self, write_item: WriteItem) -> Any:
        found = self._copies.get(write_item.index)
        return super().resolve_data(write_item) if found is None else found
