"""Records of JSONL and Parquet files, one at a time, each with the place it came from.

A place reads `path:17`: line 17 of a JSONL file, row 17 of a Parquet file, counted from 1. A record that cannot be
parsed is handed on as its error text, so that the caller's policy for bad rows decides; a file that cannot be read at
all stops the run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_gkd.errors import DataError, NotBuiltError

SUPPORTED = "a .jsonl file (one JSON object a line) or a .parquet file"

Columns = dict[str, Any]  # without the columns that are null


def read_records(path: str | Path) -> Iterator[tuple[int, Columns | str]]:
    """Yields (line, columns), or (line, what is wrong with it); blank lines of a JSONL file are skipped.

    Whether the file exists and is of a supported kind is checked at the call, before the first record is asked for.
    """
    path = Path(path)
    if not path.exists():
        if path.suffix in (".jsonl", ".parquet") or path.is_absolute() or len(path.parts) > 2:
            raise DataError(f"data set {path}: there is no such file; give {SUPPORTED}")
        raise NotBuiltError(
            f"data set {path}: there is no such file, and data sets by name (--dataset NAME) are not supported yet; "
            f"give {SUPPORTED}"
        )
    if not path.is_file() or path.suffix not in (".jsonl", ".parquet"):
        raise DataError(
            f"data set {path}: a {'file of another kind' if path.is_file() else 'directory'}; give {SUPPORTED}"
        )
    return _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)


def _read_jsonl(path: Path) -> Iterator[tuple[int, Columns | str]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.isspace():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (UnicodeDecodeError, json.JSONDecodeError) as error:
                yield number, f"not valid JSON in UTF-8: {error}"
                continue
            yield (
                number,
                _columns(record) if isinstance(record, dict) else f"a JSON {type(record).__name__}, not an object",
            )


def _read_parquet(path: Path) -> Iterator[tuple[int, Columns | str]]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    number += 1
                    yield number, _columns(record)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"data set {path}: not a readable Parquet file (after row {number}): {error}") from error


def _columns(record: dict[str, Any]) -> Columns:
    return {name: value for name, value in record.items() if value is not None}
