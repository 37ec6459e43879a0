"""`megatron-gkd check data`: shows what a data set trains on for the first rows, and checks and counts all rows.

Rows are read as in training (rows.py). Then every row that would be used is checked independently of the code that made
it:

    tokens   the record is read again (second_reading.py) and given to the tokenizer's own
             `apply_chat_template(tokenize=True)` with everything that it has, tools and variables too, which gives the
             same ids (without a template: each string by itself); a prompt that was cut is compared from the cut on. A
             row in which one token would span the border of prompt and completion must agree in each half by itself,
             and is counted.
    text     the ids decode to what was rendered, blanks aside (which some tokenizers move): nothing became an unknown
             token, or another letter. Letters that were composed, as many tokenizers do (NFC), are counted and right.
    mask     a collated row has its loss positions on the last tokens, one for each of the completion, with the
             completion as labels

Columns that mean nothing here and what the chat template leaves out are counted by name, as training does.

Ends with exit code 1 if a row fails, if one is malformed (unless it is to be skipped), or if no row has anything to
train on. Prompts alone are such rows: with `--lmbda 1` they are right, and the message says so.
"""

from __future__ import annotations

import json
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_gkd.architecture import read_architecture, read_config_json
from megatron_gkd.config.checks import CheckDataConfig
from megatron_gkd.data.chat import ChatEncoder, load_tokenizer
from megatron_gkd.data.collate import collate
from megatron_gkd.data.files import Columns, read_records
from megatron_gkd.data.image_forms import parts
from megatron_gkd.data.image_tokens import ImageTokens, read_image_tokens
from megatron_gkd.data.row_maker import RowMaker, make_row_maker
from megatron_gkd.data.rows import RowDataset, load_rows
from megatron_gkd.data.second_reading import Conversation, read_again, teachers_turns
from megatron_gkd.data.show import show_row
from megatron_gkd.data.suspicions import describe
from megatron_gkd.errors import CheckFailedError, ConfigError
from megatron_gkd.observe.text import visible
from megatron_gkd.records import Row, Sample
from megatron_gkd.train.hub_files import with_local_files

_SHOWN_PROBLEMS = 10


@dataclass
class Account:
    """Counts over the rows that are used."""

    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_image_tokens: int = 0  # of those of prompts
    num_completions: int = 0
    num_ended: int = 0  # completions that end with the token a sampler stops at
    num_end_inside: int = 0  # completions with that token before their end
    num_split: int = 0  # rows in which a token would span the border
    num_composed: int = 0  # rows whose tokens spell the same text in composed letters
    longest: int = 0
    longest_place: str = ""
    problems: list[str] = field(default_factory=list)

    def _of_images(self, rows: RowDataset) -> list[str]:
        number = rows.summary.num_pictures
        return [f"images in prompts        {number}, of {self.num_image_tokens} tokens"] if number else []

    def lines(self, rows: RowDataset) -> list[str]:
        """The counts as lines of text."""
        per_row = self.num_completion_tokens / max(self.num_completions, 1)
        lines = [
            f"records read             {rows.summary.num_read}",
            f"rows used                {rows.summary.num_used}",
            *(f"dropped as {why:<13} {n}" for why, n in sorted(rows.summary.dropped.items())),
            f"prompts cut at the left  {rows.summary.num_truncated}",
            f"prompts alone            {rows.summary.num_prompt_only}",
            f"tokens of prompts        {self.num_prompt_tokens}",
            *self._of_images(rows),
            f"tokens of completions    {self.num_completion_tokens} ({per_row:.1f} a completion; these are trained on)",
            f"longest row              {self.longest} tokens ({self.longest_place})",
            f"end with the stop token  {self.num_ended} of {self.num_completions} completions",
            f"have it inside as well   {self.num_end_inside}",
            f"split at the border      {self.num_split}",
            *([f"letters composed (NFC)   {self.num_composed}"] if self.num_composed else []),
        ]
        if rows.summary.num_more:
            lines.insert(2, f"as further turns         {rows.summary.num_more} of them, beyond one row a record")
        lines += [f"ignored column           {name} ({n})" for name, n in sorted(rows.summary.ignored.items())]
        lines += [f"LOST in the template     {name} ({n})" for name, n in sorted(rows.summary.lost.items())]
        lines += [f"first {why}: {text}" for why, text in sorted(rows.summary.first_dropped.items())]
        return lines + [f"LOOK AT {text}" for text in describe(rows.summary.suspicious, rows.summary.first_suspicious)]


