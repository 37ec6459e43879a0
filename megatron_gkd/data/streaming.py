"""Rows that are read and tokenised when they are used: for data that is too large to be tokenised beforehand.

An index of where the records are is made at the start (random_access.py); the order, the position and a resume are
those of rows in memory, over all records instead of the usable ones. What is not known beforehand is checked on access:

    a malformed record   with `on_bad_row="stop"` an error with its place, else another row is taken in its place
    an overlong row      as `overlong` says: another row in its place, cut, or an error
    anything a run asks  (`require`: completions, lengths, ids) an error with the place

The row in the place of one that cannot be used is drawn from the same data set, by a hash of its number and of the
attempt: a function of the data alone, so every rank and every resumed run takes the same, and neighbours that are all
bad do not all end at one row. It comes once more than the others in an epoch.

At the start `NUM_CHECKED` records, evenly spread, are read as in use; everything that is asked of rows is asked of them
at once. What streaming loses against rows in memory: every other bad row is found when its turn comes, the counts of
what was dropped are those of the records seen so far, and an epoch is as long as all records, bad ones included.

The fingerprint covers the files (random_access.py says how closely), the settings that decide which rows are used, and
the ids of the checked rows, hence the tokenizer.
"""

from __future__ import annotations

import hashlib
import threading
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.clock import Clock
from megatron_gkd.data.dataset import Check, Rows, needs_completion, needs_teacher_prompt
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.data.policy import OnBadRow, Overlong, PromptOnly, RowPolicy, RowSummary, Tokenised
from megatron_gkd.data.random_access import open_records
from megatron_gkd.data.row_maker import RowMaker
from megatron_gkd.data.rows import check_sets
from megatron_gkd.data.suspicions import Suspicions
from megatron_gkd.errors import DataError
from megatron_gkd.observe.logging import get_logger
from megatron_gkd.records import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

NUM_CHECKED = 256
_ATTEMPTS = 1000
_LARGE_UNIT_BYTES = 32 * 2**20


class _Placed(NamedTuple):
    row: Row
    place: str


