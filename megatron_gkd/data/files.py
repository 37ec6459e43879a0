"""Records of data set files, each with the place it came from: in order, or any one of them.

    .jsonl       one JSON object a line, in UTF-8
    .parquet     a Parquet file
    a directory  a Hugging Face data set saved on disk (`save_to_disk`): state.json and the Arrow files that it names

A place reads `path:17`: line 17 of a JSONL file, row 17 of a Parquet file or of a data set on disk, counted from 1. A
record that cannot be parsed is handed on as its error text, so that the caller's policy for bad rows decides; a file
that cannot be read at all stops the run.

One row is one record, whatever file it lies in. A container with columns keeps one type for all rows: a key that one
row has is there in all of them, null where it was absent. So a null in a struct counts as an absent key. JSON keeps
what its author wrote, nulls too, and so do lists and maps of a container.

What JSON would lose silently is such an error: a key given twice, of which a dictionary keeps the last. Arrow data is
validated before it is read: a damaged offset would make the library read anywhere in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_gkd.errors import DataError

SUPPORTED = (
    "a .jsonl file (one JSON object a line), a .parquet file, or the directory of a Hugging Face data set saved on disk"
)
STATE_FILE, DICT_FILE = "state.json", "dataset_dict.json"  # of `datasets`: a data set, and several of them

_ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"

MOST_LINE_BYTES = 32 * 10**6  # of a JSONL file: made into tokens, a line takes twenty times its length
_PIECE_BYTES = 2**20

Columns = dict[str, Any]  # without the columns that are null


def read_records(path: str | Path) -> Iterator[tuple[int, Columns | str]]:
    """Yields (line, columns), or (line, what is wrong with it); blank lines of a JSONL file are skipped.

    Whether the file exists and is of a supported kind is checked at the call, before the first record is asked for.
    """
    path = check_supported(path)
    if path.is_dir():
        return _read_saved(path, saved_files(path))
    return _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


def check_supported(path: str | Path) -> Path:
    """Raises unless there is a file, or a directory, of a supported kind."""
    path = Path(path)
    if not os.path.exists(path):
        raise DataError(f"data set {path}: there is no such file; give {SUPPORTED}")
    if path.is_dir():
        if (path / DICT_FILE).is_file():
            names = ", ".join(sorted(str(state.parent) for state in path.glob(f"*/{STATE_FILE}")))
            raise DataError(f"data set {path}: a directory of several data sets; give one of them: {names}")
        if not (path / STATE_FILE).is_file():
            raise DataError(f"data set {path}: a directory without {STATE_FILE}; give {SUPPORTED}")
    elif not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
        raise DataError(f"data set {path}: a file of another kind; give {SUPPORTED}")
    return path


def read_lines(file: BinaryIO) -> Iterator[tuple[bytes, int]]:
    """The lines of a file, each with its length; of one that is too long its beginning."""
    while line := file.readline(MOST_LINE_BYTES + 1):
        num_bytes, piece = len(line), line
        while len(piece) > 0 and not piece.endswith(b"\n") and num_bytes > MOST_LINE_BYTES:
            piece = file.readline(_PIECE_BYTES)
            num_bytes += len(piece)
        yield line, num_bytes


def parse_line(line: bytes, *, first: bool) -> Columns | str:
    """A line of a JSONL file: its columns, or what is wrong with it."""
    if len(line) > MOST_LINE_BYTES:
        return f"the line has more than {MOST_LINE_BYTES / 1e6:.0f} MB, which no text that is trained on has"
    try:
        record = json.loads(line.decode("utf-8-sig" if first else "utf-8"), object_pairs_hook=_object)
    except RecursionError:
        return "not valid JSON in UTF-8: nested too deeply"
    except ValueError as error:  # also UnicodeDecodeError, JSONDecodeError, and integers of thousands of digits
        return f"not valid JSON in UTF-8: {error}"
    return _columns(record) if isinstance(record, dict) else f"a JSON {type(record).__name__}, not an object"


def parse_batch(batch: Any) -> list[Columns | str]:
    """The rows of an Arrow record batch: their columns, or what is wrong with them."""
    import pyarrow

    # Arrow's own errors; invalid UTF-8; dates out of Python's range; types without a Python form.
    unreadable = (pyarrow.ArrowException, ValueError, OverflowError, TypeError, NotImplementedError, KeyError)
    try:
        batch.validate(full=True)
        records = batch.to_pylist(maps_as_pydicts="strict")
        for column in batch.schema:
            if pyarrow.types.is_nested(column.type):
                for record in records:
                    record[column.name] = _as_written(record[column.name], column.type)
        return [_columns(record) for record in records]
    except unreadable as error:
        if batch.num_rows == 1:
            return [f"not readable: {' '.join(str(error).split())}"]
    return [row for index in range(batch.num_rows) for row in parse_batch(batch.slice(index, 1))]


def check_schema(path: Path, names: list[str]) -> None:
    """Raises without columns, and for one that is there twice: of two, a dictionary keeps the last."""
    if not names:
        raise DataError(f"data set {path}: it has no columns; give another")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"data set {path}: the column `{name}` is there twice; remove one")


def saved_files(path: Path) -> list[Path]:
    """The Arrow files of a data set on disk, in order."""
    try:
        state = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
        selected = state.get("_indices_data_files")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(
            f"data set {path}: {STATE_FILE} does not name the Arrow files ({error!r}); save it again"
        ) from error
    if selected:
        raise DataError(f"data set {path}: a selection of rows, as old versions of datasets saved it; save it again")
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise DataError(f"data set {path}: {STATE_FILE} names files outside of the directory: {names}")
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise DataError(f"data set {path}: {', '.join(missing)}, named in {STATE_FILE}, is not there; copy it again")
    return [path / name for name in names]


def saved_batches(path: Path, file: Path) -> Iterator[Any]:
    """The record batches of one Arrow file of the data set at `path`: views of the mapped file, nothing is copied."""
    import pyarrow
    import pyarrow.ipc

    try:
        with pyarrow.memory_map(str(file)) as source, pyarrow.ipc.open_stream(source) as reader:
            check_schema(path, reader.schema.names)
            for batch in reader:
                batch.validate()
                yield batch
            # A stream that is cut between two batches reads as a shorter one.
            source.seek(max(source.size() - len(_ARROW_END), 0))
            if source.read() != _ARROW_END:
                raise DataError(f"data set {path}: {file.name} is cut short, its end mark is missing; copy it again")
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"data set {path}: {file.name} is not a readable Arrow file: {error}") from error


def count_rows(path: Path) -> int:
    """Rows of a Parquet file or a data set on disk, as its headers say; 0 where they cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.is_dir():
            return sum(batch.num_rows for file in saved_files(path) for batch in saved_batches(path, file))
        return int(pyarrow.parquet.read_metadata(path).num_rows)
    except (DataError, pyarrow.ArrowException, OSError, ValueError):
        return 0  # whoever reads the rows says what is wrong


