"""Hugging Face model directories: a lazy reader of safetensors, and a writer that never holds more than one tensor.

Reader. `HFCheckpoint(path)` reads the headers of all files, no tensor data, and checks them: sizes, the index, links that leave the
directory. `read` then takes a rectangle of a tensor from a memory map. Pickled weights (`pytorch_model.bin`) are never opened: unpickling
runs code.

Writer. `HFWriter` knows all names, shapes and dtypes beforehand (the manifest), so it can write each file's header first and append
tensors as they arrive: memory is one tensor, whatever the size of the shards. Files go to a hidden directory beside the destination,
which is renamed when everything is complete; a destination that exists is refused.

File format (safetensors): 8 bytes little-endian N, N bytes of JSON {name: {dtype, shape, data_offsets}}, then the data.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, NamedTuple, Self

import torch

from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.plan import Span

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"
DEFAULT_SHARD_BYTES: Final = 5 * 10**9
_MAX_HEADER_BYTES: Final = 100 * 10**6  # the limit of the safetensors library

_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}

# Carried over byte for byte: what transformers and vLLM read besides the weights, and the licence.
_SIDE_FILES: Final = (
    *(
        "config.json",
        "generation_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates",
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "merges.txt", "spiece.model"),
    *("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "NOTICE.txt"),
)


class TensorSpec(NamedTuple):
    """A tensor that will be written or sent: known on every rank before any data moves."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class _Entry(NamedTuple):
    file: str
    dtype: str
    shape: tuple[int, ...]


# ---- reading ---------------------------------------------------------------------------------------------------------


class HFCheckpoint:
    """The weights of a local Hugging Face directory, read on demand. Usable as a context manager; `close` drops the memory maps."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._open: dict[str, Any] = {}
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path} is not a directory; give a local Hugging Face model directory")
        if (self.path / "adapter_config.json").exists():
            raise CheckpointError(f"{self.path} holds an adapter (adapter_config.json); merge it into the model first")
        files, weight_map = _weight_files(self.path)
        self._entries: dict[str, _Entry] = {}
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
        if entry.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} has dtype {entry.dtype}; supported are {', '.join(_DTYPES)} (quantised weights are not)"
            )
        return _DTYPES[entry.dtype]

    def read(self, name: str, rows: Span | None = None, columns: Span | None = None) -> torch.Tensor:
        """A rectangle of a tensor on the CPU, in the file's dtype; it may share memory with the file's map: do not write to it."""
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

    def close(self) -> None:
        """Drop all open files."""
        self._open.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _entry(self, name: str) -> _Entry:
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
    if any(any(path.glob(pattern)) for pattern in ("*.bin", "*.pt", "*.pth")):
        raise CheckpointError(
            f"{path} has pickled weights only, which are never opened (unpickling runs code); convert them to safetensors with "
            "transformers: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise CheckpointError(f"{path} has no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(_inside(path, INDEX_FILE).read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(text, str) for item in weight_map.items() for text in item):
            raise TypeError("weight_map must map names to file names")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path / INDEX_FILE} is damaged: {error!r}") from error
    for file in set(weight_map.values()):
        if Path(file).name != file:
            raise CheckpointError(f"{path / INDEX_FILE} names {file!r}, which is not a file of this directory")
    return dict(weight_map)


def _check_index(path: Path, weight_map: dict[str, str], entries: dict[str, _Entry]) -> None:
    for name, file in weight_map.items():
        if name not in entries or entries[name].file != file:
            raise CheckpointError(f"{path}: the index says that {name} is in {file}, but it is not")
    if unknown := entries.keys() - weight_map.keys():
        raise CheckpointError(f"{path}: {INDEX_FILE} does not list {_some(unknown)}, which its files hold")


def _inside(path: Path, file: str) -> Path:
    """The file's real path; a link may stay in the directory or in the cache repository that holds it, not leave it."""
    target = (path / file).resolve()
    root = path.resolve()
    if (
        root.parent.name == "snapshots"
    ):  # the hub's cache: models--org--name/snapshots/<revision>/file -> ../../blobs/<hash>
        root = root.parent.parent
    if not target.is_relative_to(root):
        raise CheckpointError(
            f"{path / file} is a link to {target}, outside the model directory: copy the file instead"
        )
    if not target.is_file():
        raise CheckpointError(f"{path / file} is missing")
    return target


