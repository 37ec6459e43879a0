"""Reads Hugging Face model directories lazily: safetensors headers at once, tensor data on demand. The writer is
hf_writer.py, the file format safetensors_format.py.

`HFCheckpoint(path)` reads the headers of all files and checks sizes, the index, and links that leave the directory.
`read` takes a rectangle of a tensor from a memory map. `read_into` copies one into existing memory without a map: it is
twice as fast if the dtype changes, and a file that shrinks meanwhile is an error instead of a crash. Pickled weights
(`pytorch_model.bin`) are never opened, because unpickling runs code.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection
from contextlib import AbstractContextManager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Final

import torch

from megatron_gkd.config.json_file import read_json, shown
from megatron_gkd.data.git_lfs import refuse_lfs_pointer
from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.memory import memory_of
from megatron_gkd.weights.plan import Span
from megatron_gkd.weights.safetensors_format import FLOATS, MOST_TENSORS, Entry, read_header

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
PIECE_BYTES: Final = 2**20  # what read_into holds besides the target: it stays in the processor's cache
_REPOSITORIES: Final = ("models--", "datasets--")  # directories of the hub's cache
_HASH: Final = re.compile("[0-9a-f]{4,64}")

# An export carries them over byte for byte: what transformers and vLLM read besides the weights, and the licence.
SIDE_FILES: Final = (
    *(
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates",
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model", "tekken.json"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"),
)
# Tokenizers of mistral-common by their version, and of tiktoken by the model's name.
_SIDE_PATTERNS: Final = ("tokenizer.model.v*", "*.tiktoken")


class HFCheckpoint(AbstractContextManager["HFCheckpoint"]):
    """The weights of a local Hugging Face directory, read on demand. Usable as a context manager.

    `close` drops the memory maps.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[str, Any] = {}
        self._descriptors: dict[str, int] = {}
        self._piece: torch.Tensor | None = None
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory; give a local Hugging Face model directory")
        if (self.path / "adapter_config.json").exists():
            raise CheckpointError(f"{self.path} holds an adapter (adapter_config.json); merge it into the model first")
        check_side_files(self.path)
        files, weight_map = _weight_files(self.path)
        self._entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in _read_header(self.path, file).items():
                if name in self._entries:
                    raise CheckpointError(f"{self.path}: {name} is in {self._entries[name].file} and in {file}")
                self._entries[name] = entry
        if weight_map is not None:
            _check_index(self.path, weight_map, self._entries)

    def names(self) -> list[str]:
        """All tensor names."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """The tensor's dtype; CheckpointError unless it is a floating-point type that is not quantised."""
        entry = self._entry(name)
        if entry.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {entry.dtype}; supported are {', '.join(FLOATS)}, not quantised weights"
            )
        return FLOATS[entry.dtype]

    def read(self, name: str, rows: Span | None = None, columns: Span | None = None) -> torch.Tensor:
        """A rectangle of a tensor on the CPU, in the file's dtype.

        It may share memory with the file's map: do not write to it.
        """
        self.dtype(name)
        entry = self._entry(name)
        rows = rows or (0, entry.shape[0])
        assert 0 <= rows[0] <= rows[1] <= entry.shape[0], (name, rows, entry.shape)
        part = self._handle(entry.file).get_slice(name)
        tensor: torch.Tensor
        if columns is None:
            tensor = part[rows[0] : rows[1]]
        else:
            assert 0 <= columns[0] <= columns[1] <= entry.shape[1], (name, columns, entry.shape)
            tensor = part[rows[0] : rows[1], columns[0] : columns[1]]
        return tensor

    def read_into(self, target: torch.Tensor, name: str, rows: Span | None = None, columns: Span | None = None) -> int:
        """Copy a rectangle into `target`, of its shape, in target's dtype and on its device; returns the bytes read.

        Memory besides the target: PIECE_BYTES, or one row of the tensor where that is more.
        """
        stored = self.dtype(name)
        entry = self._entry(name)
        first, last = rows or (0, entry.shape[0])
        assert 0 <= first <= last <= entry.shape[0], (name, rows, entry.shape)
        if columns is not None and columns != (0, entry.shape[1]):  # not contiguous: a map reads only the pages needed
            source = self.read(name, (first, last), columns)
            copy_checked(target, source, name)
            return source.numel() * source.element_size()
        assert tuple(target.shape) == (last - first, *entry.shape[1:]), (name, target.shape, entry.shape)
        row_bytes = math.prod(entry.shape[1:]) * stored.itemsize
        start = entry.start + first * row_bytes
        if stored == target.dtype and target.device.type == "cpu" and target.is_contiguous():
            self._read_bytes(entry.file, start, target)
        else:
            step = max(PIECE_BYTES // max(row_bytes, 1), 1)
            for row in range(0, last - first, step):
                part = target[row : row + step]
                piece = self._scratch(part.numel() * stored.itemsize).view(stored).view(part.shape)
                self._read_bytes(entry.file, start + row * row_bytes, piece)
                copy_checked(part, piece, name)
        return (last - first) * row_bytes

    def close(self) -> None:
        """Drop all open files."""
        self._open.clear()
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self.path} has no tensor {name}")
        return self._entries[name]

    def _handle(self, file: str) -> Any:
        if file not in self._open:
            from safetensors import SafetensorError, safe_open

            try:
                self._open[file] = safe_open(self.path / file, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{self.path / file} cannot be read: {error}") from error
        return self._open[file]

    def _scratch(self, num_bytes: int) -> torch.Tensor:
        if self._piece is None or len(self._piece) < num_bytes:
            self._piece = torch.empty(max(num_bytes, PIECE_BYTES), dtype=torch.uint8)
        return self._piece[:num_bytes]

    def _read_bytes(self, file: str, start: int, target: torch.Tensor) -> None:
        """Fill a contiguous tensor on the CPU with a file's bytes."""
        if target.numel() == 0:
            return
        if file not in self._descriptors:
            self._descriptors[file] = os.open(self.path / file, os.O_RDONLY | os.O_CLOEXEC)
        memory = memory_of(target)
        done = 0
        while done < len(memory):  # one call reads 2 GiB at most
            count = os.preadv(self._descriptors[file], [memory[done:]], start + done)
            if count == 0:
                raise CheckpointError(f"{self.path / file} ended while it was read: it has been truncated")
            done += count


def side_files(path: Path) -> list[str]:
    """Names of the files and directories beside the weights that an export carries over."""
    matching = {found.name for pattern in _SIDE_PATTERNS for found in path.glob(pattern)}
    return [name for name in SIDE_FILES if (path / name).exists() or (path / name).is_symlink()] + sorted(matching)


def is_side_file(name: str) -> bool:
    """Whether a file, by its name within the directory, is one of those."""
    return name.split("/")[0] in SIDE_FILES or any(fnmatch(name, pattern) for pattern in _SIDE_PATTERNS)


def weight_files(path: Path) -> list[str]:
    """Names of the files that hold the weights, as the directory has or indexes them."""
    return _weight_files(path)[0]


def check_side_files(path: Path) -> None:
    """Raise CheckpointError for a link that leaves the directory, because an export copies its target, and for a Git
    LFS pointer."""
    for name in side_files(path):
        for file in (name, *(str(entry.relative_to(path)) for entry in (path / name).rglob("*"))):
            if (path / file).is_symlink():
                _inside(path, file)
            refuse_lfs_pointer(path / file)


def has_safetensors(path: Path) -> bool:
    """Whether the directory holds weights that HFCheckpoint reads."""
    return (path / SINGLE_FILE).exists() or (path / INDEX_FILE).exists()


def _weight_files(path: Path) -> tuple[list[str], dict[str, str] | None]:
    """Names of the weight files, and the index's weight map where there is one."""
    single, index = (path / SINGLE_FILE).exists(), (path / INDEX_FILE).exists()
    if single and index:
        raise CheckpointError(f"{path} has both {SINGLE_FILE} and {INDEX_FILE}: remove the one that is not the model")
    if single:
        return [SINGLE_FILE], None
    if index:
        weight_map = _read_index(path)
        return sorted(set(weight_map.values())), weight_map
    if (path / "metadata.json").is_file() and any(path.glob("*.distcp")):
        raise CheckpointError(
            f"{path} is a Megatron distributed checkpoint; convert it first: megatron-gkd convert --to hf"
        )
    if any(any(path.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        raise CheckpointError(
            f"{path} has pickled weights only, which are never opened (unpickling runs code); convert them to "
            "safetensors with transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(path: Path) -> dict[str, str]:
    refuse_lfs_pointer(path / INDEX_FILE)
    try:
        weight_map = read_json(_inside(path, INDEX_FILE))["weight_map"]
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise TypeError("weight_map must map names to file names")
        if not weight_map:
            raise ValueError("it lists no tensors")
        if len(weight_map) > MOST_TENSORS:
            raise ValueError(f"it lists {len(weight_map)} tensors, and no model has more than {MOST_TENSORS}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path / INDEX_FILE} is damaged: {error!r}") from error
    for file in set(weight_map.values()):
        if Path(file).name != file or file in ("", ".", "..") or not file.isprintable() or len(file) > 255:
            raise CheckpointError(f"{path / INDEX_FILE} names {shown(file)}, which is not a file of this directory")
    return dict(weight_map)


def _check_index(path: Path, weight_map: dict[str, str], entries: dict[str, Entry]) -> None:
    for name, file in weight_map.items():
        if name not in entries or entries[name].file != file:
            raise CheckpointError(f"{path}: the index says that {name} is in {file}, but it is not")
    if unknown := entries.keys() - weight_map.keys():
        raise CheckpointError(f"{path}: {INDEX_FILE} does not list {first_of(unknown)}, which its files hold")


def _inside(path: Path, file: str) -> Path:
    """The file's real path. A link may stay in the directory or lead to a blob of the hub cache that contains the
    directory."""
    try:
        target, root = (path / file).resolve(), path.resolve()
        if not target.is_relative_to(root) and not _is_blob(target, root):
            raise CheckpointError(
                f"{path / file} is a link to {target}, outside the model directory: copy the file instead"
            )
        exists = target.exists()
    except (OSError, RuntimeError, ValueError) as error:  # loops of links, names that are too long
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path / file} cannot be found: {error}") from error
    if not exists:
        raise CheckpointError(f"{path / file} is missing")
    return target


def _is_blob(target: Path, root: Path) -> bool:
    """Whether a link has the hub cache's form: models--org--name/snapshots/<revision>[/sub]/file ->
    models--org--name/blobs/<hash>. An unpacked archive with such links can only reach hashes in its own `blobs`."""
    for revision in (root, *root.parents):
        snapshots = revision.parent
        if snapshots.name == "snapshots" and snapshots.parent.name.startswith(_REPOSITORIES):
            blobs = (snapshots.parent / "blobs").resolve()
            return target.parent == blobs and _HASH.fullmatch(target.name) is not None
    return False


def _read_header(path: Path, file: str) -> dict[str, Entry]:
    target = _inside(path, file)
    if not target.is_file():
        raise CheckpointError(f"{path / file} is not a file")
    refuse_lfs_pointer(target)
    return read_header(target, path / file)


def first_of(names: Collection[str]) -> str:
    """For a message: the first name, and how many more there are."""
    return min(names) + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


def copy_checked(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Copy and cast, with cast_checked's check."""
    target.copy_(cast_checked(source, target.dtype, name) if target.dtype == torch.float16 else source)


def cast_checked(tensor: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Cast; a value that becomes infinite in fp16 is an error, not a silent inf."""
    cast = tensor.to(dtype)
    if (
        dtype == torch.float16
        and tensor.dtype != torch.float16
        and not bool((cast.isfinite() | ~tensor.isfinite()).all())
    ):
        raise CheckpointError(f"{name} has values beyond fp16's range (65504); use bf16 or fp32")
    return cast
