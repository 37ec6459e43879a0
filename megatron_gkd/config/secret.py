"""A key of a server: read from the environment, checked without being shown, and taken out of every text.

    key = Secret.from_environment("TEACHER_API_KEY")     # None where it is not set
    headers = {"Authorization": f"Bearer {key.value}"}
    message = key.redact(message)                        # before it is cut

A key is printable ASCII without blanks: another one cannot stand in a header, and what refuses it there shows it. Line
ends and blanks around it, as a file leaves them, are dropped. It is hidden in the forms that it takes inside JSON,
URLs, HTML and Python's repr, too. What a server does to it beyond that (reversed, in hexadecimal) is not found: that
server knows it already.
"""

from __future__ import annotations

import html
import json
import os
import re
import stat
from pathlib import Path
from typing import Self
from urllib.parse import quote, quote_plus

from megatron_gkd.errors import ConfigError

HIDDEN = "(the key)"


class Secret:
    """Its text is in `value` alone: not in repr, str or any error of this class."""

    __slots__ = ("_forms", "value")

    def __init__(self, value: str, name: str) -> None:
        """`name` says in errors which key it is. Raises ConfigError."""
        value = value.strip()
        bad = next((char for char in value if not "!" <= char <= "~"), None)
        if not value or bad is not None:
            what = (
                "is empty"
                if not value
                else "has a blank in it"
                if bad == " "
                else "has a letter beyond ASCII in it"
                if str(bad) > "~" and str(bad).isprintable()
                else "has a control character in it"
            )
            raise ConfigError(f"the key in {name} {what}, and cannot be sent; give it as the server was given it")
        self.value = value
        forms = {value, repr(value)[1:-1], json.dumps(value)[1:-1], json.dumps(value)[1:-1].replace("/", "\\/")}
        forms |= {re.sub("[<>&']", lambda found: f"\\u00{ord(found[0]):02x}", form) for form in forms}  # JSON for HTML
        forms |= {quote(value, safe=""), quote(value), quote_plus(value), html.escape(value)}
        self._forms = sorted(forms, key=len, reverse=True)

    @classmethod
    def from_environment(cls, name: str) -> Self | None:
        """The key in a variable; None where that is not set or empty."""
        text = os.environ.get(name)
        return cls(text, f"the environment variable {name}") if text else None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The key in a file that belongs to this user and is closed to all others. Raises ConfigError."""
        try:
            with open(
                path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
            ) as file:
                found = os.fstat(file.fileno())
                own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
                if not own or stat.S_IMODE(found.st_mode) & 0o077:
                    raise ConfigError(f"{path} is to be a file of this user's that nobody else can read: chmod 600 it")
                text = file.read(4096).decode("ascii", errors="replace")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); it is to hold a secret") from None
        return cls(text, str(path))

    def redact(self, text: str) -> str:
        """The text without the key."""
        for form in self._forms:
            text = text.replace(form, HIDDEN)
        return text

    def is_in(self, content: bytes) -> bool:
        """Whether bytes hold the key."""
        return any(form.encode() in content for form in self._forms)

    def longest(self) -> int:
        """Characters of its longest form: how far from a cut a piece of it may be."""
        return len(self._forms[0])

    def __repr__(self) -> str:
        return "Secret(...)"
