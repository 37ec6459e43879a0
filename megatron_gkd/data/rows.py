"""Data set files -> tokenised rows, with a policy for malformed and overlong ones, and a summary of what happened.

The forms of a record: forms.py.

Lengths, with P prompt and C completion tokens, and R = `max_completion_length` where completions will be sampled (else
0): a row fits if P + max(C, R, 1) <= max_length. One that does not is dropped and counted, or cut at the left of its
prompt, or stops the run. Completions are never cut: a truncated answer would teach the student to stop in the middle.
One that leaves no room for a prompt token is dropped and counted apart.

Rows are tokenised once, in file order, and kept in memory (4 bytes a token); nothing is written. The result depends on
the files, the tokenizer and the arguments alone, so every rank holds the same rows under the same indices.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.dataset import Check, Rows, needs_completion
from megatron_gkd.data.files import Columns, read_records
from megatron_gkd.data.forms import prompt_and_completion
from megatron_gkd.data.sampler import check_weights
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.records import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnBadRow = Literal["stop", "skip"]
Overlong = Literal["drop", "truncate_left", "stop"]


@dataclass
class RowSummary:
    """What became of the records that were read: num_read == num_used + all dropped."""

    num_read: int = 0
    num_used: int = 0
    num_prompt_only: int = 0  # of the used ones
    num_truncated: int = 0  # of the used ones: prompts cut at the left
    dropped: dict[str, int] = field(default_factory=dict)  # "malformed" | "overlong" | "completion_overlong" -> rows
    first_dropped: dict[str, str] = field(
        default_factory=dict
    )  # the same keys -> place and reason of the first of them

    def drop(self, reason: str, text: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, text)

    def __str__(self) -> str:
        text = f"{self.num_read} rows read, {self.num_used} used"
        if self.num_prompt_only:
            text += f", {self.num_prompt_only} of them without a completion"
        if self.num_truncated:
            text += f", {self.num_truncated} with their prompt cut at the left"
        for reason, count in sorted(self.dropped.items()):
            text += f"; {count} dropped as {reason} (first: {self.first_dropped[reason]})"
        return text


class RowDataset(Rows):
    """Rows by index, held as flat arrays of ids; immutable once loaded."""

    def __init__(self, paths: Sequence[str]) -> None:
        self.summary = RowSummary()
        self._paths = tuple(paths)
        self._tokens = array("i")
        self._borders = array(
            "q", [0]
        )  # row i: prompt = tokens[borders[2i] : borders[2i+1]], completion up to borders[2i+2]
        self._places = array("q")  # per row: file, line
        self._prompt_only = array("b")
        self._sizes = [0] * len(self._paths)

    def __len__(self) -> int:
        return len(self._prompt_only)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices: a slice of rows has no summary
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        start, middle, end = self._borders[2 * index : 2 * index + 3]
        return Row(
            tuple(self._tokens[start:middle]), None if self._prompt_only[index] else tuple(self._tokens[middle:end])
        )

    def place(self, index: int) -> str:
        file, line = self._places[2 * index : 2 * index + 2]
        return f"{self._paths[file]}:{line}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self._sizes)

    @property
    def longest(self) -> int:
        return max((self._borders[i + 2] - self._borders[i] for i in range(0, 2 * len(self), 2)), default=0)

    def account(self) -> str:
        return str(self.summary)

    def require(self, check: Check) -> None:
        for index in range(len(self)):
            check(self[index], self.place(index))

    def require_ids_below(self, vocab_size: int) -> None:
        if self.max_token_id >= vocab_size:
            super().require_ids_below(vocab_size)  # names the row

    @property
    def max_token_id(self) -> int:
        """The largest id in any row, to be held against a model's vocabulary."""
        return max(self._tokens, default=-1)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for numbers in (self._tokens, self._borders, self._prompt_only):
            digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
        if self.weights:
            digest.update(repr((self.weights, self.sizes)).encode())
        return digest.hexdigest()[:16]

    def require_completions(self, purpose: str) -> None:
        if self.summary.num_prompt_only:
            count = f"{self.summary.num_prompt_only} of {len(self)} rows have"
            raise needs_completion(purpose, count, self.place(self._prompt_only.index(1)))

    def _append(self, row: Row, file: int, line: int) -> None:
        self._tokens.extend(row.prompt_ids)
        self._borders.append(len(self._tokens))
        self._tokens.extend(row.completion_ids or ())
        self._borders.append(len(self._tokens))
        self._places.extend((file, line))
        self._prompt_only.append(row.completion_ids is None)
        self._sizes[file] += 1


