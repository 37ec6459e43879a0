"""Text from outside (servers, logs, data, models, names of files) as it may reach a terminal or a log."""

from __future__ import annotations


def visible(text: str) -> str:
    """Without characters that act on a terminal, or that turn the order in which it shows others: those stand as
    escapes, `\\x1b` or `\\u202e`. Line breaks stay.
    """
    if text.isascii() and text.replace("\n", "").isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
