"""The records of a data set by number, without reading it whole: an index made in one pass, then one record at a time.

    open_records(path)   ->  records: len(records), records[i] -> (line, columns or what is wrong), records.digest

What the index holds, and what a pass costs:

    .jsonl       the offset of every line: 8 bytes a row; the file is read once, nothing is parsed
    .parquet     the row count of every row group, from the footer; a row group is decoded whole, and the latest ones
                 stay in memory as long as they are within CACHE_BYTES (one always stays)
    on disk      the record batches: views of the mapped Arrow files; their headers are read

The digest tells data apart: of a JSONL file all bytes, of the others the sizes, heads and ends of the files (the end of
a Parquet file is its footer). A file that changes after it was indexed is an error at the next record read from it.

Not for several threads at once: a JSONL file has one position.
"""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path
from typing import Any

from megatron_gkd.data.files import (
    MOST_LINE_BYTES,
    Columns,
    check_footer,
    check_schema,
    check_supported,
    parse_batch,
    parse_line,
    read_lines,
    saved_batches,
    saved_files,
)
from megatron_gkd.errors import DataError

CACHE_BYTES = 512 * 2**20
_EDGE_BYTES = 2**16

Record = tuple[int, Columns | str]


class IndexedRecords(ABC):
    """A data set whose records can be read in any order. `digest` is equal for equal data; `unit_bytes` is the most
    that is decoded for one record, where that is more than the record."""

    digest: str
    unit_bytes: int = 0

    def __init__(self, path: Path, files: list[Path]) -> None:
        self.path, self._files = path, files
        self._stats = [_stat(path, file) for file in files]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _read(self, index: int) -> Record: ...

    def __getitem__(self, index: int) -> Record:
        """The record and its place in the data set. Raises DataError if the files have changed."""
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        for file, then in zip(self._files, self._stats, strict=True):
            if _stat(self.path, file) != then:
                raise DataError(
                    f"data set {self.path}: {file.name} has changed since the run read its index; start the run again "
                    "(a resume checks the data), and leave the file alone while it is streamed"
                )
        return self._read(index)


def open_records(path: str | Path) -> IndexedRecords:
    """Index a data set. Raises DataError for one that cannot be read."""
    path = check_supported(path)
    if path.is_dir():
        return _Saved(path)
    return _JsonLines(path) if path.suffix == ".jsonl" else _Parquet(path)


class _JsonLines(IndexedRecords):
    def __init__(self, path: Path) -> None:
        super().__init__(path, [path])
        self._starts = array("q")
        self._blanks_before = array("q")  # per blank line: the records before it
        digest, offset = hashlib.blake2b(digest_size=16), 0
        try:
            with path.open("rb") as file:
                for line, num_bytes in read_lines(file):
                    digest.update(line)
                    if line.isspace():
                        self._blanks_before.append(len(self._starts))
                    else:
                        self._starts.append(offset)
                    offset += num_bytes
            self._file = path.open("rb")
        except OSError as error:
            raise DataError(f"data set {path}: cannot be read: {error.strerror}") from error
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._starts)

    def _read(self, index: int) -> Record:
        number = index + 1 + bisect_right(self._blanks_before, index)
        self._file.seek(self._starts[index])
        return number, parse_line(self._file.readline(MOST_LINE_BYTES + 1), first=number == 1)


class _Parquet(IndexedRecords):
    def __init__(self, path: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        super().__init__(path, [path])
        self._unreadable = (pyarrow.ArrowException, OSError, ValueError)
        try:
            self._file = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            check_schema(path, self._file.schema_arrow.names)
            footer = self._file.metadata
            check_footer(path, footer)
            sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
        except DataError:
            raise
        except self._unreadable as error:
            raise DataError(f"data set {path}: not a readable Parquet file: {error}") from error
        self._borders: list[int] = list(accumulate(sizes, initial=0))
        self._decoded: OrderedDict[int, Any] = OrderedDict()  # row group -> table, the latest used last
        self.unit_bytes = max(
            (footer.row_group(group).total_byte_size for group in range(footer.num_row_groups)), default=0
        )
        self.digest = _digest([path])

    def __len__(self) -> int:
        return self._borders[-1]

    def _read(self, index: int) -> Record:
        group = bisect_right(self._borders, index) - 1
        row = self._table(group).slice(index - self._borders[group], 1).combine_chunks().to_batches()[0]
        return index + 1, parse_batch(row)[0]

    def _table(self, group: int) -> Any:
        from pyarrow import Table

        if group not in self._decoded:
            try:
                batches = self._file.iter_batches(row_groups=[group])  # as files.py reads: read_row_group checks more
                table = Table.from_batches(batches, schema=self._file.schema_arrow)
            except self._unreadable as error:
                raise DataError(f"data set {self.path}: row group {group} is not readable: {error}") from error
            if table.num_rows != self._borders[group + 1] - self._borders[group]:
                raise DataError(f"data set {self.path}: row group {group} has not the rows that the footer says")
            self._decoded[group] = table
            while len(self._decoded) > 1 and sum(kept.nbytes for kept in self._decoded.values()) > CACHE_BYTES:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(group)
        return self._decoded[group]


class _Saved(IndexedRecords):
    def __init__(self, path: Path) -> None:
        files = saved_files(path)
        super().__init__(path, files)
        self._batches = [batch for file in files for batch in saved_batches(path, file)]
        self._borders: list[int] = list(accumulate((batch.num_rows for batch in self._batches), initial=0))
        self.digest = _digest(files)

    def __len__(self) -> int:
        return self._borders[-1]

    def _read(self, index: int) -> Record:
        number = bisect_right(self._borders, index) - 1
        return index + 1, parse_batch(self._batches[number].slice(index - self._borders[number], 1))[0]


def _stat(path: Path, file: Path) -> tuple[int, int]:
    try:
        found = os.stat(file)
    except OSError as error:
        raise DataError(f"data set {path}: {file.name} cannot be read: {error.strerror}") from error
    return found.st_size, found.st_mtime_ns


def _digest(files: list[Path]) -> str:
    """Of sizes, heads and ends."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with file.open("rb") as stream:
            size = stream.seek(0, os.SEEK_END)
            digest.update(size.to_bytes(8, "little"))
            for start in (0, max(size - _EDGE_BYTES, 0)):
                stream.seek(start)
                digest.update(stream.read(_EDGE_BYTES))
    return digest.hexdigest()