class StreamedRows(Rows):
    """Rows by index, read on access. `summary` counts the records that were dropped, each once, and the checked ones
    that look wrong (suspicions.py); nothing else."""

    def __init__(
        self,
        paths: Sequence[str | Path],
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        max_completion_length: int | None = None,
        on_bad_row: OnBadRow = "stop",
        overlong: Overlong = "drop",
        weights: Sequence[float] = (),
        tag_key: str | None = None,
        template_kwargs: str = "{}",
        clock: Clock | None = None,
        prompt_only: PromptOnly = "keep",
        images: ImageTokens | None = None,
        teacher_images: ImageTokens | None = None,
        maker: RowMaker | None = None,
    ) -> None:
        """The arguments are those of `load_rows`. Raises DataError if a checked record says so, or none is usable."""
        self._policy = RowPolicy(
            *(max_length, max_completion_length, on_bad_row, overlong),
            tag_key=tag_key,
            template_kwargs=template_kwargs,
            one_row=True,
            clock=clock,
            prompt_only=prompt_only,
            images=images,
            teacher_images=teacher_images,
            maker=maker,
        )
        self._paths = check_sets(paths, weights)
        self.weights, self.summary = tuple(weights), RowSummary()
        self._encoder = ChatEncoder(tokenizer, clock)
        self._policy.check_template(self._encoder)
        self._checks: list[Check] = []
        self._dropped: set[int] = set()
        self._reported = False  # the account of the checked records
        self._reading = threading.Lock()  # a JSONL file has one position, and a tokenizer is not for several threads
        self._sets = [open_records(path) for path in self._paths]
        self._borders = list(accumulate(self.sizes, initial=0))
        for path, size in zip(self._paths, self.sizes, strict=True):
            if not size:
                raise DataError(f"data set {path} has no record; leave it out")
        number = min(NUM_CHECKED, len(self))
        self._suspicions: Suspicions | None = Suspicions(self._encoder)  # of the checked records
        tried = [self._read(index * len(self) // number) for index in range(number)]
        self._reported, self._suspicions = True, None
        self._checked = [placed for placed in tried if placed is not None]
        if not self._checked:
            raise DataError(f"none of {number} records from all over {', '.join(self._paths)} is usable{self._why()}")

    def __len__(self) -> int:
        return self._borders[-1]

    def __getitem__(self, index: int) -> Row:  # type: ignore[override]  # no slices, as in RowDataset
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        row, place = self._used(index % len(self))
        for check in self._checks:
            check(row, place)
        return row

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(map(len, self._sets))

    @property
    def longest(self) -> int:
        return self._policy.max_length

    def place(self, index: int) -> str:
        return self._used(index).place

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        policy = self._policy
        reserve = policy.max_completion_length or 0
        asked: tuple[object, ...] = (policy.max_length, reserve, policy.on_bad_row, policy.overlong, self.weights)
        asked += (
            policy.tag_key,
            *([policy.template_kwargs] if policy.variables else []),
            *(["drop"] if policy.prompt_only == "drop" else []),
            *([] if policy.images is None else [(policy.images, policy.teacher_images)]),
            *([] if policy.maker is None else [policy.maker.content]),
        )
        digest.update(repr((asked, [(len(records), records.digest) for records in self._sets])).encode())
        digest.update(repr([placed.row for placed in self._checked]).encode())
        return digest.hexdigest()[:16]

    def account(self) -> str:
        unit_bytes = max(records.unit_bytes for records in self._sets)
        large = (
            f". Row groups of up to {unit_bytes / 2**20:.0f} MB are decoded whole for each row, which takes time: "
            "write smaller ones (row_group_size)"
        )
        return (
            f"{len(self)} records, read while training; of {min(NUM_CHECKED, len(self))} that were checked "
            f"{len(self._checked)} are usable{self._why()}. The others are checked when their turn comes, and what is "
            f"dropped then is reported then{large if unit_bytes > _LARGE_UNIT_BYTES else ''}"
            f"{self.summary.describe_ignored()}"
        )

    def warnings(self) -> list[str]:
        return self.summary.warnings()

    def require(self, check: Check) -> None:
        for row, place in self._checked:
            check(row, place)
        self._checks.append(check)

    def require_completions(self, purpose: str) -> None:
        def check(row: Row, place: str) -> None:
            if row.completion_ids is None:
                raise needs_completion(purpose, "a row has", place)

        self.require(check)

    def require_teacher_prompts(self, purpose: str) -> None:
        def check(row: Row, place: str) -> None:
            if row.teacher_prompt_ids is None:
                raise needs_teacher_prompt(purpose, f"{place} lacks")

        self.require(check)

    def _used(self, index: int) -> _Placed:
        """The row at an index, or the one in its place."""
        number = bisect_right(self._borders, index) - 1
        first, size = self._borders[number], len(self._sets[number])
        with self._reading:
            for attempt in range(_ATTEMPTS):
                placed = self._read(first + _draw(index - first, attempt) % size)
                if placed is not None:
                    return placed
        raise DataError(
            f"{self._paths[number]}: {_ATTEMPTS} records drawn in a row cannot be used{self._why()}; clean the data "
            "set, or raise --max_length"
        )

    def _read(self, index: int) -> _Placed | None:
        """The record at an index as a row, or None if it is dropped; it is counted the first time."""
        if index in self._dropped:
            return None
        number = bisect_right(self._borders, index) - 1
        line, read = self._sets[number][index - self._borders[number]]
        record = self._policy.made(read)
        place, found, folder = f"{self._paths[number]}:{line}", RowSummary(), Path(self._paths[number]).parent
        (encoded,) = self._encoder.encode_all([self._policy.encoding(record, self._encoder, folder)])
        if not isinstance(encoded, DataError):
            self._note(encoded, place)
        for row in self._policy.take(encoded, place, found):
            if self._suspicions is not None:
                assert isinstance(record, dict), "a row that is used has columns"
                self.summary.suspect(self._suspicions.of(record, row), place)
            return _Placed(row, place)
        self._dropped.add(index)
        for reason, text in found.first_dropped.items():
            self.summary.drop(reason, text)
            count = self.summary.dropped[reason]
            if count & (count - 1) == 0:  # the first, second, fourth ...: rank 0's log stays short
                logger.info("streaming: %d of the records read so far dropped as %s (now %s)", count, reason, text)
        return None

    def _note(self, encoded: Tokenised, place: str) -> None:
        """Count what is not used of the checked records; of others say what was not seen in those, once."""
        if not self._reported:
            self.summary.note(encoded)
        elif not self.summary.lost.keys() >= set(encoded.lost) or not self.summary.ignored.keys() >= set(
            encoded.ignored
        ):
            for text in self.summary.note(encoded):
                logger.warning("%s: %s", place, text)

    def _why(self) -> str:
        """`; 3 dropped as malformed (first: ...)`, or nothing."""
        first = self.summary.first_dropped
        return "".join(
            f"; {count} dropped as {reason} (first: {first[reason]})"
            for reason, count in sorted(self.summary.dropped.items())
        )


def _draw(index: int, attempt: int) -> int:
    """Attempt 0 is the record itself."""
    if attempt == 0:
        return index
    digest = hashlib.blake2b(f"{index},{attempt}".encode(), digest_size=8, person=b"gkd.replacement")
    return int.from_bytes(digest.digest(), "little")
