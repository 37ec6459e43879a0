"""Writes Hugging Face model directories tensor by tensor: memory is one tensor, whatever the size of the files.

`HFWriter` knows all names, shapes and dtypes beforehand (the manifest). So it writes each file's header first and
appends tensors as they arrive. Files go to a hidden directory beside the destination, which is renamed when everything
is complete; an existing destination is refused. The format is in safetensors_format.py.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, Final

import torch

from megatron_gkd.errors import CheckpointError
from megatron_gkd.weights.hf_files import (
    INDEX_FILE,
    SINGLE_FILE,
    cast_checked,
    check_side_files,
    side_files,
)
from megatron_gkd.weights.memory import memory_of
from megatron_gkd.weights.safetensors_format import TensorSpec, write_header
from megatron_gkd.weights.stop_tokens import GENERATION_CONFIG

DEFAULT_SHARD_BYTES: Final = 5 * 10**9


class HFWriter(AbstractContextManager["HFWriter"]):
    """Write a model directory, tensor by tensor, in the manifest's order.

        with HFWriter(out_dir, manifest, source_dir=...) as writer:
            for name, tensor in stream:
                writer.write(name, tensor)

    `config_changes` are keys of config.json to set, `generation_changes` of generation_config.json, which is made where
    it is not; without any, the files are the source's, byte for byte.

    Leaving the block with everything written renames the directory into place; leaving it by an exception removes
    what was written. With `replace` a directory that is there makes room at that moment, and not before. Not safe
    against two processes that write the same destination at once.
    """

    def __init__(
        self,
        out_dir: str | Path,
        manifest: Sequence[TensorSpec],
        *,
        source_dir: str | Path,
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
        config_changes: Mapping[str, Any] | None = None,
        generation_changes: Mapping[str, Any] | None = None,
        replace: bool = False,
    ) -> None:
        self.out_dir, self.source_dir = Path(out_dir), Path(source_dir)
        self.manifest, self._replace = tuple(manifest), replace
        self._changes = {"config.json": config_changes or {}, GENERATION_CONFIG: generation_changes or {}}
        if not replace:
            check_destination(self.out_dir)
        check_side_files(self.source_dir)
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
        self._stream.write(memory_of(data))
        self._next += 1

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._end_shard()
            if kind is None:
                self._finish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)
            if self._replace and self.out_dir.exists():
                shutil.rmtree(self.out_dir.parent / f".{self.out_dir.name}.replaced", ignore_errors=True)

    def _begin_shard(self, shard: int) -> None:
        self._end_shard()
        self._stream = open(self._temporary / self._files[shard], "wb")  # noqa: SIM115 - closed by _end_shard
        self._stream.write(write_header(self._shards[shard]))

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
        for name, changes in self._changes.items():
            if changes:
                file = self._temporary / name
                found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
                file.write_text(
                    json.dumps(found | dict(changes), indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
                )
        if self._replace:
            self._make_room()
        check_destination(self.out_dir)
        os.rename(self._temporary, self.out_dir)

    def _make_room(self) -> None:
        aside = self.out_dir.parent / f".{self.out_dir.name}.replaced"
        shutil.rmtree(aside, ignore_errors=True)
        if self.out_dir.exists():
            os.rename(self.out_dir, aside)

    def _write_index(self) -> None:
        weight_map = {s.name: file for file, specs in zip(self._files, self._shards, strict=True) for s in specs}
        index = {"metadata": {"total_size": sum(s.num_bytes for s in self.manifest)}, "weight_map": weight_map}
        (self._temporary / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_destination(out_dir: Path) -> None:
    """Refuse to overwrite: the directory must not exist."""
    if out_dir.exists() or out_dir.is_symlink():
        raise CheckpointError(f"{out_dir} exists and is not overwritten; remove it or choose another directory")


def copy_side_files(source_dir: Path, out_dir: Path) -> None:
    """Copy config, generation config, tokenizer, chat templates and licence, byte for byte."""
    for name in side_files(source_dir):
        source = source_dir / name
        if source.is_dir():
            shutil.copytree(source, out_dir / name)
        elif source.is_file():
            shutil.copyfile(source, out_dir / name)


def plan_shards(manifest: Sequence[TensorSpec], max_shard_bytes: int) -> list[tuple[TensorSpec, ...]]:
    """Consecutive tensors per file: at most `max_shard_bytes`, or one larger tensor.

    Each tensor aligned to its own item size.
    """
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
