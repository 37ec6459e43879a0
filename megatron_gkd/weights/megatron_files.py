"""Megatron distributed checkpoints (`torch_dist`) of a model alone, written and read one parameter at a time.

Names, shapes and offsets of the shards come from `GPTModel.sharded_state_dict` of a SKELETON: this rank's model chunks
on the meta device (`build_skeleton`), which hold no memory. So the files and keys are exactly those that megatron-core
and train/checkpoint write for such a model in any layout. Only the values are streamed:

    writing   each shard is read from the Hugging Face files when it is written, then dropped,
    reading   a parameter is assembled from the stored chunks that overlap it when the export asks for it.

Memory in addition to the skeleton: one shard while writing; one parameter and one stored chunk while reading. The
source's memory map does not count, because the kernel can drop its pages.

Communication: `write_shards` is collective over WORLD (dist_checkpointing plans its files there); opening a
MegatronCheckpoint makes one all_gather_object over the model's ranks; reading is local.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save as save_state_dict

from megatron_gkd.architecture import Architecture
from megatron_gkd.config.json_file import read_json
from megatron_gkd.errors import CheckpointError
from megatron_gkd.model.build import HiddenStateGPTModel, build_model
from megatron_gkd.model.options import ModelOptions
from megatron_gkd.observe.transfer import Transfer
from megatron_gkd.parallel.layout import Layout
from megatron_gkd.parallel.together import gathered
from megatron_gkd.weights.chunks import ExpertRank, Parameter, check_chunks, unwrap
from megatron_gkd.weights.hf_files import HFCheckpoint, first_of
from megatron_gkd.weights.load import check_manifest, fill, parameter_plan, stored_bytes
from megatron_gkd.weights.naming import ADAPTER_KEYS
from megatron_gkd.weights.plan import cut
from megatron_gkd.weights.safe_files import SafeReader, write_unsharded

log = logging.getLogger(__name__)

_MARKER: Final = "metadata.json"  # megatron-core's: which format the directory has
_LAYERS: Final = "decoder.layers."
_MODEL_PREFIXES: Final = ("embedding.", "decoder.", "output_layer.", "vision.")  # the optimizer's keys have others


def is_megatron_checkpoint(path: str | Path) -> bool:
    """Whether the directory is a distributed checkpoint that megatron-core wrote, or this module."""
    try:
        return "sharded_backend" in read_json(Path(path) / _MARKER)
    except (OSError, ValueError, TypeError):  # not JSON, or a number
        return False


def what_it_is(path: str | Path) -> str:
    """What a directory is that is not such a checkpoint, as far as one can tell, and what to give instead."""
    path = Path(path)
    iterations = sorted(path.glob("iter_*"))
    steps = [d for d in sorted((path / "checkpoints").glob("step_*")) if is_megatron_checkpoint(d)]
    if iterations or steps:
        kind = "a directory of Megatron-LM checkpoints" if iterations else "a run directory"
        return f"is {kind}, not one checkpoint; give one of those in it, such as {(iterations or steps)[-1]}"
    if any(path.glob("mp_rank_*")):
        return "is a checkpoint in Megatron-LM's format `torch`; save it with --ckpt-format torch_dist, and give that"
    return "is no Megatron distributed checkpoint"


def build_skeleton(
    arch: Architecture, layout: Layout, groups: ProcessGroupCollection, *, dtype: Any
) -> list[HiddenStateGPTModel]:
    """This rank's model chunks on the meta device: names, shapes and shards, no values."""
    without_embedding_group = copy.copy(groups)
    without_embedding_group.embd = None  # GPTModel sums a tied embedding over it when it is made; there are no values
    with torch.device("meta"):
        return build_model(arch, layout, without_embedding_group, ModelOptions.on("cpu"), dtype=dtype)


