"""What happens to a record: it becomes a row or a shortened row, or is dropped; and the counts of each.

Lengths, with P prompt and C completion tokens, and R = `max_completion_length` where completions will be sampled (else
0): a row fits if P + max(C, R, 1) <= max_length. One that does not is dropped and counted, or cut at the left of its
prompt, or stops the run. Completions are never cut: a truncated answer would teach the student to stop in the middle.
One that leaves no room for a prompt token is dropped and counted apart. The teacher's prompt has to fit in the same
way and is never cut either, since what it is there for would be lost unseen: a row whose own does not fit is dropped
and counted apart, or stops the run.

Before that the user's own functions and templates make the record's columns (row_maker.py), or leave it out.

A record gives one row, or several where several of its turns carry the loss (forms.py), or none where marks say so.
With the rows goes what is not used of the record: columns that mean nothing here, and what the chat template leaves out
(left_out.py), both counted by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from megatron_gkd.data.chat import ChatEncoder, Encoding
from megatron_gkd.data.clock import Clock
from megatron_gkd.data.files import Columns
from megatron_gkd.data.forms import LossScale, Pair, read_record, teachers_prompt
from megatron_gkd.data.image_forms import numbers_in, take_images
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.data.pictures import read_picture
from megatron_gkd.data.row_maker import RowMaker
from megatron_gkd.errors import ConfigError, DataError
from megatron_gkd.records import Picture, Row

OnBadRow = Literal["stop", "skip"]
Overlong = Literal["drop", "truncate_left", "stop"]
PromptOnly = Literal["keep", "drop"]

_MOST_NAMES = 50  # that are counted apart


class Tokenised(NamedTuple):
    """What became of one record."""

    rows: tuple[Row, ...]
    ignored: tuple[str, ...] = ()  # columns
    lost: tuple[str, ...] = ()  # what the chat template leaves out, each time it does
    left_out: bool = False  # by a function of the user's


@dataclass
class RowSummary:
    """What became of the records that were read: num_read + num_more == num_used + all dropped."""

    num_read: int = 0
    num_more: int = 0  # rows beyond the first of a record
    num_used: int = 0
    num_prompt_only: int = 0  # of the used ones
    num_truncated: int = 0  # of the used ones: prompts cut at the left
    num_teacher_prompts: int = 0  # of the used ones
    num_pictures: int = 0  # in prompts of the used ones
    # "malformed" | "left_out" | "marked" | "overlong" | "completion_overlong" | "teacher_prompt_overlong" -> rows
    dropped: dict[str, int] = field(default_factory=dict)
    # the same keys -> place and reason of the first of them
    first_dropped: dict[str, str] = field(default_factory=dict)
    # columns that mean nothing here -> records
    ignored: dict[str, int] = field(default_factory=dict)
    # what the chat template leaves out -> how often
    lost: dict[str, int] = field(default_factory=dict)
    # suspicions.py: kind -> used rows, and place of the first of them
    suspicious: dict[str, int] = field(default_factory=dict)
    first_suspicious: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, text: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self.first_dropped.setdefault(reason, text)

    def note(self, encoded: Tokenised) -> list[str]:
        """Count what is not used of a record; returns what had not been seen before, for people."""
        new = []
        for counts, names, text in ((self.ignored, encoded.ignored, IGNORED), (self.lost, encoded.lost, LOST)):
            for name in names:
                if name not in counts and len(counts) < _MOST_NAMES:
                    new.append(text.format(name))
                name = name if name in counts or len(counts) < _MOST_NAMES else "others"
                counts[name] = counts.get(name, 0) + 1
        return new

    def warnings(self) -> list[str]:
        """What of the data set is not trained on although it means something, a line each."""
        return [f"{LOST.format(_counted(self.lost))}; correct the rows, or the chat template"] if self.lost else []

    def suspect(self, kinds: Iterable[str], place: str) -> None:
        """Count a row that is used and looks wrong."""
        for kind in kinds:
            self.suspicious[kind] = self.suspicious.get(kind, 0) + 1
            self.first_suspicious.setdefault(kind, place)

    def __str__(self) -> str:
        text = f"{self.num_read} rows read, {self.num_used} used"
        if self.num_more:
            text += f", {self.num_more} of them as further turns of the same rows"
        if self.num_prompt_only:
            text += f", {self.num_prompt_only} of them without a completion"
        if self.num_teacher_prompts:
            text += f", {self.num_teacher_prompts} with a teacher_prompt"
        if self.num_pictures:
            text += f", with {self.num_pictures} images"
        if self.num_truncated:
            text += f", {self.num_truncated} with their prompt cut at the left"
        for reason, count in sorted(self.dropped.items()):
            text += f"; {count} dropped as {reason} (first: {self.first_dropped[reason]})"
        return text + self.describe_ignored()

    def describe_ignored(self) -> str:
        """`; columns that mean nothing here, ignored: id (5)`, or nothing."""
        return f"; {IGNORED.format(_counted(self.ignored))}" if self.ignored else ""


IGNORED = "columns that mean nothing here, ignored: {}"
LOST = "the chat template leaves out, so it is NOT trained on: {}"


def _images_of(texts: Sequence[Any]) -> list[int]:
    """The numbers of the images in prompts or turns, in reading order."""
    found: list[int] = []
    for text in texts:
        if isinstance(text, str):
            found += numbers_in(text)
        elif isinstance(text, Mapping):
            found += numbers_in(text["content"])
        else:
            found += _images_of(text)
    return found


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def check_variables(variables: Mapping[str, Any], encoder: ChatEncoder) -> None:
    """Raises ConfigError for a variable that was given for every row and that the chat template does not name."""
    for name in variables:
        if not encoder.names(name):
            flag = "--enable_thinking" if name == "enable_thinking" else f"--chat_template_kwargs with {name}"
            why = "does not use this variable" if encoder.has_template else "is missing"
            raise ConfigError(f"{flag}: the model's chat template {why}, so it would change nothing; leave it out")


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
        loss_scale: which turns carry the loss: the last round's, or all of the assistant's.
        template_kwargs: JSON of variables that the chat template is given for every row.
        one_row: refuse a record of which several turns carry the loss.
        clock: the time that the chat template is told; None: that of the start of the reading.
        prompt_only: a row without a completion: "keep" it, or "drop" and count it.
        images: how a vision-language student sees images; None: a row with images is malformed.
        teacher_images: how its teacher does; None: alike.
        maker: what makes the columns of a record; None: they are read as they are.
    """

    max_length: int
    max_completion_length: int | None = None
    on_bad_row: OnBadRow = "stop"
    overlong: Overlong = "drop"
    max_rows: int | None = None
    tag_key: str | None = None
    loss_scale: LossScale = "last_round"
    template_kwargs: str = "{}"
    one_row: bool = False
    clock: Clock | None = None
    prompt_only: PromptOnly = "keep"
    images: ImageTokens | None = None
    teacher_images: ImageTokens | None = None
    maker: RowMaker | None = None

    def __post_init__(self) -> None:
        if self.on_bad_row not in ("stop", "skip"):
            raise ConfigError(f"on_bad_row is {self.on_bad_row!r}; give 'stop' or 'skip'")
        if self.loss_scale not in ("last_round", "all"):
            raise ConfigError(f"loss_scale is {self.loss_scale!r}; give 'last_round' or 'all'")
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

    @cached_property
    def variables(self) -> dict[str, Any]:
        """`template_kwargs`, read."""
        found: dict[str, Any] = json.loads(self.template_kwargs)
        return found

    def check_template(self, encoder: ChatEncoder) -> None:
        """Raises ConfigError for a variable that was given for every row and that the chat template does not name."""
        check_variables(self.variables, encoder)

    def made(self, record: Columns | str) -> Columns | str | None:
        """A record's columns, for `encoding`; None: it is left out."""
        return record if self.maker is None else self.maker.made(record)

    def encoding(
        self, record: Columns | str | None, encoder: ChatEncoder, folder: Path = Path()
    ) -> Encoding[Tokenised]:
        """A record as rows, for `ChatEncoder.encode_all`; DataError for a malformed one.

        Args:
            record: as `made` gives it.
            folder: what paths of images are relative to.
        """
        if record is None:
            return Tokenised((), left_out=True)
        if isinstance(record, str):
            raise DataError(record)
        pictures: list[Picture] = []
        if self.images is not None:
            record, sources = take_images(record)
            pictures = [read_picture(one, folder, number, self.images.url_dir) for number, one in enumerate(sources)]
        reading = read_record(record, () if self.tag_key is None else (self.tag_key,))
        options, pairs = {**self.variables, **reading.options}, reading.pairs(self.loss_scale)
        several = f"{len(pairs)} turns carry the loss, each as a row of its own"
        if len(pairs) > 1 and self.one_row:
            raise DataError(f"{several}, and --streaming true reads one row a record; leave it out")
        of_teacher, teachers = None, []
        if "teacher_prompt" in record:
            if len(pairs) > 1:
                raise DataError(f"`teacher_prompt` replaces one prompt, and {several}; mark one of them")
            own, _ = next(iter(pairs), reading.pair)
            teachers = [(teachers_prompt(record["teacher_prompt"], own), None)]
            of_teacher, _ = yield from encoder.encoding(*teachers[0], options)
        tag = None if self.tag_key is None else record.get(self.tag_key)
        if tag is not None and not isinstance(tag, str):
            raise DataError(f"`{self.tag_key}` (--teacher_tag_key) is a {type(tag).__name__}; it must be a string")
        rows = []
        for pair in pairs:
            prompt_ids, completion_ids = yield from encoder.encoding(*pair, options)
            row = Row(prompt_ids, completion_ids, of_teacher, tag)
            rows.append(row if self.images is None else self._with_images(row, pair, teachers, pictures))
        lost = encoder.left_out.of(pairs, options, reading.options)
        lost += [f"{name} (teacher_prompt)" for name in encoder.left_out.of(teachers, options, {})]
        return Tokenised(tuple(rows), reading.ignored, tuple(lost))

    def _with_images(self, row: Row, pair: Pair, teachers: Sequence[Pair], pictures: Sequence[Picture]) -> Row:
        """The row with as many placeholders as its images have tokens, for the student and for its teacher."""
        assert self.images is not None
        prompt, completion = pair
        if completion is not None and _images_of([completion]):
            raise DataError("the completion has an image; only prompts have images")
        if self.images.image_token_id in (row.completion_ids or ()):
            raise DataError("the completion has the name of the image placeholder in its text; remove it")
        own = [pictures[number] for number in _images_of([prompt])]
        ids, placed = self.images.expand(row.prompt_ids, own)
        of_teacher = self.teacher_images or self.images
        teacher_ids, theirs = row.teacher_prompt_ids, [pictures[n] for n in _images_of([t for t, _ in teachers])]
        if teacher_ids is None and of_teacher != self.images:
            teacher_ids, theirs = row.prompt_ids, own
        if teacher_ids is None:
            return replace(row, prompt_ids=ids, pictures=placed)
        teacher_ids, teacher_placed = of_teacher.expand(teacher_ids, theirs)
        if (teacher_ids, teacher_placed) == (ids, placed):
            return replace(row, prompt_ids=ids, pictures=placed, teacher_prompt_ids=None)
        return replace(
            row, prompt_ids=ids, pictures=placed, teacher_prompt_ids=teacher_ids, teacher_pictures=teacher_placed
        )

    def take(self, encoded: Tokenised | DataError, place: str, summary: RowSummary) -> list[Row]:
        """The rows of an encoded record, some perhaps with their prompt cut; those that are dropped are counted."""
        if isinstance(encoded, DataError):
            if self.on_bad_row == "stop":
                raise DataError(f"{place}: {encoded}; correct the row, or pass --on_bad_row skip") from encoded
            summary.drop("malformed", f"{place}: {encoded}")
            return []
        if encoded.left_out:
            summary.drop("left_out", f"{place}: by the function of --external_plugins")
        elif not encoded.rows:
            summary.drop("marked", f"{place}: its marks say that no turn carries the loss")
        summary.num_more += max(len(encoded.rows) - 1, 0)
        fitted = []
        for row in encoded.rows:
            if row.completion_ids is None and self.prompt_only == "drop":
                summary.drop("prompt_only", f"{place}: a prompt without a completion")
            elif (whole := self._fit(row, place, summary)) is not None:
                fitted.append(whole)
        return fitted

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
        if self.overlong == "drop" or row.pictures:  # a prompt with images is never cut
            summary.drop("overlong", text)
            return None
        summary.num_truncated += 1
        return replace(row, prompt_ids=row.prompt_ids[-room:])
