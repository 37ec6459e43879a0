"""Completions on disk, keyed by what determines them: the model, the prompt and the sampling settings. No torch.

    DIR/samples-000001.jsonl     {"key": "9f..", "ids": [..], "end": "stop", "sum": "1c.."}, one line per completion

A key is a hash of everything in `completion_key`. Equal keys mean equal completions, so entries are only added, never
changed or deleted. Rules:

    C1  each writing process makes its own file (on its first write), so writers never conflict, and a torn line of
        another process is never continued;
    C2  a line is valid if it ends with a line break and its `sum` is right. Other lines are counted in `num_damaged`
        and never used;
    C3  `add` returns once the lines are on disk. A process killed before that leaves whole lines and at most one torn
        line; what is lost is sampled again.

Reading is safe while another process adds; its later additions are not seen. Memory: about 250 bytes a completion;
tokens are read on demand.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from megatron_gkd.errors import RolloutError
from megatron_gkd.rollout.protocol import FinishReason, Request, SamplingSettings

_START = b'{"key":"'


class CachedCompletion(NamedTuple):
    """The parts of a completion that training needs."""

    token_ids: tuple[int, ...]  # up to and including the stop token
    finish_reason: FinishReason


def completion_key(teacher: str, request: Request, settings: SamplingSettings) -> str:
    """The key of a completion.

    Args:
        teacher: identity of the model, including weights and precision.
        request: all of it except its `key`.
    """
    parts = [
        teacher,
        float(settings.temperature),
        float(settings.top_p),
        settings.top_k,
        sorted(settings.stop_token_ids),
        request.max_tokens,
        request.seed,
        list(request.prompt_ids),
    ]
    if request.pictures:  # what they show; their tokens are alike
        parts.append([picture.digest for picture in request.pictures])
    if settings.banned_token_ids:
        parts.append({"banned": sorted(settings.banned_token_ids)})
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16, person=b"gkd.completion").hexdigest()


def prompt_seed(run_seed: int, prompt_ids: Sequence[int]) -> int:
    """A 63-bit seed that depends only on the run's seed and the prompt, so that every epoch gets the same
    completion."""
    text = f"{run_seed}:{','.join(map(str, prompt_ids))}"
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"gkd.promptseed").digest()
    return int.from_bytes(digest, "little") >> 1


class CompletionCache:
    """The cache in a directory, which need not exist yet. One per process."""

    def __init__(self, directory: str | Path) -> None:
        """Reads all files once. Raises RolloutError if they cannot be read."""
        self.directory = Path(directory)
        self.num_damaged = 0
        self._where: dict[str, tuple[Path, int, int]] = {}  # key -> file, first byte, number of bytes
        self._readers: dict[Path, BinaryIO] = {}
        self._writer: BinaryIO | None = None
        self._written: Path | None = None
        try:
            for path in sorted(self.directory.glob("samples-*.jsonl")):
                self._index(path)
        except OSError as error:
            raise RolloutError(
                f"{self.directory} cannot be read ({error}); give another --teacher_samples_cache"
            ) from error

    def __len__(self) -> int:
        return len(self._where)

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __getitem__(self, key: str) -> CachedCompletion:
        path, start, length = self._where[key]
        try:
            if path not in self._readers:
                self._readers[path] = path.open("rb")
            self._readers[path].seek(start)
            line = self._readers[path].read(length)
        except OSError as error:
            raise RolloutError(f"{path} cannot be read ({error})") from error
        if _key(line) != key:
            raise RolloutError(f"{path} was changed after it was read; start the run again")
        record = json.loads(line)
        return CachedCompletion(tuple(record["ids"]), record["end"])

    def add(self, completions: Mapping[str, CachedCompletion]) -> None:
        """Write completions durably. Existing keys are left as they are."""
        new = {key: kept for key, kept in completions.items() if key not in self._where}
        if not new:
            return
        try:
            writer, path = self._file()
            start = writer.tell()
            lines = [_line(key, kept) for key, kept in new.items()]
            writer.write(b"".join(lines))
            writer.flush()
            os.fsync(writer.fileno())
        except OSError as error:
            self.close()  # what is added next goes to another file: this one may end with a torn line
            raise RolloutError(
                f"completions cannot be written to {self.directory} ({error}); make room there, or give another "
                "--teacher_samples_cache"
            ) from error
        for key, line in zip(new, lines, strict=True):
            self._where[key] = (path, start, len(line))
            start += len(line)

    def close(self) -> None:
        """Idempotent."""
        for file in (*self._readers.values(), *([self._writer] if self._writer is not None else [])):
            with contextlib.suppress(OSError):  # everything in it has been flushed, or its loss been reported
                file.close()
        self._readers.clear()
        self._writer = None

    def _file(self) -> tuple[BinaryIO, Path]:
        """This process's own file (C1)."""
        if self._writer is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            number = 1
            while self._writer is None:
                self._written = self.directory / f"samples-{number:06d}.jsonl"
                try:
                    self._writer = self._written.open("xb")
                except FileExistsError:
                    number += 1
        assert self._written is not None
        return self._writer, self._written

    def _index(self, path: Path) -> None:
        start = 0
        with path.open("rb") as file:
            for line in file:
                key = _key(line)
                if key is None:
                    self.num_damaged += 1
                else:
                    self._where.setdefault(key, (path, start, len(line)))
                start += len(line)


def _line(key: str, kept: CachedCompletion) -> bytes:
    record = {"key": key, "ids": list(kept.token_ids), "end": kept.finish_reason}
    body = json.dumps(record, separators=(",", ":")).encode()[:-1]
    return body + _tail(body)


def _tail(body: bytes) -> bytes:
    """The end of a line: a hash of the bytes before it."""
    return b',"sum":"%s"}\n' % hashlib.blake2b(body, digest_size=8).hexdigest().encode()


_TAIL_BYTES = len(_tail(b""))


def _key(line: bytes) -> str | None:
    """The key of a line; None for a torn or damaged one (C2). Much faster than parsing it."""
    body = line[:-_TAIL_BYTES]
    if not line.startswith(_START) or line[-_TAIL_BYTES:] != _tail(body):
        return None
    return body[len(_START) : body.index(b'"', len(_START))].decode()