def _with_bare_prompts(row: Row, images: ImageTokens) -> Row:
    """The prompt with one placeholder per image, as the chat template writes it."""
    teacher_ids = row.teacher_prompt_ids
    if teacher_ids is not None:
        teacher_ids = images.bare(teacher_ids, row.teacher_pictures)
    return replace(row, prompt_ids=images.bare(row.prompt_ids, row.pictures), teacher_prompt_ids=teacher_ids)


def _image_problem(row: Row, images: ImageTokens) -> str | None:
    """The rows of the tower go where the placeholders are, and nowhere else."""
    wanted = [place for place, token in enumerate(row.prompt_ids) if token == images.image_token_id]
    media = collate([Sample(0, 0, row.prompt_ids, row.completion_ids or (0,), "dataset", pictures=row.pictures)]).media
    placed = [] if media is None else media.index.tolist()
    return None if placed == wanted else "the rows of the vision tower do not go where the placeholders are"


def run_check_data(config: CheckDataConfig) -> None:
    """Print the rows and the account; raises CheckFailedError if something is wrong with what would be trained on."""
    config = with_local_files(config, weights=False)
    encoder = ChatEncoder(load_tokenizer(config.model))
    images = _image_tokens(config, encoder)
    maker = make_row_maker(config.external_plugins, config.prompt_template, config.teacher_prompt_template)
    rows = load_rows(
        config.dataset,
        encoder.tokenizer,
        max_length=config.max_length,
        max_completion_length=config.max_completion_length,
        on_bad_row="skip",
        overlong=config.overlong,
        max_rows=config.max_rows,
        loss_scale=config.loss_scale,
        template_kwargs=config.template_kwargs,
        clock=encoder.clock,
        images=images,
        maker=maker,
    )
    colours = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for index in range(min(config.num_rows, len(rows))):
        print(show_row(encoder, rows[index], rows.place(index), colours=colours, images=images), end="\n\n")
    scale, variables = config.loss_scale, config.template_kwargs
    found = check_rows(encoder, rows, config.dataset, loss_scale=scale, variables=variables, images=images, maker=maker)
    print(visible("\n".join(found.lines(rows))), flush=True)
    if 0 < rows.summary.num_prompt_only < len(rows):
        print(
            f"NOTE {rows.summary.num_prompt_only} of {len(rows)} rows are a prompt alone: training that takes "
            "completions of the data (--lmbda below 1) stops at them; --prompt_only drop leaves them out",
            flush=True,
        )
    if found.problems:
        print(visible("\n".join(f"WRONG {text}" for text in found.problems[:_SHOWN_PROBLEMS])), flush=True)
        raise CheckFailedError(
            f"{len(found.problems)} of {len(rows)} rows would not train on what the data set says (first: "
            f"{found.problems[0]}); look at the tokenizer and the chat template of {config.model}"
        )
    if config.on_bad_row == "stop" and (number := rows.summary.dropped.get("malformed")):
        raise CheckFailedError(
            f"{number} of {rows.summary.num_read} rows are malformed, and training stops at the first of them "
            f"({rows.summary.first_dropped['malformed']}); correct them, or pass --on_bad_row skip here and there"
        )
    if problem := _size_problem(encoder, config.model):
        print(f"WRONG {problem}", flush=True)
        raise CheckFailedError(problem)
    if not found.num_completion_tokens:
        raise CheckFailedError(
            f"nothing to train on: none of {len(rows)} rows has a completion; add completions, or train with --lmbda 1 "
            "(the student samples them)"
        )


def _image_tokens(config: CheckDataConfig, encoder: ChatEncoder) -> ImageTokens | None:
    """How the model sees images; None for one of text alone, and for a directory that holds no model."""
    vision = read_architecture(config.model).vision if _is_vision_language(config.model) else None
    if vision is None:
        for flag in ("max_image_tiles", "image_url_dir"):
            if getattr(config, flag) is not None:
                raise ConfigError(f"--{flag} is for a vision-language model, and {config.model} has no vision tower")
        return None
    tiles = config.max_image_tiles
    found = read_image_tokens(config.model, vision.family, vision.image_token_id, encoder.tokenizer, max_tiles=tiles)
    return replace(found, url_dir=config.image_url_dir)


def _is_vision_language(model: str) -> bool:
    return (Path(model) / "config.json").is_file() and "vision_config" in read_config_json(model)


def _size_problem(encoder: ChatEncoder, model: str) -> str | None:
    """A tokenizer with more tokens than the model has, where the directory holds a model: `train` refuses the pair."""
    if not (Path(model) / "config.json").is_file():
        return None
    num_rows, num_tokens = read_config_json(model).get("vocab_size"), len(encoder.tokenizer)
    if not isinstance(num_rows, int) or num_tokens <= num_rows:
        return None
    return (
        f"the tokenizer of {model} has {num_tokens} tokens, but its config.json says vocab_size {num_rows}: they do "
        "not belong together, and training refuses them; take the tokenizer that the model came with"
    )


