"""A key of a server: read from the environment, checked without being shown, and removed from every text.

    key = Secret.from_environment("TEACHER_API_KEY")     # None where it is not set
    headers = {"Authorization": f"Bearer {key.value}"}
    message = key.redact(message)                        # before it is cut

A key is printable ASCII without blanks: others cannot be sent in a header, and the error would show them. Line ends and
blanks around it, as in a file, are removed. It is also hidden in the forms that it takes inside JSON, URLs, HTML and
Python's repr. Other forms (reversed, in hexadecimal) are not found; only the server, which knows the key, could make
them.
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
    """A key. Its text is only in `value`: not in repr, str or any error of this class."""

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
        """The key in an environment variable; None if that is not set or empty."""
        text = os.environ.get(name)
        return cls(text, f"the environment variable {name}") if text else None

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """The key in a file that belongs to this user and that nobody else can read. Raises ConfigError."""
        try:
            with open(
                path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)
            ) as file:
                found = os.fstat(file.fileno())
                own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
                if not own or stat.S_IMODE(found.st_mode) & 0o077:
                    raise ConfigError(f"{path} must be a file of this user that nobody else can read: chmod 600 it")
                text = file.read(4096).decode("ascii", errors="replace")
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}); it must contain the key") from None
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
        """Length of its longest form: a part of the key may be this close to a cut in a text."""
        return len(self._forms[0])

    def __repr__(self) -> str:
        return "Secret(...)"
