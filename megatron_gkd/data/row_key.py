"""The name of a data set's tokenised rows: equal only where tokenising again would give the same rows.

Hashed are:

    the data        every byte of the files, so a file that changed in place, with its size and its times, is another
    the tokenizer   the files that it saves itself to, chat template included, and the versions of what runs it; with
                    what the template is told of the time, if anything (clock.py)
    the policy      all of `RowPolicy` but the time
    the code        of this package, which decides what is read from the files, and how

Not hashed: the paths, and the weights, which decide the order of rows alone. Reading the files once costs about a
thousandth of tokenising them.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_gkd import records
from megatron_gkd.data.clock import Clock
from megatron_gkd.data.files import check_supported, count_rows, saved_files
from megatron_gkd.data.policy import RowPolicy
from megatron_gkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PIECE_BYTES = 2**20
_PACKAGES = ("transformers", "tokenizers", "jinja2", "pyarrow")


class Content(NamedTuple):
    """What a data set is, without parsing it."""

    digest: str  # of every byte
    num_records: int  # of a JSONL file: lines, blank ones included


def read_content(path: str | Path) -> Content:
    """Reads all of a data set once. Raises DataError for one that is not there, or cannot be read."""
    path = check_supported(path)
    files = saved_files(path) if path.is_dir() else [path]
    digest, num_lines = hashlib.blake2b(path.suffix.encode() if path.is_file() else b"saved", digest_size=16), 0
    try:
        for file in files:
            digest.update(f"\n{file.stat().st_size}\n".encode())
            last = b"\n"
            with file.open("rb") as stream:
                while piece := stream.read(_PIECE_BYTES):
                    digest.update(piece)
                    num_lines += piece.count(b"\n")
                    last = piece[-1:]
            num_lines += last != b"\n"
    except OSError as error:
        raise DataError(f"data set {path}: cannot be read: {error.strerror}") from error
    return Content(digest.hexdigest(), num_lines if path.suffix == ".jsonl" and path.is_file() else count_rows(path))


def rows_key(contents: Sequence[Content], tokenizer: PreTrainedTokenizerBase, policy: RowPolicy) -> str:
    """A name for a file. Raises OSError where the tokenizer cannot be written to a temporary directory."""
    told = (policy.clock or Clock.now()).time_variables(tokenizer.chat_template)
    settings = asdict(replace(policy, clock=None))
    parts = [_code_digest(), _tokenizer_digest(tokenizer), told, settings, [content.digest for content in contents]]
    text = json.dumps(parts, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"gkd.rowkey").hexdigest()


def _tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    digest = hashlib.blake2b(type(tokenizer).__name__.encode(), digest_size=16)
    digest.update(repr([version(package) for package in _PACKAGES]).encode())
    tokenizer("", verbose=False)  # turns truncation and padding off, as every call here does
    with tempfile.TemporaryDirectory(prefix="gkd-tokenizer-") as directory:
        tokenizer.save_pretrained(directory)
        for path in sorted(file for file in Path(directory).rglob("*") if file.is_file()):
            content = path.read_bytes()
            digest.update(f"\n{path.relative_to(directory)} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()


@cache
def _code_digest() -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in [*sorted(Path(__file__).parent.glob("*.py")), Path(records.__file__)]:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()
