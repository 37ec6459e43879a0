"""A data set's prompts one by one, for sampling completions to a file, and the rows of that file.

A row has the prompt and the completion in one of two forms, whatever the form of its record (forms.py), and keeps
the record's other columns:

    {"prompt": ..., "completion": TEXT, "sampling": {...}}               where there is `prompt`, or it is a string
    {"messages": [..., {"role": "assistant", ...}], "sampling": {...}}   else

A row keeps its tools, and what the chat template was given for all rows is written into each, so that it is read back
with the prompt that was sampled from.

Reading it back tokenises the text again. `read_back` says beforehand what that will give, per completion:

    exact       the very token ids that were sampled
    respelled   other tokens of the same text (a sampler need not use the tokenizer's own segmentation, and may end a
                turn with another of the model's end tokens)
    changed     another text: bytes that are not UTF-8, special tokens or blanks that the chat template takes away
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from megatron_gkd.data.chat import ChatEncoder, Message
from megatron_gkd.data.files import Columns, read_records
from megatron_gkd.data.forms import form_columns, read_record
from megatron_gkd.data.image_forms import TAG, ImageSource, numbers_in, take_images, with_tags
from megatron_gkd.data.image_tokens import ImageTokens
from megatron_gkd.data.pictures import read_picture, reference
from megatron_gkd.errors import DataError
from megatron_gkd.records import Picture

NO_VARIABLES: Mapping[str, Any] = MappingProxyType({})
ReadBack = Literal["exact", "respelled", "changed"]


@dataclass(frozen=True)
class Prompt:
    """One record's prompt. `index` counts all records, those that cannot be used included."""

    index: int
    place: str
    record: Columns
    text: str | list[Message]
    ids: tuple[int, ...]
    options: Mapping[str, Any]  # what the chat template was given beside the turns
    variables: Mapping[str, Any]  # of them those that were given for all rows
    marks: tuple[bool | None, ...]  # of the turns: whether they carry the loss
    bare: tuple[int, ...] = ()  # with images: the ids with one placeholder for each, as the template writes them
    pictures: tuple[Picture, ...] = ()  # of the prompt, in reading order


def read_prompts(
    paths: Sequence[str],
    encoder: ChatEncoder,
    *,
    start: int = 0,
    variables: Mapping[str, Any] = NO_VARIABLES,
    images: ImageTokens | None = None,
) -> Iterator[Prompt | tuple[int, str, str]]:
    """Prompts from record `start` on, in order; (index, place, what is wrong) for a record without a usable one.

    Args:
        variables: the chat template's for all rows; a row's own win.
        images: how the model sees images; None: a record with images is not usable.
    """
    index = -1
    for path, records in [(path, read_records(path)) for path in paths]:
        for line, record in records:
            index += 1
            if index < start:
                continue
            place = f"{path}:{line}"
            try:
                if isinstance(record, str):
                    raise DataError(record)
                sources: list[ImageSource] = []
                if images is not None:
                    record, sources = take_images(record)
                reading = read_record(record)
                text, _ = reading.pair
                options = {**variables, **reading.options}
                ids, _ = encoder.encode(text, None, options)
                bare, pictures = ids, tuple[Picture, ...]()
                if images is not None:
                    ids, pictures = images.expand(ids, _pictures(text, sources, Path(path).parent, images.url_dir))
            except DataError as error:
                yield index, place, str(error)
            else:
                yield Prompt(index, place, record, text, ids, options, variables, reading.marks, bare, pictures)


def _pictures(
    text: str | Sequence[Message], sources: Sequence[ImageSource], folder: Path, url_dir: str | None
) -> list[Picture]:
    """The images of a prompt, in reading order. Raises DataError where the row of a result could not say where."""
    texts = [text] if isinstance(text, str) else [turn["content"] for turn in text]
    if sources and any(TAG in one for one in texts):
        raise DataError(f"the text of a row with images has {TAG} where there is no image; write it in another way")
    return [read_picture(sources[n], folder, n, url_dir) for one in texts for n in numbers_in(one)]


def completion_text(encoder: ChatEncoder, token_ids: Sequence[int], stop_ids: Sequence[int]) -> str:
    """The text of a completion without the token that ended it."""
    content = token_ids[:-1] if token_ids and token_ids[-1] in stop_ids else token_ids
    return encoder.decode(content)


def read_back(encoder: ChatEncoder, prompt: Prompt, token_ids: Sequence[int], stop_ids: Sequence[int]) -> ReadBack:
    """What the row will be read back as."""
    text = completion_text(encoder, token_ids, stop_ids)
    try:
        prompt_ids, completion_ids = encoder.encode(prompt.text, text, prompt.options)
    except DataError:
        return "changed"
    if prompt_ids != (prompt.bare or prompt.ids) or completion_ids is None:
        return "changed"
    if completion_ids == tuple(token_ids):
        return "exact"
    return "respelled" if encoder.decode(completion_ids[:-1]) == text and "\ufffd" not in text else "changed"


def make_row(prompt: Prompt, text: str, sampling: dict[str, Any]) -> dict[str, Any]:
    """The row of one completion; what `sampling` says is not read back."""
    row = {name: value for name, value in prompt.record.items() if name not in form_columns(prompt.record)}
    if prompt.variables:  # what all rows were given is each row's own from here on
        for name in ("chat_template_kwargs", "enable_thinking"):
            row.pop(name, None)
        named = prompt.options.items()
        row["chat_template_kwargs"] = {name: value for name, value in named if name not in ("tools", "documents")}
    if prompt.pictures:
        row["images"] = [reference(picture) for picture in prompt.pictures]
    if isinstance(prompt.text, str):
        return row | {"prompt": with_tags(prompt.text), "completion": text, "sampling": sampling}
    turns = [
        {**turn, "content": with_tags(turn["content"])} | ({} if mark is None else {"loss": mark})
        for turn, mark in zip(prompt.text, prompt.marks, strict=False)
    ]
    if "prompt" in prompt.record:
        row |= {"prompt": turns, "completion": text}
    else:
        row["messages"] = [*turns, {"role": "assistant", "content": text}]
    return row | {"sampling": sampling}
