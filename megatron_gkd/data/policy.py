"""What becomes of a record: a row, a row that is cut, or nothing, with the account of it.

Lengths, with P prompt and C completion tokens, and R = `max_completion_length` where completions will be sampled (else
0): a row fits if P + max(C, R, 1) <= max_length. One that does not is dropped and counted, or cut at the left of its
prompt, or stops the run. Completions are never cut: a truncated answer would teach the student to stop in the middle.
One that leaves no room for a prompt token is dropped and counted apart. The teacher's prompt has to fit in the same
way and is never cut either, since what it is there for would be lost unseen: a row whose own does not fit is dropped
and counted apart, or stops the run.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from megatron_gkd.data.chat import ChatEncoder, Encoding
from megatron_gkd.data.files import Columns
from megatron_gkd.data.forms import prompt_and_completion, prompt_of
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.records import Row

OnBadRow = Literal["stop", "skip"]
Overlong = Literal["drop", "truncate_left", "stop"]
PromptOnly = Literal["keep", "drop"]


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
    # the same keys -> place and reason of the first of them
    first_dropped: dict[str, str] = field(default_factory=dict)

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


@dataclass(frozen=True)
class RowPolicy:
    """The settings that decide which rows a data set gives.

    Attributes:
        max_length: the most tokens of a row, P + C.
        max_completion_length: give it if completions will be sampled; every prompt leaves room for as many tokens.
        on_bad_row: "stop" at the first malformed row, or "skip" and count them.
        overlong: what to do with a row that does not fit: "drop" and count, "truncate_left" the prompt, "stop".
        max_rows: stop reading once that many rows are in use; None reads everything.
        tag_key: the column that says which of several teachers scores a row; None: there is one.
        prompt_only: a row without a completion: "keep" it, or "drop" and count it.
    """

    max_length: int
    max_completion_length: int | None = None
    on_bad_row: OnBadRow = "stop"
    overlong: Overlong = "drop"
    max_rows: int | None = None
    tag_key: str | None = None
    prompt_only: PromptOnly = "keep"

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("stop", "skip"):
            raise ConfigError(f"on_bad_row is {self.on_bad_row!r}; give 'stop' or 'skip'")
        if self.overlong not in ("drop", "truncate_left", "stop"):
            raise ConfigError(f"overlong is {self.overlong!r}; give 'drop', 'truncate_left' or 'stop'")
        if self.max_length < 2:
            raise ConfigError(
                f"max_length is {self.max_length}; it must hold one prompt and one completion token, so give at least 2"
            )
        if self.max_completion_length is not None and not 0 < self.max_completion_length < self.max_length:
            raise ConfigError(
                f"max_completion_length is {self.max_completion_length} and max_length {self.max_length}; sampled "
                "completions must leave room for a prompt: give a larger max_length, or a smaller positive "
                "max_completion_length"
            )
        if self.max_rows is not None and self.max_rows < 1:
            raise ConfigError(f"max_rows is {self.max_rows}; give at least 1, or None for all")

    def encoding(self, record: Columns | str, encoder: ChatEncoder) -> Encoding[Row]:
        """A record as a row, for `ChatEncoder.encode_all`; DataError for a malformed one."""
        if isinstance(record, str):
            raise DataError(record)
        prompt_ids, completion_ids = yield from encoder.encoding(*prompt_and_completion(record))
        of_teacher = None
        if "teacher_prompt" in record:
            of_teacher, _ = yield from encoder.encoding(prompt_of("teacher_prompt", record["teacher_prompt"]), None)
        tag = None if self.tag_key is None else record.get(self.tag_key)
        if tag is not None and not isinstance(tag, str):
            raise DataError(f"`{self.tag_key}` (--teacher_tag_key) is a {type(tag).__name__}; it must be a string")
        return Row(prompt_ids, completion_ids, of_teacher, tag)

    def take(self, encoded: Row | DataError, place: str, summary: RowSummary) -> Row | None:
        """The row of an encoded record, or the row with its prompt cut, or None: dropped and counted."""
        if isinstance(encoded, DataError):
            if self.on_bad_row == "stop":
                raise DataError(f"{place}: {encoded}; correct the row, or pass --on_bad_row skip") from encoded
            summary.drop("malformed", f"{place}: {encoded}")
            return None
        if encoded.completion_ids is None and self.prompt_only == "drop":
            summary.drop("prompt_only", f"{place}: a prompt without a completion")
            return None
        return self._fit(encoded, place, summary)

    def _fit(self, row: Row, place: str, summary: RowSummary) -> Row | None:
        num_prompt, num_completion = len(row.prompt_ids), len(row.completion_ids or ())
        reserve = self.max_completion_length or 0
        room = self.max_length - max(num_completion, reserve, 1)  # for the prompt
        needed = (
            f"{num_completion} completion tokens" if num_completion >= reserve else f"room for {reserve} sampled tokens"
        )
        too_long = f"{needed} exceed max_length {self.max_length}"
        num_of_teacher = len(row.teacher_prompt_ids or ())
        if num_of_teacher > room >= 1:
            text = f"{place}: {num_of_teacher} tokens of `teacher_prompt` and {too_long}"
            if self.overlong == "stop":
                raise DataError(f"{text}; raise --max_length, shorten the row, or choose --overlong drop")
            summary.drop("teacher_prompt_overlong", text)
            return None
        if num_prompt <= room:
            return row
        text = f"{place}: {num_prompt} prompt tokens and {too_long}"
        if self.overlong == "stop":
            raise DataError(f"{text}; raise --max_length, shorten the row, or choose --overlong drop or truncate_left")
        if room < 1:
            summary.drop("completion_overlong", text)
            return None
        if self.overlong == "drop":
            summary.drop("overlong", text)
            return None
        summary.num_truncated += 1
        return replace(row, prompt_ids=row.prompt_ids[-room:])
