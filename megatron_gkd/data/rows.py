"""Data set files -> tokenised rows, with a policy for malformed and overlong ones, and a summary of what happened.

The forms of a record: forms.py. With any of them goes `teacher_prompt`: a string or a list of chat turns that the
teacher is given in place of the prompt.

Lengths, with P prompt and C completion tokens, and R = `max_completion_length` where completions will be sampled (else
0): a row fits if P + max(C, R, 1) <= max_length. One that does not is dropped and counted, or cut at the left of its
prompt, or stops the run. Completions are never cut: a truncated answer would teach the student to stop in the middle.
One that leaves no room for a prompt token is dropped and counted apart. The teacher's prompt has to fit in the same
way and is never cut either, since what it is there for would be lost unseen: a row whose own does not fit is dropped
and counted apart, or stops the run.

Rows are tokenised once, in file order, and kept in memory (4 bytes a token); nothing is written. The result depends on
the files, the tokenizer and the arguments alone, so every rank holds the same rows under the same indices.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.dataset import Check, Rows, needs_completion, needs_teacher_prompt
from megatron_gkd.data.files import Columns, read_records
from megatron_gkd.data.forms import prompt_and_completion, prompt_of
from megatron_gkd.data.sampler import check_weights
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.records import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

OnBadRow = Literal["stop", "skip"]
Overlong = Literal["drop", "truncate_left", "stop"]


@dataclass
class RowSummary:
    """What became of the records that were read: num_read == num_used + all dropped."""

    num_read: int = 0
    num_used: int = 0
    num_prompt_only: int = 0  # of the used ones
    num_truncated: int = 0  # of the used ones: prompts cut at the left
    num_teacher_prompts: int = 0  # of the used ones
    # "malformed" | "overlong" | "completion_overlong" | "teacher_prompt_overlong" -> rows
    dropped: dict[str, int] = field(default_factory=dict)
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
        if self.num_teacher_prompts:
            text += f", {self.num_teacher_prompts} with a teacher_prompt"
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
        self._teacher_tokens = array("i")
        self._teacher_borders = array("q", [0])  # row i: teacher's prompt = [borders[i] : borders[i+1]]; none if empty
        self._tags: list[str] = []  # distinct ones, in the order of their first rows
        self._tag_index = array("i")  # per row: into _tags; -1: none
        self._sizes = [0] * len(self._paths)

    def __len__(self) -> int:
        return len(self._prompt_only)

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices: a slice of rows has no summary
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        index %= len(self)
        start, middle, end = self._borders[2 * index : 2 * index + 3]
        of_teacher = self._teacher_tokens[slice(*self._teacher_borders[index : index + 2])]
        tag = self._tag_index[index]
        return Row(
            tuple(self._tokens[start:middle]),
            None if self._prompt_only[index] else tuple(self._tokens[middle:end]),
            tuple(of_teacher) or None,
            None if tag < 0 else self._tags[tag],
        )

    def place(self, index: int) -> str:
        file, line = self._places[2 * index : 2 * index + 2]
        return f"{self._paths[file]}:{line}"

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self._sizes)

    @property
    def longest(self) -> int:
        return max((row.num_tokens for row in self), default=0)

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
        return max(max(self._tokens, default=-1), max(self._teacher_tokens, default=-1))

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        arrays = [self._tokens, self._borders, self._prompt_only]
        if self._teacher_tokens or self._tags:  # without, the fingerprint is that of data that never had them
            arrays += [self._teacher_tokens, self._teacher_borders, self._tag_index]
        for numbers in arrays:
            digest.update(len(numbers).to_bytes(8, "little") + numbers.tobytes())
        digest.update("".join(map(repr, self._tags)).encode())
        if self.weights:
            digest.update(repr((self.weights, self.sizes)).encode())
        return digest.hexdigest()[:16]

    def require_completions(self, purpose: str) -> None:
        if self.summary.num_prompt_only:
            count = f"{self.summary.num_prompt_only} of {len(self)} rows have"
            raise needs_completion(purpose, count, self.place(self._prompt_only.index(1)))

    def require_teacher_prompts(self, purpose: str) -> None:
        without = len(self) - self.summary.num_teacher_prompts
        if without == len(self):
            raise needs_teacher_prompt(purpose, "no row has")
        if without:
            logger.warning(
                "%s: %d of %d rows have no teacher_prompt; in self-distillation their divergence is 0",
                purpose,
                without,
                len(self),
            )

    def _append(self, row: Row, file: int, line: int) -> None:
        self._tokens.extend(row.prompt_ids)
        self._borders.append(len(self._tokens))
        self._tokens.extend(row.completion_ids or ())
        self._borders.append(len(self._tokens))
        self._places.extend((file, line))
        self._prompt_only.append(row.completion_ids is None)
        self._teacher_tokens.extend(row.teacher_prompt_ids or ())
        self._teacher_borders.append(len(self._teacher_tokens))
        if row.tag is not None and row.tag not in self._tags:
            self._tags.append(row.tag)
        self._tag_index.append(-1 if row.tag is None else self._tags.index(row.tag))
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
    tag_key: str | None = None,
    weights: Sequence[float] = (),
) -> RowDataset:
    """Reads and tokenises files, in the order given.

    Args:
        max_length: the most tokens of a row, P + C.
        max_completion_length: give it if completions will be sampled; every prompt leaves room for as many tokens.
        on_bad_row: "stop" at the first malformed row, or "skip" and count them.
        overlong: what to do with a row that does not fit: "drop" and count, "truncate_left" the prompt, "stop".
        max_rows: stop reading once that many rows are in use; None reads everything.
        tag_key: the column that says which of several teachers scores a row; None: there is one.
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
                row = _encode(record, encoder, tag_key)
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
                summary.num_teacher_prompts += fitted.teacher_prompt_ids is not None
    if not len(rows):
        raise DataError(f"no usable row in {', '.join(map(str, paths))}: {summary}")
    if weights and 0 in rows.sizes:
        raise DataError(f"no usable row in {paths[rows.sizes.index(0)]}, which has a weight: {summary}")
    return rows