def check_rows(
    encoder: ChatEncoder,
    rows: RowDataset,
    paths: Sequence[str],
    *,
    loss_scale: str = "last_round",
    variables: str = "{}",
    images: ImageTokens | None = None,
    maker: RowMaker | None = None,
) -> Account:
    """The checks of the module docstring. `variables`: the flags' for the template, as JSON."""
    found, may_be_cut = Account(), rows.summary.num_truncated > 0
    given = json.loads(variables)
    may_be_fewer = any("overlong" in reason for reason in rows.summary.dropped)
    for place, record, of_record in _records(rows, paths, maker):
        wanted = [
            _Rendered(encoder, conversation, may_be_cut=may_be_cut)
            for conversation in read_again(
                record, loss_scale=loss_scale, variables=given, text_arguments=encoder.arguments_as_text
            )
        ]
        if len(of_record) < len(wanted) and not may_be_fewer and rows.place(len(rows) - 1) != place:
            found.problems.append(f"{place}: {len(of_record)} rows where the data set has {len(wanted)}")
        for row in of_record:
            completion = row.completion_ids or ()
            found.num_prompt_tokens += len(row.prompt_ids)
            found.num_completion_tokens += len(completion)
            found.num_completions += row.completion_ids is not None
            found.num_ended += completion[-1:] == (encoder.end_of_turn_id,)
            found.num_end_inside += encoder.end_of_turn_id in completion[:-1]
            if len(row.prompt_ids) + len(completion) > found.longest:
                found.longest, found.longest_place = len(row.prompt_ids) + len(completion), place
            found.num_image_tokens += sum(picture.num_tokens for picture in row.pictures)
            problem_of_mask = _mask_problem(row) or (images and _image_problem(row, images))
            row = row if images is None else _with_bare_prompts(row, images)
            problems = [rendered.problem(row) for rendered in wanted]
            if None in problems:  # of several rows of a record some may have been dropped
                at = problems.index(None)
                found.num_split += wanted[at].is_split(row)
                found.num_composed += wanted[at].is_composed(row)
                problem, wanted = None, wanted[at + 1 :]
            else:
                problem, wanted = (problems or ["the record has no such turn to train on"])[0], wanted[1:]
            problem = problem or problem_of_mask or _teachers_problem(encoder, row, record, given, loss_scale)
            if problem:
                found.problems.append(f"{place}: {problem}")
    return found


def _records(
    rows: RowDataset, paths: Sequence[str], maker: RowMaker | None
) -> Iterator[tuple[str, Columns, list[Row]]]:
    """(place, record, its rows) of every record with rows: a second reading, in the order of the first."""
    index = 0
    for path in paths:
        for line, record in read_records(path):
            place, of_record = f"{path}:{line}", []
            while index < len(rows) and rows.place(index) == place:
                of_record.append(rows[index])
                index += 1
            if of_record:
                columns = record if maker is None else maker.made(record)
                assert isinstance(columns, dict), "a row that was loaded has columns"
                yield place, columns, of_record


def _teachers_problem(
    encoder: ChatEncoder, row: Row, record: Columns, variables: dict[str, Any], loss_scale: str
) -> str | None:
    prompt = record.get("teacher_prompt")
    if prompt is None:
        return None if row.teacher_prompt_ids is None else "the teacher has a prompt of its own, and the row none"
    if not encoder.has_template:
        ids = encoder.encode(prompt, None)[0]
    else:
        as_text = encoder.arguments_as_text
        own = read_again(record, loss_scale=loss_scale, variables=variables, text_arguments=as_text)[-1]
        turns = teachers_turns(prompt, own.turns, text_arguments=as_text)
        ids = _render(encoder, turns, own.options, add_generation_prompt=True)[1]
    return None if ids == row.teacher_prompt_ids else "the teacher's prompt has not the tokenizer's own tokens"


def _render(
    encoder: ChatEncoder, turns: list[Any], options: dict[str, Any], *, add_generation_prompt: bool
) -> tuple[str, tuple[int, ...]]:
    """Text and ids, by the tokenizer's own renderer alone."""
    arguments: dict[str, Any] = dict(add_generation_prompt=add_generation_prompt, return_dict=False, **options)
    arguments |= encoder.clock.options(encoder.tokenizer.chat_template)
    messages: Any = [dict(turn) for turn in turns]
    if encoder.wants_parts:
        messages = [
            {**turn, "content": parts(turn["content"])} if isinstance(turn["content"], str) else turn
            for turn in messages
        ]
    apply = encoder.tokenizer.apply_chat_template
    return str(apply(messages, tokenize=False, **arguments)), tuple(apply(messages, tokenize=True, **arguments))


