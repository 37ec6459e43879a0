"""Tokenised rows that the ranks of a node share: one rank tokenises and writes a file, all map it.

    rows = shared_rows(paths, tokenizer, policy, cache_dir=..., group=...)    # collective, the same rows on every rank

The file (data/row_file.py) is named by everything that determines the rows (data/row_key.py). Among the ranks that see
the same cache directory on the same machine, the lowest reads the data. It looks for the file, verifies its checksum,
and makes it if it is missing or damaged. A later start finds it and tokenises nothing.

If no file can be written, every rank tokenises for itself, with a warning. A directory that the user named and that
cannot be written is an error before anything is tokenised.

All ranks return, or all raise the same error. They also compare the fingerprints of their rows, because nodes with
different copies of the data would train on different rows.

Communication: `on_some_ranks` (parallel/together.py) over the group, twice, and one all_gather_object.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch.distributed as dist

from megatron_gkd.data.policy import RowPolicy
from megatron_gkd.data.row_file import DamagedRowsError, read_rows, write_rows
from megatron_gkd.data.row_key import Content, read_content, rows_key
from megatron_gkd.data.rows import RowDataset, check_sets, tokenise
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.observe.progress import Progress
from megatron_gkd.parallel.together import gathered, on_some_ranks

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

VARIABLE = "GKD_DATA_CACHE_DIR"
NONE = "none"  # of --data_cache_dir
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_TERMINAL_S, _FILE_S = 0.5, 30.0  # between two lines of progress


def shared_rows(
    paths: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    policy: RowPolicy,
    *,
    cache_dir: str | None,
    group: dist.ProcessGroup,
    weights: Sequence[float] = (),
) -> RowDataset:
    """The rows of data sets; collective over `group`, with the same arguments on every rank.

    Args:
        cache_dir: as --data_cache_dir.
        weights: one a data set: how often its rows are drawn; empty: in proportion to their rows.
    """
    paths = check_sets(paths, weights)
    mine = _OfThisRank(paths, tokenizer, policy, find_directory(cache_dir), shows=dist.get_rank() == 0)
    rank = dist.get_rank(group)
    nodes = gathered(mine.node(), group)
    first = [other if node is None else nodes.index(node) for other, node in enumerate(nodes)]  # rank -> who tokenises
    made = on_some_ranks(mine.make if first[rank] == rank else None, group)
    opened = on_some_ranks(None if first[rank] == rank else lambda: mine.open(made[first[rank]], first[rank]), group)
    found = [of_maker or of_other for of_maker, of_other in zip(made, opened, strict=True)]
    for other, of_other in enumerate(found):
        assert of_other is not None, "every rank has made or opened its rows"
        assert found[0] is not None
        if of_other.fingerprint != found[0].fingerprint:
            raise DataError(
                f"{', '.join(paths)}: rank {other} has other rows than rank 0: the data sets (or the tokenizers) of "
                "their machines differ; copy them again"
            )
    assert mine.rows is not None
    mine.rows.weights = tuple(weights)
    mine.rows.require_usable()
    return mine.rows


@dataclass(frozen=True)
class Directory:
    """Where files of tokenised rows are kept. `asked`: named by the user."""

    path: Path
    asked: bool


def find_directory(given: str | None) -> Directory | None:
    """The directory of --data_cache_dir, else of the environment, else beside the cache of Hugging Face; None: no
    cache."""
    given = given or os.environ.get(VARIABLE) or None
    if given is not None:
        return None if given == NONE else Directory(Path(given).expanduser().absolute(), asked=True)
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{caches}/huggingface"
    return Directory((Path(home) / "megatron_gkd").expanduser().absolute(), asked=False)


@dataclass(frozen=True)
class _Made:
    fingerprint: str
    file: str | None  # None: nothing could be kept


class _OfThisRank:
    """This rank's part. `rows` is set by `make` or `open`."""

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        policy: RowPolicy,
        directory: Directory | None,
        *,
        shows: bool,
    ) -> None:
        self.rows: RowDataset | None = None
        self._paths, self._tokenizer, self._policy = paths, tokenizer, policy
        self._directory, self._shows = directory, shows
        self._problem: OSError | None = None  # with the directory
        self._name = ", ".join(paths)

    def node(self) -> tuple[object, ...] | None:
        """Equal on ranks that can share a file; None: this rank cannot share one."""
        if self._directory is None:
            return None
        try:
            self._directory.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            there = self._directory.path.stat()
        except OSError as error:
            self._problem = error
            return None
        boot = _BOOT_ID.read_text() if _BOOT_ID.exists() else ""
        return boot, socket.gethostname(), there.st_dev, there.st_ino

    def make(self) -> _Made:
        """Find the file, or tokenise and write it."""
        contents = [read_content(path) for path in self._paths]
        path = self._path(contents)
        rows = None if path is None else self._kept(path)
        if rows is None and path is not None and not self._is_writable():
            path = None
        if rows is None:
            start_s = time.perf_counter()
            rows = self._tokenise(contents)
            spent_s = time.perf_counter() - start_s
            if path is not None:
                if [read_content(of) for of in self._paths] != contents:
                    raise DataError(f"{self._name} changed while it was tokenised; start again when it is complete")
                rows, path = self._keep(path, rows, spent_s)
        self.rows = rows
        return _Made(rows.unweighted, None if path is None else str(path))

    def open(self, made: _Made | None, maker: int) -> _Made:
        """Map what rank `maker` of the same node made."""
        assert made is not None
        if made.file is None:
            self.rows = self._tokenise([])
            return _Made(self.rows.unweighted, None)
        try:
            self.rows = read_rows(Path(made.file), self._paths, verify=False)
        except (OSError, DamagedRowsError) as error:
            raise ConfigError(
                f"{made.file}, the tokenised rows of {self._name}, was there for rank {maker} and cannot be read by "
                f"rank {dist.get_rank()} ({error}); give another --data_cache_dir, or {NONE}"
            ) from error
        return _Made(self.rows.unweighted, made.file)

    def _path(self, contents: Sequence[Content]) -> Path | None:
        if self._directory is None:
            return None
        try:
            return self._directory.path / f"{rows_key(contents, self._tokenizer, self._policy)}.safetensors"
        except OSError as error:
            self._cannot_keep(f"the tokenizer cannot be written to a temporary directory: {error}")
            return None

    def _kept(self, path: Path) -> RowDataset | None:
        try:
            rows = read_rows(path, self._paths, verify=True)
        except FileNotFoundError:
            return None
        except DamagedRowsError as error:
            logger.warning("%s, tokenised rows of %s, is damaged (%s): made again", path, self._name, error)
            with contextlib.suppress(OSError):  # `_keep` notices what is left
                path.unlink()
            return None
        except OSError:  # `_is_writable` or `_keep` says what is wrong
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # when it was last used
        logger.info("%s: %d rows, tokenised by an earlier start, from %s", self._name, len(rows), path)
        return rows

    def _is_writable(self) -> bool:
        """Raises ConfigError for a directory that the user named and that cannot be written."""
        assert self._directory is not None
        try:
            if self._problem is not None:
                raise self._problem
            with tempfile.TemporaryFile(dir=self._directory.path):
                return True
        except OSError as error:
            if self._directory.asked:
                raise ConfigError(
                    f"--data_cache_dir {self._directory.path} (or {VARIABLE}) cannot be written: "
                    f"{error.strerror or error}; give another directory, or {NONE}: every rank then tokenises the data"
                ) from error
            self._cannot_keep(error.strerror or str(error))
            return False

    def _keep(self, path: Path, rows: RowDataset, spent_s: float) -> tuple[RowDataset, Path | None]:
        """The rows mapped from the file, so that the tokenised ones can be freed; if it cannot be written, the rows
        unchanged."""
        try:
            write_rows(path, rows, self._paths)
            mapped = read_rows(path, self._paths, verify=True)
        except (OSError, DamagedRowsError) as error:
            self._cannot_keep(str(error))
            return rows, None
        size = path.stat().st_size / 2**20
        logger.info("%s: tokenised in %.1f s, kept in %s (%.1f MB)", self._name, spent_s, path, size)
        return mapped, path

    def _cannot_keep(self, why: str) -> None:
        assert self._directory is not None
        logger.log(
            logging.WARNING if self._problem is None or self._shows else logging.DEBUG,  # not all ranks the same
            "%s: the tokenised rows cannot be kept in %s (%s): every rank of this machine tokenises for itself, now "
            "and at every start; make room, or give another --data_cache_dir",
            self._name,
            self._directory.path,
            why,
        )

    def _tokenise(self, contents: Sequence[Content]) -> RowDataset:
        total = sum(content.num_records for content in contents)
        if self._policy.max_rows is not None:
            total = min(total, self._policy.max_rows)
        shows = self._shows and total > 0
        with Progress(total, unit="row", enabled=shows) as progress:
            every_s, last_s = _TERMINAL_S if sys.stderr.isatty() else _FILE_S, time.monotonic()

            def on_read(num_records: int) -> None:
                nonlocal last_s
                if time.monotonic() - last_s >= every_s:
                    progress.update(num_records)
                    last_s = time.monotonic()

            return tokenise(self._paths, self._tokenizer, self._policy, on_read=on_read)
