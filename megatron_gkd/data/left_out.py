"""Finds what a chat template leaves out of a row, by comparing the text with and without each part.

    a key of a turn      `reasoning` beside `content`, where the template knows `reasoning_content`: both renderings are
                         equal, so the key is lost, and the student would learn to answer without it
    a turn's content     a turn of a role that the template does not know, or a content beside tool calls
    an option            `tools`, `documents` or a variable of the row's own that the template does not use

Nothing is refused: templates leave out the reasoning of earlier turns on purpose. Lost parts are counted; runs and
`check data` report them. An empty value is not counted.

Cost: one rendering for each name of a further key in a row, two for each option of its own, and none for most rows, of
which the template was seen to use every turn of that shape. (A template that drops a turn because of the words in it is
noticed only where it drops the first turn of that shape too.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from megatron_gkd.data.chat import ChatEncoder, Message, Options, as_turns
from megatron_gkd.errors import DataError

_MARK: Final = "gkd7probe"
_MOST_SHAPES: Final = 100_000
Pair = tuple[str | list[Message], str | Message | None]
Shape = tuple[Any, ...]


class LeftOut:
    """Finds what one encoder's template leaves out."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self._encoder = encoder
        self._used_shapes: set[Shape] = set()

    def of(self, pairs: Sequence[Pair], options: Options, own: Options) -> list[str]:
        """Names of what is lost of one record, one for each time: "`reasoning` of assistant turns".

        Args:
            pairs: the record's rows; what one of them uses is not lost.
            options: what the template is given with them; `own`: those of the record itself.
        """
        if not self._encoder.has_template:
            return []
        lost: dict[Any, str] = {}
        used: set[Any] = set()
        for prompt, completion in pairs:
            turns, answer = as_turns(prompt, completion)
            row = _Row(self._encoder, turns, answer, options)
            for thing, name, is_lost in [*self._contents(row), *_keys(row), *_options(row, own)]:
                (lost.__setitem__(thing, name) if is_lost else used.add(thing))
        return [name for thing, name in lost.items() if thing not in used]

    def _contents(self, row: _Row) -> Iterator[tuple[Any, str, bool]]:
        shape = (
            row.has_answer,
            *row.options,
            *((turn["role"], *sorted(name for name in turn if not _is_empty(turn[name]))) for turn in row.whole),
        )
        if shape in self._used_shapes:
            return
        try:
            text = row.render([{**t, "content": f"{t['content']}{_MARK}{n}."} for n, t in enumerate(row.whole)])
        except DataError:
            text = ""
        nothing_lost = True
        for number, turn in enumerate(row.whole):
            if f"{_MARK}{number}." in text or not turn["content"].strip():
                continue
            is_lost = row.changes_nothing({number: {"content": ""}})
            nothing_lost &= not is_lost
            yield (number, "content"), f"the content of {turn['role']} turns", is_lost
        if nothing_lost and text and len(self._used_shapes) < _MOST_SHAPES:
            self._used_shapes.add(shape)


class _Row:
    """One row, and its renderings with changes."""

    def __init__(self, encoder: ChatEncoder, turns: list[Message], answer: Message | None, options: Options) -> None:
        self._encoder, self.options, self.has_answer = encoder, options, answer is not None
        self.whole = turns if answer is None else [*turns, answer]
        self._turns = turns
        self._text: str | None = None

    def render(self, whole: Sequence[Message], options: Options | None = None) -> str:
        return self._encoder.render(
            whole, add_generation_prompt=not self.has_answer, options=self.options if options is None else options
        )

    def changes_nothing(self, changes: dict[int, dict[str, Any]]) -> bool:
        """Whether turns with other entries (None: without) are rendered as these are."""
        whole = [
            {name: entry for name, entry in {**turn, **changes.get(n, {})}.items() if entry is not None}
            for n, turn in enumerate(self.whole)
        ]
        return self._same(lambda: self.render(whole))

    def needs_not(self, option: str) -> bool:
        """Whether the template writes the same without an option, in the prompt and in the whole."""
        others = {name: value for name, value in self.options.items() if name != option}
        if not self._same(lambda: self.render(self.whole, others)):
            return False

        def prompt(options: Options) -> str:
            return self._encoder.render(self._turns, add_generation_prompt=True, options=options)

        return not self.has_answer or _equal(lambda: prompt(others), prompt(self.options))

    def _same(self, other: Callable[[], str]) -> bool:
        self._text = self.render(self.whole) if self._text is None else self._text
        return _equal(other, self._text)


def _keys(row: _Row) -> Iterator[tuple[Any, str, bool]]:
    """Further entries of turns. Taking one away everywhere is one rendering; only where that changes something, and
    several turns have it, each is looked at by itself."""
    names = {name for turn in row.whole for name in turn if name not in ("role", "content")}
    for name in sorted(names):
        where = [n for n, turn in enumerate(row.whole) if not _is_empty(turn.get(name))]
        if not where:
            continue
        all_lost = row.changes_nothing({n: {name: None} for n in where})
        for n in where:
            is_lost = all_lost or (len(where) > 1 and row.changes_nothing({n: {name: None}}))
            yield (n, name), f"`{name}` of {row.whole[n]['role']} turns", is_lost


def _options(row: _Row, own: Options) -> Iterator[tuple[Any, str, bool]]:
    for name in own:
        is_column = name in ("tools", "documents")
        yield ("", name), f"`{name}`" if is_column else f"the template variable `{name}`", row.needs_not(name)


def _equal(render: Callable[[], str], text: str) -> bool:
    try:
        return render() == text
    except DataError:  # then it is needed
        return False


def _is_empty(value: Any) -> bool:
    return value is None or (isinstance(value, str | list | dict) and not value)
