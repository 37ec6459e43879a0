"""Makes text from outside (servers, logs, data, models, names of files) safe for a terminal or a log."""

from __future__ import annotations


def visible(text: str) -> str:
    """The text with escapes (`\\x1b`, `\\u202e`) in place of characters that control a terminal or change the direction
    of text. Line breaks stay.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
