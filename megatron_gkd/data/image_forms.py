"""The images of a record, whatever form they have, and the record as text that marks their places.

    content parts     {"type": "image", "image" | "path" | "url" | "base64": ...}, {"type": "image_url", "image_url":
                      {"url": "data:..."}}, and {"type": "image"} alone, which takes the next of the column
    a column          `images` (or `image`): one image or a list; `<image>` in the text says where each stands. Without
                      any `<image>` they stand before the first user's text
    an image          a path, relative to the data file's folder; a data: URI; base64 with its key; {bytes, path}, as
                      data sets with an image column have it; bytes; an http(s) URL, which pictures.py refuses or
                      fetches

Everything after this works on text: an image is a MARK in it with the image's number, which becomes a part again where
the chat template is given the turns (`parts`).
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from megatron_gkd.errors import DataError

TAG: Final = "<image>"
_COLUMNS: Final = ("images", "image")
_MARK: Final = re.compile("\0(\\d+)\0")
_BEFORE: Final = ("system", "system_prompt", "history")  # in reading order, with the columns of the forms
_FORMS: Final = ("messages", "prompt", "conversations", "instruction", "input")


@dataclass(frozen=True)
class ImageSource:
    """Where an image is: in a file, in the record, or at an http(s) URL."""

    path: str | None
    data: bytes | None
    url: str | None = None


def take_images(record: Mapping[str, Any]) -> tuple[dict[str, Any], list[ImageSource]]:
    """The record with marks in place of images, without their columns, and the images by number. Raises DataError."""
    given = [name for name in _COLUMNS if record.get(name) not in (None, "", [], {})]
    if len(given) > 1:
        raise DataError("both `images` and `image` are given; keep one of them")
    column: list[ImageSource] = []
    if given:
        value = record[given[0]]
        entries = value if isinstance(value, list) else [value]
        column = [_source(f"`{given[0]}`, entry {number}", entry) for number, entry in enumerate(entries, start=1)]
    rest = {name: value for name, value in record.items() if name not in _COLUMNS}
    if not column and not _has_parts(rest):
        return rest, []
    if any("\0" in text for text in _texts(rest)):
        raise DataError("a row with images has the character NUL in its text; remove it")
    taking = _Taking(column)
    for name in (*_BEFORE, *_FORMS):
        if name in rest:
            rest[name] = taking.marked(rest[name])
    if column and not taking.num_taken:
        _put_first(rest, taking.all_marks())
    elif taking.num_taken != len(column):
        raise DataError(f"the row has {len(column)} images in `{given[0] if given else 'images'}` and {taking.told()}")
    if "teacher_prompt" in rest:  # of the same images
        of_teacher = _Taking(column, taking.sources)
        rest["teacher_prompt"] = of_teacher.marked(rest["teacher_prompt"])
        if of_teacher.num_taken not in (0, len(column)):
            raise DataError(f"the row has {len(column)} images, and `teacher_prompt` {of_teacher.told()}")
    return rest, taking.sources


def numbers_in(text: str) -> list[int]:
    """The images whose marks are in a text, in order."""
    return [int(found[1]) for found in _MARK.finditer(text)]


def parts(content: str) -> list[dict[str, str]]:
    """A turn's content as chat templates take it: text and images, in order."""
    pieces = _MARK.split(content)
    found = [{"type": "image"} if n % 2 else {"type": "text", "text": piece} for n, piece in enumerate(pieces)]
    return [part for part in found if part.get("text") != ""]


def with_tags(text: str) -> str:
    """The text as a column `images` goes with it."""
    return _MARK.sub(TAG, text)