def load_rows(
    paths: Sequence[str | Path] | str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    max_completion_length: int | None = None,
    on_bad_row: OnBadRow = "stop",
    overlong: Overlong = "drop",
    max_rows: int | None = None,
    weights: Sequence[float] = (),
) -> RowDataset:
    """Reads and tokenises files, in the order given.

    Args:
        max_length: the most tokens of a row, P + C.
        max_completion_length: give it if completions will be sampled; every prompt leaves room for as many tokens.
        on_bad_row: "stop" at the first malformed row, or "skip" and count them.
        overlong: what to do with a row that does not fit: "drop" and count, "truncate_left" the prompt, "stop".
        max_rows: stop reading once that many rows are in use; None reads everything.
        weights: one a file: how often its rows are drawn; empty: in proportion to the files' rows.
    """
    _check(max_length, max_completion_length, on_bad_row, overlong, max_rows)
    paths = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not paths:
        raise DataError("no data set is given; give --dataset at least one file")
    if weights:
        check_weights(weights, len(paths))
    encoder = ChatEncoder(tokenizer)
    rows = RowDataset([str(path) for path in paths])
    rows.weights = tuple(weights)
    summary = rows.summary
    files = [read_records(path) for path in paths]  # a missing file is found before hours are spent on the first
    for file, records in enumerate(files):
        for line, record in records:
            if max_rows is not None and len(rows) >= max_rows:
                break
            summary.num_read += 1
            place = f"{paths[file]}:{line}"
            try:
                row = _encode(record, encoder)
            except DataError as error:
                if on_bad_row == "stop":
                    raise DataError(f"{place}: {error}; correct the row, or pass --on_bad_row skip") from error
                summary.drop("malformed", f"{place}: {error}")
                continue
            fitted = _fit(row, place, max_length, max_completion_length or 0, overlong, summary)
            if fitted is not None:
                rows._append(fitted, file, line)
                summary.num_used += 1
                summary.num_prompt_only += fitted.completion_ids is None
    if not len(rows):
        raise DataError(f"no usable row in {', '.join(map(str, paths))}: {summary}")
    if weights and 0 in rows.sizes:
        raise DataError(f"no usable row in {paths[rows.sizes.index(0)]}, which has a weight: {summary}")
    return rows


def _fit(row: Row, place: str, max_length: int, reserve: int, overlong: Overlong, summary: RowSummary) -> Row | None:
    """The row, or the row with its prompt cut, or None: dropped and counted."""
    num_prompt, num_completion = len(row.prompt_ids), len(row.completion_ids or ())
    room = max_length - max(num_completion, reserve, 1)  # for the prompt
    if num_prompt <= room:
        return row
    needed = (
        f"{num_completion} completion tokens" if num_completion >= reserve else f"room for {reserve} sampled tokens"
    )
    text = f"{place}: {num_prompt} prompt tokens and {needed} exceed max_length {max_length}"
    if overlong == "stop":
        raise DataError(f"{text}; raise --max_length, shorten the row, or choose --overlong drop or truncate_left")
    if room < 1:
        summary.drop("completion_overlong", text)
        return None
    if overlong == "drop":
        summary.drop("overlong", text)
        return None
    summary.num_truncated += 1
    return Row(row.prompt_ids[-room:], row.completion_ids)


def _encode(record: Columns | str, encoder: ChatEncoder) -> Row:
    if isinstance(record, str):
        raise DataError(record)
    return Row(*encoder.encode(*prompt_and_completion(record)))


def _check(
    max_length: int, max_completion_length: int | None, on_bad_row: str, overlong: str, max_rows: int | None
) -> None:
    if on_bad_row not in ("stop", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}; give 'stop' or 'skip'")
    if overlong not in ("drop", "truncate_left", "stop"):
        raise ConfigError(f"overlong is {overlong!r}; give 'drop', 'truncate_left' or 'stop'")
    if max_length < 2:
        raise ConfigError(
            f"max_length is {max_length}; it must hold one prompt and one completion token, so give at least 2"
        )
    if max_completion_length is not None and not 0 < max_completion_length < max_length:
        raise ConfigError(
            f"max_completion_length is {max_completion_length} and max_length {max_length}; sampled completions must "
            "leave room for a prompt: give a larger max_length, or a smaller positive max_completion_length"
        )
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"max_rows is {max_rows}; give at least 1, or None for all")