def write_shards(
    chunks: Sequence[HiddenStateGPTModel],
    checkpoint: HFCheckpoint,
    arch: Architecture,
    groups: ProcessGroupCollection,
    out_dir: Path,
) -> None:
    """Write the checkpoint's weights as the distributed checkpoint of these (skeleton) chunks into an empty directory.

    Raises CheckpointError where checkpoint, architecture and chunks do not agree, before anything is written.
    """
    check_manifest(checkpoint, arch)
    tp_rank, tp_size, expert_rank = groups.tp.rank(), groups.tp.size(), ExpertRank.of(groups)
    plans = {
        _storage(parameter.tensor): (parameter, parameter_plan(parameter, arch, tp_rank, tp_size, expert_rank))
        for parameter in check_chunks(chunks, arch, expert_rank)
    }

    total = sum(stored_bytes(rectangles, checkpoint) for _, rectangles in plans.values())
    transfer = Transfer(log, checkpoint.path, "converted", total)

    def read(shard: torch.Tensor) -> torch.Tensor:
        """The values of a contiguous part of a parameter (megatron-core stores gate and up apart)."""
        parameter, rectangles = plans[_storage(shard)]
        row = math.prod(parameter.tensor.shape[1:])
        first, rows = shard.storage_offset() // row, shard.numel() // row
        assert shard.is_contiguous()
        assert (first * row, rows * row) == (shard.storage_offset(), shard.numel())
        values = torch.empty((rows, *parameter.tensor.shape[1:]), dtype=shard.dtype, device="cpu")
        transfer.add(fill(values, tuple(cut(rectangles, (first, first + rows))), checkpoint))
        return values.view(shard.shape)

    shards, common = save_preprocess(_sharded_state(chunks, groups))
    by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
    # torch's writer asks for one shard after another; megatron-core's copies all of a rank's first.
    writer = FileSystemWriter(out_dir, single_file_per_rank=True, thread_count=1)
    try:
        save_state_dict(mcore_to_pyt_state_dict(by_key), storage_writer=writer, planner=_ReadOnLookup(read))
    except CheckpointException as error:
        raise CheckpointError(f"{out_dir} cannot be written: {_first_failure(error)}") from error
    if dist.get_rank() == 0:
        write_unsharded(common, out_dir)
    transfer.finish()


