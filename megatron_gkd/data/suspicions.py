"""Rows that can be trained on, but probably differ from what their author meant: `train` and `check data` count them.

    begins twice              two beginning-of-text tokens: the text has one, and the tokenizer adds its own
    control tokens in text    the text of a special token (`<|im_start|>`, `</s>`) inside a turn, where the template
                              writes such tokens itself: a prompt that is in a chat format already, or text that closes
                              its turn and opens another one

Nothing is changed: a row may be about such tokens. Without a chat template they are the author's way to write turns.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Final

from megatron_gkd.data.chat import ChatEncoder
from megatron_gkd.data.files import Columns
from megatron_gkd.data.forms import form_columns
from megatron_gkd.data.image_forms import TAG
from megatron_gkd.records import Row

TWICE: Final = "begins twice"
CONTROL: Final = "control tokens in text"
MEANING: Final = {
    TWICE: (
        "begin with two beginning-of-text tokens: the text has one, and the tokenizer adds its own; take it out of "
        "the text"
    ),
    CONTROL: (
        "have the text of a special token inside a turn, which becomes that token: prompts that are in a chat format "
        "already (give the turns as `messages`), or text that ends its turn"
    ),
}


class Suspicions:
    """Looks at rows of one encoder."""

    def __init__(self, encoder: ChatEncoder) -> None:
        self._encoder = encoder

    def of(self, record: Columns, row: Row) -> Iterator[str]:
        """Keys of `MEANING`. `record` is what the row was made of."""
        bos = self._encoder.tokenizer.bos_token_id
        if bos is not None and row.prompt_ids[:2] == (bos, bos):
            yield TWICE
        if self._names is not None and any(map(self._names.search, self._texts(record))):
            yield CONTROL

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        """Matches the text of a special token; None where there is none, or no template that writes them."""
        names = self._encoder.tokenizer.convert_ids_to_tokens(sorted(self._encoder.special_ids))
        return re.compile("|".join(map(re.escape, names))) if names and self._encoder.has_template else None

    def _texts(self, record: Columns) -> Iterator[str]:
        texts = (text for name in form_columns(record) for text in _strings(record.get(name)))
        # Of a row with images it says where they stand, which is also how some tokenizers call their placeholder.
        yield from (text.replace(TAG, "") for text in texts) if record.get("images") or record.get("image") else texts


def describe(counts: Mapping[str, int], first: Mapping[str, str]) -> Iterator[str]:
    """One sentence for each kind."""
    for kind, count in sorted(counts.items()):
        yield f"{count} rows {MEANING[kind]} (first: {first[kind]})"


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _strings(part)
