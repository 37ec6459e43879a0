"""Reads `torch_dist` checkpoints without running code in them.

The format has pickles in three places. What torch (2.13) and megatron-core (0.16 to 0.19) do, and what is done here:

    .metadata       pickle.load: which tensor lies where         an unpickler that knows CLASSES only
    byte entries    torch.load(weights_only=False)               weights_only=True
    common.pt       torch.load, whose default was False          weights_only=True
    tensors         torch.load(weights_only=True)                the same

CLASSES are plain data, whose constructors only keep their arguments. A checkpoint that names anything else is refused,
and the error says the name. One exception: Python 3.11.2 pickles a member of an enumeration as a call of getattr; it is
replaced by a function that returns members of CLASSES' enumerations only. Paths in the metadata that leave the
directory are refused too.

    reader = SafeReader(path)            replaces torch's FileSystemReader
    loaded = load_sharded(state, path)   replaces megatron-core's dist_checkpointing.load

megatron-core's entry points, `dist_checkpointing.load` and `save`, and their strategies change between releases (0.17
drops the strategies of the common part, 0.19 the base classes). The functions below them do not, so this module and the
two writers call those.

Communication: `load_sharded` is collective over WORLD; nothing else communicates.
"""

from __future__ import annotations

import io
import pickle
from enum import Enum, EnumType
from pathlib import Path
from typing import Any, Final, cast

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreLoadPlanner,
    _replace_sharded_keys_with_state_dict_keys,
    _replace_state_dict_keys_with_sharded_keys,
    _restore_dict_types,
    _unwrap_pyt_sharded_tensor,
    mcore_to_pyt_state_dict,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_gkd.errors import CheckpointError

COMMON_FILE: Final = COMMON_STATE_FNAME  # what is not sharded
_TORCH: Final = "torch.distributed.checkpoint"
_PLANS: Final = "megatron.core.dist_checkpointing.strategies.torch"
CLASSES: Final = frozenset(
    {
        *(
            (f"{_TORCH}.metadata", name)
            for name in (
                *("Metadata", "MetadataIndex", "StorageMeta", "BytesStorageMetadata", "TensorStorageMetadata"),
                *("ChunkStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
            )
        ),
        *((f"{_TORCH}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
        # The plans of all ranks, which megatron-core keeps in the metadata.
        *((f"{_TORCH}.planner", n) for n in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
        ("torch.distributed._shard.sharded_tensor.metadata", "TensorProperties"),
        ("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
        (_PLANS, "MCoreMetadata"),
        (_PLANS, "MCoreSavePlan"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),  # a table of names
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("pathlib", "PurePosixPath"),
        ("pathlib._local", "PosixPath"),  # as Python 3.13 writes it
        ("copyreg", "_reconstructor"),  # object.__new__ of one of the above
        ("builtins", "object"),
    }
)


class _PlainDataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        if (module, name) in CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise CheckpointError(
            f"it names {module}.{name}, which is not part of a checkpoint's metadata: loading it could run code, so it "
            "is refused"
        )


def _member(enumeration: Any, name: str) -> Enum:
    """Replaces getattr. Raises CheckpointError unless it is a member of an enumeration."""
    if isinstance(enumeration, EnumType) and name in enumeration.__members__:
        return cast(Enum, enumeration.__members__[name])
    raise CheckpointError(
        f"it asks for {name!r} of {enumeration!r}, which is not part of a checkpoint's metadata: loading it could run "
        "code, so it is refused"
    )


def read_metadata(path: Path) -> Metadata:
    """Raises CheckpointError for a file that is missing, damaged or not plain data."""
    try:
        with open(path, "rb") as file:
            metadata = _PlainDataUnpickler(file).load()
    except Exception as error:  # a pickle that is damaged can raise anything
        raise CheckpointError(f"{path} is missing or damaged: {error!r}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{path} holds a {type(metadata).__name__}, not the metadata of a checkpoint")
    for info in metadata.storage_data.values():
        relative = Path(info.relative_path)
        if relative.is_absolute() or ".." in relative.parts:
            raise CheckpointError(f"{path} places a tensor in {info.relative_path}, outside the checkpoint: refused")
    return metadata


def load_plain(file: str | Path | io.BytesIO) -> Any:
    """What torch.save wrote, if it is tensors and plain Python data only."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = f"{file} is damaged or" if isinstance(file, str | Path) else "an entry"
        raise CheckpointError(f"{what} holds more than tensors and plain data, so it is refused: {error}") from error


class SafeReader(FileSystemReader):
    """torch's reader of tensors, with the metadata read as plain data, once."""

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        self._metadata: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        if self._metadata is None:
            self._metadata = read_metadata(Path(self.path) / ".metadata")
            if getattr(self._metadata, "storage_meta", None) is None:
                self._metadata.storage_meta = StorageMeta()
        return self._metadata


class _SafePlanner(MCoreLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], load_plain(value))


def load_sharded(state: dict[str, Any], checkpoint: str | Path) -> dict[str, Any]:
    """Load a sharded state dict: each value in place of its shard, and the unsharded part from the first rank's file.
    Collective over WORLD.

    Raises CheckpointError for anything but plain data, and torch's CheckpointException for missing or damaged shards.
    """
    shards, local, factories = load_preprocess(state)
    shards, _ = extract_sharded_base(shards)
    validate_sharding_integrity(determine_global_metadata(shards)[1])
    loaded: dict[str, Any] = load_plain(Path(checkpoint) / COMMON_FILE)
    merge(loaded, local)
    merge(loaded, _read_shards(shards, checkpoint))
    return cast(dict[str, Any], apply_factory_merges(loaded, factories))


def _read_shards(state: dict[str, Any], checkpoint: str | Path) -> dict[str, Any]:
    """As TorchDistLoadShardedStrategy.load (megatron-core, strategies/torch.py), on the safe reader and planner."""
    shards = [leaf for leaf in nested_values(state) if isinstance(leaf, ShardedTensor)]
    by_key, flat_mapping, rename_mapping = _replace_state_dict_keys_with_sharded_keys(state)
    target = mcore_to_pyt_state_dict(by_key, True)
    planner = _SafePlanner(
        shapes_validation_sharded_tensors=[s for s in shards if not s.allow_shape_mismatch],
        allow_shape_mismatch_sharded_tensors={s.key: s for s in shards if s.allow_shape_mismatch},
    )
    load(target, storage_reader=SafeReader(checkpoint), planner=planner)
    values = {key: _unwrap_pyt_sharded_tensor(cast(Any, value)) for key, value in target.items()}
    loaded = _replace_sharded_keys_with_state_dict_keys(values, flat_mapping, rename_mapping)
    _restore_dict_types(loaded, state)
    return cast(dict[str, Any], loaded)


def write_unsharded(common: dict[str, Any], directory: Path) -> None:
    """Write what makes a directory of shards a checkpoint: the unsharded part and the name of the format. On the first
    rank."""
    torch.save(common, directory / COMMON_FILE)
    save_config(CheckpointingConfig("torch_dist", 1), str(directory))