class MegatronCheckpoint:
    """The model in a distributed checkpoint (from a conversion, a training run or Megatron-LM), read on demand."""

    def __init__(
        self,
        path: str | Path,
        chunks: Sequence[torch.nn.Module],
        arch: Architecture,
        groups: ProcessGroupCollection,
    ) -> None:
        self.path = Path(path)
        self._vocab_size = arch.vocab_size
        self._reader = SafeReader(self.path)
        metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)
        self._stored = {
            key: value
            for key, value in metadata.state_dict_metadata.items()
            if isinstance(value, TensorStorageMetadata)
        }
        if any(key.startswith(ADAPTER_KEYS) for key in self._stored):
            raise CheckpointError(
                f"{self.path} holds adapters alone, without the other weights: megatron-gkd convert takes it "
                "as its run wrote it, with state.json, and --hf_config, the model that they were trained on"
            )
        # Our name of a tensor -> the stored one: wrappers (DDP, Float16Module) leave their prefix in it.
        self._names = {_unwrapped(key): key for key in self._stored}
        self._shards: dict[int, list[ShardedTensor]] = {}
        state = _sharded_state(chunks, groups)
        apply_factories(state)
        for shard in nested_values(state):
            if isinstance(shard, ShardedTensor):
                self._shards.setdefault(_storage(shard.data), []).append(shard)
        for shards in self._shards.values():
            for shard in shards:
                self._check(shard)
        self._check_unused(arch, groups)

    def read(self, parameter: Parameter) -> torch.Tensor:
        """The value of a parameter of the chunks, in the stored dtype; vocabulary padding is zero."""
        tensor = parameter.tensor
        shards = self._shards[_storage(tensor)]
        stored = self._stored[self._place(shards[0]).name]
        value = torch.empty(tensor.shape, dtype=stored.properties.dtype)
        for shard in shards:
            part = value.as_strided(shard.data.shape, shard.data.stride(), shard.data.storage_offset())
            place = self._place(shard)
            axes = shard.prepend_axis_num - len(shard.global_offset) + len(place.offset)
            self._read_shard(place, part.view((1,) * axes + tuple(shard.local_shape)))
        if parameter.unit.role in ("embedding", "head"):
            start = shards[0].global_offset[0]
            # At least the vocabulary is stored (_check), so every row below it has been read.
            value[max(self._vocab_size - start, 0) :] = 0
        return value

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored weights, the same on all ranks. For several, float32, which holds all of them except
        float64."""
        stored = (key for name, key in self._names.items() if name.startswith(_MODEL_PREFIXES))
        found = {self._stored[key].properties.dtype for key in stored}
        return found.pop() if len(found) == 1 else torch.float32

    def fill(self, parameters: Sequence[Parameter]) -> None:
        """Copy the values into the parameters themselves."""
        with torch.no_grad():
            for parameter in parameters:
                parameter.tensor.copy_(self.read(parameter))

    def _check_unused(self, arch: Architecture, groups: ProcessGroupCollection) -> None:
        mine = {self._place(shard).name for shards in self._shards.values() for shard in shards}
        used = gathered(mine, groups.tp_ep_pp)
        unused = {key for name, key in self._names.items() if name.startswith(_MODEL_PREFIXES)}.difference(*used)
        if unused:
            raise CheckpointError(
                f"{self.path} holds {first_of(unused)}, for which this config.json "
                f"({arch.model_type}) has no place: dropping it would give a different model, so it is refused"
            )

    def _place(self, shard: ShardedTensor) -> _Place:
        """Where the shard is stored. Raises CheckpointError where it is not."""
        if shard.key in self._names:
            return _Place(self._names[shard.key], tuple(shard.global_shape), tuple(shard.global_offset))
        # Layers that are saved apart (non-homogeneous) have their number in the name in place of the first axis.
        if shard.prepend_axis_num and shard.key.startswith(_LAYERS):
            apart = f"{_LAYERS}{shard.global_offset[0]}.{shard.key.removeprefix(_LAYERS)}"
            if apart in self._names:
                return _Place(self._names[apart], tuple(shard.global_shape[1:]), tuple(shard.global_offset[1:]))
        raise CheckpointError(f"{self.path} has no {shard.key}, which this model needs")

    def _check(self, shard: ShardedTensor) -> None:
        name, needed, _ = self._place(shard)
        size = tuple(self._stored[name].size)
        enough = size[0] >= self._vocab_size and size[1:] == needed[1:]
        if not (enough if shard.allow_shape_mismatch else size == needed):
            raise CheckpointError(
                f"{self.path}: {name} has shape {list(size)}, config.json needs {list(needed)}"
                + (f" with {self._vocab_size} rows or more" if shard.allow_shape_mismatch else "")
            )

    def _read_shard(self, place: _Place, target: torch.Tensor) -> None:
        stored = self._stored[place.name]
        offsets, sizes = torch.Size(place.offset), torch.Size(target.shape)
        items = create_read_items_for_chunk_list(place.name, stored, [ChunkStorageMetadata(offsets, sizes)])
        found = sum(math.prod(item.lengths) for item in items)
        needed = math.prod(
            max(min(offset + size, end) - offset, 0)
            for offset, size, end in zip(offsets, sizes, stored.size, strict=True)
        )
        if found != needed:
            raise CheckpointError(f"{self.path}: {place.name} at {list(offsets)} is stored {found}/{needed}")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        except Exception as error:  # a truncated file raises what its reader meets first
            raise CheckpointError(f"{self.path}: {place.name} cannot be read: {error!r}") from error


class _Place(NamedTuple):
    """Where a shard is in the checkpoint."""

    name: str  # as stored
    shape: tuple[int, ...]  # of the whole stored tensor
    offset: tuple[int, ...]


def _unwrapped(key: str) -> str:
    while key.startswith("module."):
        key = key.removeprefix("module.")
    return key


def _sharded_state(chunks: Sequence[Any], groups: ProcessGroupCollection) -> dict[str, Any]:
    """The model's part of train/checkpoint/sharded.py's state."""
    metadata = {"dp_cp_group": groups.dp_cp}
    return {f"model{i}": unwrap(chunk).sharded_state_dict(metadata=metadata) for i, chunk in enumerate(chunks)}


def _storage(tensor: torch.Tensor) -> int:
    """Identity of a tensor's memory, also on the meta device; alike for its views."""
    return int(tensor.untyped_storage()._cdata)


def _first_failure(error: CheckpointException) -> str:
    rank, (failure, _) = min(error.failures.items())
    return f"rank {rank}: {failure}"


class _ReadOnLookup(MCoreSavePlanner):
    def __init__(self, read: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(flatten_state_dict=False)
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        return self._read(found) if isinstance(found, torch.Tensor) else found


class _Into(DefaultLoadPlanner):
    """Every item that is read belongs to one target."""

    def __init__(self, target: torch.Tensor) -> None:
        super().__init__()
        self._target = target

    def lookup_tensor(self, index: MetadataIndex) -> torch.Tensor:
        return self._target

    def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
        """The values have been copied into the target."""