def _read_jsonl(path: Path) -> Iterator[tuple[int, Columns | str]]:
    try:
        with path.open("rb") as file:
            for number, (line, _) in enumerate(read_lines(file), start=1):
                if not line.isspace():
                    yield number, parse_line(line, first=number == 1)
    except OSError as error:
        raise DataError(f"data set {path}: cannot be read: {error.strerror}") from error


def check_footer(path: Path, footer: Any) -> None:
    """Raise DataError for a Parquet footer that contradicts itself: one reader goes by groups, another by the whole."""
    rows = sum(footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    if rows != footer.num_rows:
        raise DataError(f"data set {path}: damaged: its footer counts {footer.num_rows} rows, its row groups {rows}")


def _read_parquet(path: Path) -> Iterator[tuple[int, Columns | str]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            check_schema(path, file.schema_arrow.names)
            check_footer(path, file.metadata)
            for batch in file.iter_batches(batch_size=1024):
                for record in parse_batch(batch):
                    number += 1
                    yield number, record
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"data set {path}: not a readable Parquet file (after row {number}): {error}") from error


def _read_saved(path: Path, files: list[Path]) -> Iterator[tuple[int, Columns | str]]:
    number = 0
    for file in files:
        for batch in saved_batches(path, file):
            for record in parse_batch(batch):
                number += 1
                yield number, record


def _as_written(value: Any, kind: Any) -> Any:
    """A value of an Arrow type without the keys that are there for the sake of other rows."""
    import pyarrow

    types = pyarrow.types
    if value is None or not types.is_nested(kind):
        return value
    if types.is_struct(kind):
        return {
            kind_of.name: _as_written(value[kind_of.name], kind_of.type)
            for kind_of in kind
            if value[kind_of.name] is not None
        }
    if types.is_map(kind):
        return {name: _as_written(item, kind.item_type) for name, item in value.items()}
    if hasattr(kind, "value_type"):  # lists of all kinds
        return [_as_written(item, kind.value_type) for item in value]
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice")
    return record


def _columns(record: dict[str, Any]) -> Columns:
    return {name: value for name, value in record.items() if value is not None}