class _Taking:
    """Walks a record in reading order. `sources` are all images so far, those of the column first."""

    def __init__(self, column: list[ImageSource], sources: list[ImageSource] | None = None) -> None:
        self._column = column
        self.sources = [*column] if sources is None else sources
        self.num_taken = 0  # of the column

    def marked(self, value: Any) -> Any:
        """A column's value, with its texts and lists of parts as marked texts."""
        if isinstance(value, str):
            return self._tagged(value)
        if isinstance(value, list):
            return [self.marked(item) if isinstance(item, str | list) else self._turn(item) for item in value]
        return value

    def all_marks(self) -> str:
        self.num_taken = len(self._column)
        return "".join(f"\0{number}\0" for number in range(self.num_taken))

    def told(self) -> str:
        return f"{self.num_taken} places for them ({TAG} in the text, or parts of the type image): give as many"

    def _turn(self, turn: Any) -> Any:
        if not isinstance(turn, Mapping):
            return turn
        turn = dict(turn)
        for name in ("content", "value"):
            if isinstance(turn.get(name), list):
                turn[name] = "".join(self._part(number, part) for number, part in enumerate(turn[name], start=1))
            elif isinstance(turn.get(name), str):
                turn[name] = self._tagged(turn[name])
        return turn

    def _tagged(self, text: str) -> str:
        return "".join(self._next() if piece == TAG else piece for piece in re.split(f"({TAG})", text)) if (
            self._column
        ) else text  # fmt: skip

    def _next(self) -> str:
        self.num_taken += 1
        return f"\0{self.num_taken - 1}\0"

    def _part(self, number: int, part: Any) -> str:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return self._tagged(part["text"])
        if kind not in ("image", "image_url"):
            raise DataError(f"part {number} of a turn's content is of the type {kind!r}; supported are text and image")
        where = f"part {number} of a turn's content"
        for name in ("image", "path", "url", "image_url", "base64"):
            value = part.get(name)
            if value is not None:
                value = value.get("url") if name == "image_url" and isinstance(value, Mapping) else value
                self.sources.append(_source(where, {"base64": value} if name == "base64" else value))
                return f"\0{len(self.sources) - 1}\0"
        if self.num_taken >= len(self._column):
            raise DataError(f"{where} is an image without `image`, `path`, `url` or `base64`, and `images` has no more")
        return self._next()


def _source(where: str, value: Any) -> ImageSource:
    if isinstance(value, bytes):
        return ImageSource(None, value)
    if isinstance(value, Mapping):
        if value.get("base64") is not None:
            return ImageSource(None, _decoded(where, value["base64"]))
        if isinstance(value.get("bytes"), bytes):
            return ImageSource(None, value["bytes"])
        value = value.get("path")
    if not isinstance(value, str) or not value:
        raise DataError(f"{where}: an image is a path, a data: URI, base64, bytes, or an object of bytes and path")
    if value.startswith(("http://", "https://")):
        return ImageSource(None, None, value)
    if value.startswith("data:"):
        head, comma, text = value.partition(",")
        if not comma or not head.endswith(";base64"):
            raise DataError(f"{where}: a data: URI holds its image as base64 (data:image/png;base64,...)")
        return ImageSource(None, _decoded(where, text))
    return ImageSource(value.removeprefix("file://"), None)


def _decoded(where: str, text: Any) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError, TypeError) as error:
        raise DataError(f"{where}: it is not base64 ({error})") from None


def _has_parts(record: Mapping[str, Any]) -> bool:
    turns = [turn for value in record.values() if isinstance(value, list) for turn in value]
    return any(
        isinstance(turn.get(n), list) for turn in turns if isinstance(turn, Mapping) for n in ("content", "value")
    )


def _put_first(record: dict[str, Any], marks: str) -> None:
    """Before the first user's text."""
    for name in ("prompt", "instruction"):
        if isinstance(record.get(name), str):
            record[name] = marks + record[name]
            return
    for name in ("messages", "prompt", "conversations"):
        for turn in record.get(name) or ():
            if isinstance(turn, dict) and (turn.get("role") == "user" or turn.get("from") in ("human", "user")):
                key = "content" if "role" in turn else "value"
                if isinstance(turn.get(key), str):
                    turn[key] = marks + turn[key]
                    return
    raise DataError("the row has images and no user's turn to put them in")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _texts(part)
    elif isinstance(value, list):
        for part in value:
            yield from _texts(part)
