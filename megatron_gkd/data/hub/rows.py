"""A data set of a hub as the one file that `--dataset` takes.

    found = fetch_rows(name, listing, seed=42)     found.path is a .jsonl or .parquet file; found.account says of what

One file of JSONL or Parquet, of which all rows are wanted, is taken where it lies. Several files, JSON lists and CSV
are written into one file, and so are the rows that `#ROWS` asks for: drawn without repetition, by the seed, kept in
their order. Such a file is named by all that decides it, and is made once:

    HF_HOME/megatron_gkd/hub/rows/OWNER--NAME-COMMIT-HASH.jsonl

A JSON file may hold a list of rows or a row a line. Of CSV every value is text, and the first line has the columns.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from megatron_gkd.config.hub_names import HubName
from megatron_gkd.data.hub import places
from megatron_gkd.data.hub.listing import Listing
from megatron_gkd.data.hub.snapshot import fetch
from megatron_gkd.data.hub.splits import choose_files
from megatron_gkd.errors import DataError
from megatron_gkd.observe.logging import get_logger

logger = get_logger(__name__)

_README: Final = "README.md"
_MOST_FIELD_CHARACTERS: Final = 10**8


@dataclass(frozen=True)
class FoundRows:
    """`files`: of the repository; `indices`: a hash of the rows drawn, by their place in these; None: all."""

    path: Path
    files: tuple[str, ...]
    indices: str | None = None


def fetch_rows(name: HubName, listing: Listing, *, seed: int, shows: bool = True) -> FoundRows:
    """Raises DataError for what the data set does not have, ConfigError for what cannot be fetched."""
    readme = None
    if _README in listing.files:
        readme = (fetch(listing, [_README], shows=shows) / _README).read_text(encoding="utf-8", errors="replace")
    names = choose_files(listing.files, readme, name.subsets, listing.title)
    snapshot = fetch(listing, names, shows=shows)
    files = [snapshot / name for name in names]
    if len(files) == 1 and name.num_rows is None and files[0].suffix in (".jsonl", ".parquet"):
        return FoundRows(files[0], tuple(names))
    kind = ".parquet" if files[0].suffix == ".parquet" else ".jsonl"
    drawn = None if name.num_rows is None else (name.num_rows, seed)
    decides = json.dumps([listing.commit, names, drawn])
    digest = hashlib.blake2b(decides.encode(), digest_size=8, person=b"gkd.hubrows").hexdigest()
    path = places.own() / "rows" / f"{name.repo.replace('/', '--')}-{listing.commit[:12]}-{digest}{kind}"
    keep = None
    if name.num_rows is not None:
        keep = draw(_count(files, listing.title), name.num_rows, seed=f"{seed}/{name.repo}", text=name.text)
    if not path.exists():
        _write(path, files, keep, listing.title)
        logger.info("%s: %s rows of %d files, in %s", name.text, "all" if keep is None else len(keep), len(files), path)
    indices = None if keep is None else hashlib.sha256(json.dumps(keep).encode()).hexdigest()[:16]
    return FoundRows(path, tuple(names), indices)


def draw(total: int, num_rows: int, *, seed: str, text: str) -> list[int]:
    """The places of the rows that are taken, ascending. Raises DataError where there are fewer."""
    if num_rows > total:
        raise DataError(f"{text}: there are {total} rows; give at most that many behind the #, or leave it out")
    return sorted(random.Random(seed).sample(range(total), num_rows))


def _count(files: Sequence[Path], title: str) -> int:
    if files[0].suffix != ".parquet":
        return sum(1 for _ in _json_rows(files, title))
    import pyarrow
    import pyarrow.parquet

    try:
        return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{title}: not a readable Parquet file: {error}") from error


def _write(path: Path, files: Sequence[Path], keep: list[int] | None, title: str) -> None:
    """The file appears whole, or not at all."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as directory:
            part = Path(directory) / path.name
            (_write_parquet if path.suffix == ".parquet" else _write_json)(part, files, keep, title)
            os.replace(part, path)
    except OSError as error:
        raise DataError(
            f"{title}: its rows cannot be written into {path.parent} ({error.strerror or error}); make room, or set "
            "HF_HOME to a directory on another disk"
        ) from error


def _write_json(path: Path, files: Sequence[Path], keep: list[int] | None, title: str) -> None:
    wanted = None if keep is None else set(keep)
    with path.open("w", encoding="utf-8") as out:
        for index, row in enumerate(_json_rows(files, title)):
            if wanted is None or index in wanted:
                out.write(row + "\n")


def _json_rows(files: Sequence[Path], title: str) -> Iterator[str]:
    """Rows as JSON text in one line. A line of JSONL is handed on as it stands: its reader judges it."""
    for file in files:
        try:
            if file.suffix == ".csv":
                yield from (json.dumps(row, ensure_ascii=False) for row in _csv_rows(file))
                continue
            with file.open(encoding="utf-8-sig") as stream:
                if file.suffix == ".json" and stream.read(4096).lstrip().startswith("["):
                    stream.seek(0)
                    yield from (json.dumps(row, ensure_ascii=False) for row in json.load(stream))
                    continue
                stream.seek(0)
                yield from (line.rstrip("\r\n") for line in stream if not line.isspace())
        except (ValueError, csv.Error, RecursionError) as error:
            raise DataError(f"{title}: {file.name} cannot be read: {error}") from error


def _csv_rows(file: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(_MOST_FIELD_CHARACTERS)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        for row in csv.DictReader(stream, strict=True):
            if None in row or None in row.values():
                raise ValueError("a line has more or fewer values than there are columns")
            yield dict(row)


def _write_parquet(path: Path, files: Sequence[Path], keep: list[int] | None, title: str) -> None:
    import pyarrow
    import pyarrow.parquet

    first, position = 0, 0  # of the batch, among all rows; in `keep`
    try:
        schema = pyarrow.parquet.read_schema(files[0]).remove_metadata()
        with pyarrow.parquet.ParquetWriter(path, schema, write_page_checksum=True) as writer:
            for file in files:
                with pyarrow.parquet.ParquetFile(file, page_checksum_verification=True) as source:
                    for batch in source.iter_batches(batch_size=1024):
                        table = pyarrow.Table.from_batches([batch]).replace_schema_metadata(None)
                        if keep is not None:
                            start = position
                            while position < len(keep) and keep[position] < first + len(table):
                                position += 1
                            table = table.take([index - first for index in keep[start:position]])
                        first += len(batch)
                        if len(table):
                            writer.write_table(table.cast(schema))
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{title}: its Parquet files cannot be joined: {error}") from error