def _read_header(path: Path, file: str) -> dict[str, _Entry]:
    """Names, dtypes and shapes of one file, checked against its size, so that a half-copied file is found before training."""
    target = _inside(path, file)
    size = target.stat().st_size
    with open(target, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
            raise CheckpointError(f"{path / file} is damaged or truncated: no safetensors header ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = {n: _Entry(file, e["dtype"], tuple(map(int, e["shape"]))) for n, e in header.items()}
            spans = [(n, int(e["data_offsets"][0]), int(e["data_offsets"][1])) for n, e in header.items()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path / file} has a damaged header: {error!r}") from error
    for name, start, stop in spans:
        item = _DTYPES[entries[name].dtype].itemsize if entries[name].dtype in _DTYPES else None
        if item is not None and stop - start != math.prod(entries[name].shape) * item:
            raise CheckpointError(f"{path / file}: {name} has {stop - start} bytes, its shape needs another number")
    needed = 8 + length + max((stop for _, _, stop in spans), default=0)
    if size != needed:
        raise CheckpointError(f"{path / file} is damaged or truncated: {size} bytes, its header says {needed}")
    return entries


def _some(names: Iterable[str], limit: int = 5) -> str:
    """A few names for a message."""
    ordered = sorted(names)
    return ", ".join(ordered[:limit]) + (f" and {len(ordered) - limit} more" if len(ordered) > limit else "")


# ---- writing ---------------------------------------------------------------------------------------------------------


class HFWriter:
    """Write a model directory, tensor by tensor, in the manifest's order.

        with HFWriter(out_dir, manifest, source_dir=...) as writer:
            for name, tensor in stream:
                writer.write(name, tensor)

    `config_changes` are keys of config.json to set; without any, the file is the source's, byte for byte.

    Leaving the block with everything written renames the directory into place; leaving it by an exception removes what was
    written. Not safe against two processes that write the same destination at once.
    """

    def __init__(
        self,
        out_dir: str | Path,
        manifest: Sequence[TensorSpec],
        *,
        source_dir: str | Path,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        config_changes: Mapping[str, Any] | None = None,
    ) -> None:
        self.out_dir, self.source_dir = Path(out_dir), Path(source_dir)
        self.manifest = tuple(manifest)
        self._config_changes = dict(config_changes or {})
        check_destination(self.out_dir)
        if not (self.source_dir / "config.json").is_file():
            raise CheckpointError(f"{self.source_dir} has no config.json to export the model with")
        self._shards = plan_shards(self.manifest, max_shard_bytes)
        self._files = shard_file_names(len(self._shards))
        self._next = 0  # index into the manifest
        starts = itertools.accumulate((len(specs) for specs in self._shards[:-1]), initial=0)
        self._shard_at = {start: shard for shard, start in enumerate(starts)}
        self._stream: IO[bytes] | None = None
        self.out_dir.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.out_dir.parent / f".{self.out_dir.name}.incomplete-{os.getpid()}"
        self._temporary.mkdir()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append the manifest's next tensor; it is cast to the manifest's dtype."""
        assert self._next < len(self.manifest), f"{name} comes after the end of the manifest"
        spec = self.manifest[self._next]
        assert (name, tuple(tensor.shape)) == (spec.name, spec.shape), (
            f"got {name} {tuple(tensor.shape)}, next is {spec}"
        )
        if self._next in self._shard_at:
            self._begin_shard(self._shard_at[self._next])
        data = cast_checked(tensor.detach(), spec.dtype, name).cpu().contiguous()
        assert self._stream is not None
        self._stream.write(data.reshape(-1).view(torch.uint8).numpy().data)
        self._next += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._end_shard()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _begin_shard(self, shard: int) -> None:
        self._end_shard()
        self._stream = open(self._temporary / self._files[shard], "wb")  # noqa: SIM115 - closed by _end_shard
        header = safetensors_header(self._shards[shard])
        self._stream.write(len(header).to_bytes(8, "little") + header)

    def _end_shard(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def _finish(self) -> None:
        if self._next != len(self.manifest):
            raise CheckpointError(
                f"export ended after {self._next} of {len(self.manifest)} tensors; {self.out_dir} was not written"
            )
        if len(self._shards) > 1:
            self._write_index()
        copy_side_files(self.source_dir, self._temporary)
        if self._config_changes:
            config = self._temporary / "config.json"
            changed = json.loads(config.read_text(encoding="utf-8")) | self._config_changes
            config.write_text(json.dumps(changed, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        check_destination(self.out_dir)
        os.rename(self._temporary, self.out_dir)

    def _write_index(self) -> None:
        weight_map = {s.name: file for file, specs in zip(self._files, self._shards, strict=True) for s in specs}
        index = {"metadata": {"total_size": sum(s.num_bytes for s in self.manifest)}, "weight_map": weight_map}
        (self._temporary / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_destination(out_dir: Path) -> None:
    """Refuse to overwrite: exports are made once, into a directory that does not exist."""
    if out_dir.exists() or out_dir.is_symlink():
        raise CheckpointError(f"{out_dir} exists and is not overwritten; remove it or choose another directory")


def copy_side_files(source_dir: Path, out_dir: Path) -> None:
    """Copy config, generation config, tokenizer, chat templates and licence, byte for byte."""
    for name in _SIDE_FILES:
        source = source_dir / name
        if source.is_dir():
            shutil.copytree(source, out_dir / name)
        elif source.is_file():
            shutil.copyfile(source, out_dir / name)


def plan_shards(manifest: Sequence[TensorSpec], max_shard_bytes: int) -> list[tuple[TensorSpec, ...]]:
    """Consecutive tensors per file: at most `max_shard_bytes`, or one larger tensor; each tensor aligned to its own item size."""
    shards: list[list[TensorSpec]] = []
    size = 0
    for spec in manifest:
        fits = shards and size + spec.num_bytes <= max_shard_bytes
        if not fits or size % spec.dtype.itemsize != 0:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.num_bytes
    return [tuple(shard) for shard in shards]


def shard_file_names(num_shards: int) -> list[str]:
    """The names that transformers gives."""
    if num_shards == 1:
        return [SINGLE_FILE]
    return [f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors" for shard in range(num_shards)]


def safetensors_header(specs: Sequence[TensorSpec]) -> bytes:
    """The JSON header, padded with blanks so that the data begins at a multiple of 8 bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for spec in specs:
        offsets = [position, position + spec.num_bytes]
        header[spec.name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": offsets}
        position += spec.num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)


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
