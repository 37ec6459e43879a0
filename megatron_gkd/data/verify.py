"""Whether a completion is right: a verifier gives each one a number from 0 to 1, whose mean is the accuracy.

    last_number          the last number of the text equals the last number of the answer: 1,234.50 equals 1234.5
    exact                the text is the answer, but for the space around them
    module:function      yours: function(text, row) -> bool or a number from 0 to 1; `row` has the columns of the record

The answer is the column `answer` of the record, or without it the row's own completion. The text has no special tokens.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, Final

from megatron_gkd.errors import ConfigError, DataError

ANSWER: Final = "answer"
Row = Mapping[str, Any]
Verifier = Callable[[str, Row], bool | float]
_NUMBER: Final = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?")


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None: there is none. A minus sign right after a letter or digit is a hyphen."""
    found = None
    for match in _NUMBER.finditer(text):
        digits, before = match[0], text[: match.start()][-1:]
        found = Decimal((digits.lstrip("-") if before.isalnum() else digits).replace(",", ""))
    return found


def load_verifier(name: str) -> Verifier:
    """By its name (module docstring); a built-in reads `row["answer"]`. Raises ConfigError."""
    if name == "last_number":
        return lambda text, row: last_number(text) == last_number(str(row[ANSWER]))
    if name == "exact":
        return lambda text, row: text.strip() == str(row[ANSWER]).strip()
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the module does when it is imported
        raise ConfigError(
            f"--eval_verifier {name}: it cannot be imported ({type(error).__name__}: {error}); give module:function of "
            "a module on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"--eval_verifier {name}: it is a {type(found).__name__}, no function")
    return found  # type: ignore[no-any-return]


def check_answer(name: str, row: Row, place: str) -> None:
    """Raise DataError for a row whose answer no text can equal."""
    if name == "last_number" and last_number(str(row[ANSWER])) is None:
        raise DataError(
            f"{place}: its answer has no number, and --eval_verifier last_number compares numbers; give a column "
            f"`{ANSWER}` with one, or another verifier"
        )


def verdict(verifier: Verifier, name: str, text: str, row: Row, place: str) -> float:
    """0 to 1. Raises ConfigError for a verifier that fails, or gives anything else."""
    try:
        value = verifier(text, row)
        number = float(value)
    except Exception as error:
        raise ConfigError(f"--eval_verifier {name}: {place}: {type(error).__name__}: {error}") from error
    if not 0 <= number <= 1:
        raise ConfigError(f"--eval_verifier {name}: {place}: it gave {value!r}; give a bool or a number from 0 to 1")
    return number