class _Rendered:
    """A record as the tokenizer itself renders and tokenises it."""

    def __init__(self, encoder: ChatEncoder, conversation: Conversation, *, may_be_cut: bool) -> None:
        self._encoder, self._may_be_cut = encoder, may_be_cut
        turns, answer, options, _ = conversation
        if encoder.has_template:
            self.prompt, self.prompt_ids = _render(encoder, turns, options, add_generation_prompt=True)
            self.num_added = 0
            whole = None if answer is None else _render(encoder, [*turns, answer], options, add_generation_prompt=False)
            self.whole_ids = None if whole is None else whole[1]
            self.completion = None if whole is None else self._cut(whole[0][len(self.prompt) :])
        else:
            assert conversation.text_only, "without a template there are strings only"
            prompt, completion = turns[0]["content"], None if answer is None else answer["content"]
            self.prompt, self.prompt_ids = prompt, encoder.encode(prompt, None)[0]
            self.num_added = len(self.prompt_ids) - len(encoder.tokenize(prompt))  # a beginning-of-text token
            self.completion = None if completion is None else completion + encoder.decode([encoder.end_of_turn_id])
            self.whole_ids = None

    def problem(self, row: Row) -> str | None:
        """What is wrong with the row, or None."""
        is_cut = self._may_be_cut and len(row.prompt_ids) < len(self.prompt_ids)
        if row.prompt_ids != (self.prompt_ids[-len(row.prompt_ids) :] if is_cut else self.prompt_ids):
            return "the prompt's tokens are not the tokenizer's own"
        if row.completion_ids is not None and not (self._is_whole(row) or self._is_half(row)):
            return "the completion's tokens are not the tokenizer's own"
        if not is_cut:
            text, ids = self.prompt + (self.completion or ""), (*row.prompt_ids, *(row.completion_ids or ()))
            return _text_problem(text, self._encoder.decode(ids[self.num_added :]))
        # The prompt may have been cut within a letter.
        return _text_problem(self.completion or "", self._encoder.decode(row.completion_ids or ()))

    def is_split(self, row: Row) -> bool:
        return self.whole_ids is not None and row.completion_ids is not None and not self._is_whole(row)

    def is_composed(self, row: Row) -> bool:
        """The data set has letters in parts (an accent of its own), and the tokens have none."""
        text = self.prompt + (self.completion or "")
        decoded = self._encoder.decode((*row.prompt_ids, *(row.completion_ids or ())))
        return not unicodedata.is_normalized("NFC", text) and unicodedata.is_normalized("NFC", decoded)

    def _is_whole(self, row: Row) -> bool:
        """Prompt and completion are consecutive in the tokens of the whole conversation."""
        ids = (*row.prompt_ids, *(row.completion_ids or ()))
        end = len(self.prompt_ids) + len(row.completion_ids or ())
        return self.whole_ids is not None and self.whole_ids[end - len(ids) : end] == ids

    def _is_half(self, row: Row) -> bool:
        """The completion's text by itself has these tokens."""
        assert self.completion is not None
        return self._encoder.tokenize(self.completion) == row.completion_ids

    def _cut(self, text: str) -> str:
        """Up to and including the last token that ends a turn."""
        end = self._encoder.decode([self._encoder.end_of_turn_id])
        return text[: text.rindex(end) + len(end)] if end in text else text


def _text_problem(text: str, decoded: str) -> str | None:
    wanted, given = "".join(text.split()), "".join(decoded.split())
    if wanted == given or unicodedata.normalize("NFC", wanted) == unicodedata.normalize("NFC", given):
        return None
    at = next((i for i, (a, b) in enumerate(zip(wanted, given, strict=False)) if a != b), min(len(wanted), len(given)))
    return f"the tokens spell another text: {given[at : at + 30]!r} where the data set has {wanted[at : at + 30]!r}"


def _mask_problem(row: Row) -> str | None:
    if not row.completion_ids:
        return None
    batch = collate([Sample(0, 0, row.prompt_ids, row.completion_ids, "dataset")])
    start, num_inputs = len(row.prompt_ids) - 1, len(row.prompt_ids) + len(row.completion_ids) - 1
    fed = (*row.prompt_ids, *row.completion_ids)[:-1]
    if (
        batch.tokens[0, :num_inputs].tolist() != list(fed)
        or batch.loss_index.tolist() != list(range(start, num_inputs))
        or batch.labels.tolist() != list(row.completion_ids)
    ):
        return "the loss positions are not the last ones, with the completion as labels"
    return None