def _fit(row: Row, place: str, max_length: int, reserve: int, overlong: Overlong, summary: RowSummary) -> Row | None:
    """The row, or the row with its prompt cut, or None: dropped and counted."""
    num_prompt, num_completion = len(row.prompt_ids), len(row.completion_ids or ())
    room = max_length - max(num_completion, reserve, 1)  # for the prompt
    needed = (
        f"{num_completion} completion tokens" if num_completion >= reserve else f"room for {reserve} sampled tokens"
    )
    num_of_teacher = len(row.teacher_prompt_ids or ())
    if num_of_teacher > room >= 1:
        text = f"{place}: {num_of_teacher} tokens of `teacher_prompt` and {needed} exceed max_length {max_length}"
        if overlong == "stop":
            raise DataError(f"{text}; raise --max_length, shorten the row, or choose --overlong drop")
        summary.drop("teacher_prompt_overlong", text)
        return None
    if num_prompt <= room:
        return row
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
    return replace(row, prompt_ids=row.prompt_ids[-room:])


def _encode(record: Columns | str, encoder: ChatEncoder, tag_key: str | None) -> Row:
    if isinstance(record, str):
        raise DataError(record)
    prompt_ids, completion_ids = encoder.encode(*prompt_and_completion(record))
    of_teacher = None
    if "teacher_prompt" in record:
        of_teacher, _ = encoder.encode(prompt_of("teacher_prompt", record["teacher_prompt"]), None)
    tag = None if tag_key is None else record.get(tag_key)
    if tag is not None and not isinstance(tag, str):
        raise DataError(f"`{tag_key}` (--teacher_tag_key) is a {type(tag).__name__}; it must be a string")
    return Row(prompt_ids, completion_ids, of_teacher, tag)


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
